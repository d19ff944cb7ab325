//! Digests as text.

use serde::{Deserialize, Serialize, Serializer};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A file by its contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// Without a folder.
    pub name: String,
    pub bytes: u64,
    /// 64 hexadecimal digits.
    pub sha256: String,
}

impl FileDigest {
    /// Of the file at `path`, which holds `bytes`.
    pub fn of(path: &Path, bytes: &[u8]) -> Self {
        FileDigest { name: file_name(path), bytes: bytes.len() as u64, sha256: hex(&Sha256::digest(bytes)) }
    }
}

/// A path's last part.
pub fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// A path as text for JSON, which cannot hold every name that a file may have.
pub(crate) fn as_text<S: Serializer>(path: &impl AsRef<Path>, to: S) -> Result<S::Ok, S::Error> {
    path.as_ref().to_string_lossy().serialize(to)
}

/// The same of a path that may not be there.
pub(crate) fn as_texts<S: Serializer>(path: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
    path.as_ref().map(|path| path.to_string_lossy()).serialize(to)
}

/// Files of up to so many bytes together are hashed whole: a fraction of a second.
pub(crate) const WHOLE: usize = 256 << 20;
/// Of each file of a larger set: its beginning (where the tensors are listed), and pieces of the rest.
const PIECES: usize = 64;
const PIECE: usize = 4096;

/// Adds `files`, path and contents: with `whole` all bytes, else each file's size, time of last change, first 64 KiB and
/// 64 pieces of 4 KiB.
pub(crate) fn files(mut hash: Sha256, files: &[(&Path, &[u8])], whole: bool) -> Sha256 {
    for &(path, bytes) in files {
        hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        hash.update((bytes.len() as u64).to_le_bytes());
        if whole {
            hash.update(bytes);
            continue;
        }
        let changed = std::fs::metadata(path).and_then(|m| m.modified()).ok();
        let changed = changed.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
        hash.update(changed.to_le_bytes());
        hash.update(&bytes[..bytes.len().min(1 << 16)]);
        for i in 0..PIECES {
            let at = bytes.len().saturating_sub(PIECE) * (i + 1) / PIECES;
            hash.update(&bytes[at..bytes.len().min(at + PIECE)]);
        }
    }
    hash
}

//! Where a model came from: for the record of its conversion.
use crate::digest::{WHOLE, file_name, hex};
use crate::gguf::ShardName;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// A model as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Origin {
    /// `org/name` on the hub, or a path.
    pub name: String,
    /// The commit on the hub.
    pub revision: Option<String>,
    pub files: Vec<OriginFile>,
}

/// A file that weights or configuration were read from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginFile {
    pub name: String,
    pub bytes: u64,
    /// 64 hexadecimal digits. None of a large file that the hub's cache does not know: it would be read again for it.
    pub sha256: Option<String>,
}

impl Origin {
    /// The weights and the configuration in a checkpoint's folder.
    pub(super) fn checkpoint(dir: &Path, name: String) -> Self {
        let list = std::fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        let counts = |path: &PathBuf| {
            path.extension().is_some_and(|end| end == "safetensors" || end == "bin") || path.ends_with("config.json")
        };
        let mut paths: Vec<PathBuf> = list.filter(counts).collect();
        paths.sort();
        // `models--ORG--NAME/snapshots/COMMIT` in the hub's cache.
        let dir = dir.canonicalize().unwrap_or_else(|_| dir.into());
        let snapshot = dir.parent().is_some_and(|parent| parent.ends_with("snapshots"));
        let revision = snapshot.then(|| file_name(&dir));
        Origin { name, revision, files: origin_files(&paths) }
    }

    /// A GGUF file, or a split model's, and its mmproj.
    pub(super) fn gguf(text: &Path, mmproj: Option<&Path>) -> Self {
        let count = ShardName::parse(&file_name(text)).map_or(1, |shard| shard.count as usize);
        let mut paths = match count {
            1 => vec![text.to_path_buf()],
            _ => (1..=count).map(|i| ShardName::path(text, i, count)).collect(),
        };
        paths.extend(mmproj.map(Path::to_path_buf));
        Origin { name: text.display().to_string(), revision: None, files: origin_files(&paths) }
    }
}

fn origin_files(paths: &[PathBuf]) -> Vec<OriginFile> {
    let bytes = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let small = paths.iter().map(|path| bytes(path)).sum::<u64>() <= WHOLE as u64;
    let hashed = |path: &Path| Some(hex(&Sha256::digest(std::fs::read(path).ok()?)));
    let describe = |path: &PathBuf| OriginFile {
        name: file_name(path),
        bytes: bytes(path),
        sha256: blob(path).or_else(|| small.then(|| hashed(path)).flatten()),
    };
    paths.iter().map(describe).collect()
}

/// The hub's cache keeps a large file under its SHA-256, and a link to it in the snapshot.
fn blob(path: &Path) -> Option<String> {
    let target = file_name(&std::fs::read_link(path).ok()?);
    (target.len() == 64 && target.bytes().all(|b| b.is_ascii_hexdigit())).then_some(target)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// As the hub's cache lies: links to blobs named by their digests, below the commit.
    #[test]
    fn a_snapshot_knows_commit_and_digests() {
        let cache = tempfile::tempdir().unwrap();
        let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/0123abcd"));
        std::fs::create_dir(&blobs).unwrap();
        std::fs::create_dir_all(&snapshot).unwrap();
        let name = "a".repeat(64);
        std::fs::write(blobs.join(&name), "weights").unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), snapshot.join("model.safetensors")).unwrap();
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        std::fs::write(snapshot.join("tokenizer.json"), "{}").unwrap();
        let origin = Origin::checkpoint(&snapshot, "org/name".into());
        assert_eq!(origin.revision.as_deref(), Some("0123abcd"));
        let files: Vec<_> = origin.files.iter().map(|f| (f.name.as_str(), f.bytes)).collect();
        assert_eq!(files, [("config.json", 2), ("model.safetensors", 7)]);
        // The link's name is believed; the small file is read.
        assert_eq!(origin.files[1].sha256.as_ref(), Some(&name));
        assert_eq!(origin.files[0].sha256.as_deref(), Some(&*hex(&Sha256::digest("{}"))));
        assert_eq!(Origin::checkpoint(cache.path(), "x".into()).revision, None);
    }
}

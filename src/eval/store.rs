//! A file of records that survives interruption at any moment.
//!
//! Layout: magic, length and text of a JSON header, its checksum; then records, each a 32-byte
//! key, a length, the payload and a checksum over all three (the first 8 bytes of SHA-256). The
//! file appears with its header complete (written beside, then renamed); records are appended,
//! and what an interrupted run left half written is cut off at the next opening.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::digest::hex;
use crate::error::advice;
use crate::interrupted::Leftover;
use sha2::{Digest, Sha256};

/// Names a record: a digest of everything its content depends on beyond the header.
pub type CacheKey = [u8; 32];

const MAGIC: &[u8; 8] = b"MBQEVAL1";
const CHECK: usize = 8;

/// Why a cache file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error("cache file {path}: {source}{}", advice(source))]
    Io { path: PathBuf, source: std::io::Error },
    #[error("cache file {path} is in use by another evaluation; wait for it or give another --cache")]
    Busy { path: PathBuf },
    #[error("cache file {path} is damaged: {what}; delete it")]
    Damaged { path: PathBuf, what: String },
}

/// An open record file, locked against other processes.
#[derive(Debug)]
pub struct CacheStore {
    path: PathBuf,
    file: File,
    index: HashMap<CacheKey, (u64, u64)>,
    end: u64,
}

impl CacheStore {
    /// Opens the file for `header` in `dir`, or makes it. Its name is `kind` and the header's digest, so files of
    /// other models and settings stay beside it.
    ///
    /// # Errors
    /// A directory that cannot be written, a file in use, a header that is not the expected one.
    pub fn open(dir: &Path, kind: &str, header: &serde_json::Value) -> Result<Self, StoreError> {
        let text = header.to_string().into_bytes();
        let digest = Sha256::digest(&text);
        let name = hex(&digest[..8]);
        let path = dir.join(format!("{kind}-{name}.mbqe"));
        let io = |source| StoreError::Io { path: path.clone(), source };
        std::fs::create_dir_all(dir).map_err(io)?;
        if !path.exists() {
            let mut beside = tempfile::NamedTempFile::new_in(dir).map_err(io)?;
            let _unfinished = Leftover::new(beside.path());
            let mut head = MAGIC.to_vec();
            head.extend((text.len() as u64).to_le_bytes());
            head.extend(&text);
            head.extend(&digest[..CHECK]);
            beside.write_all(&head).map_err(io)?;
            // Another evaluation may have made it meanwhile, and have it open.
            match beside.persist_noclobber(&path) {
                Err(e) if e.error.kind() != std::io::ErrorKind::AlreadyExists => return Err(io(e.error)),
                _ => {}
            }
        }
        let mut file = File::options().read(true).write(true).open(&path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(StoreError::Busy { path }),
            Err(std::fs::TryLockError::Error(e)) => return Err(io(e)),
        }
        let (index, end) = scan(&mut file, &text, &path)?;
        file.set_len(end).map_err(io)?;
        Ok(Self { path, file, index, end })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub fn len(&self) -> u64 {
        self.end
    }

    /// Whether it holds no record.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Whether there is a record of that key.
    pub fn has(&self, key: &CacheKey) -> bool {
        self.index.contains_key(key)
    }

    /// The payload of a record.
    ///
    /// # Errors
    /// Reading fails. (Checksums were verified when the file was opened.)
    pub fn get(&mut self, key: &CacheKey) -> Result<Option<Vec<u8>>, StoreError> {
        let Some((at, len)) = self.index.get(key).copied() else { return Ok(None) };
        let mut read = || {
            self.file.seek(SeekFrom::Start(at))?;
            let mut payload = vec![0; len as usize];
            self.file.read_exact(&mut payload)?;
            Ok(payload)
        };
        read().map(Some).map_err(|source| StoreError::Io { path: self.path.clone(), source })
    }

    /// Appends a record; a later one replaces an earlier one of the same key.
    ///
    /// # Errors
    /// Writing fails: the disk is full.
    pub fn put(&mut self, key: CacheKey, payload: &[u8]) -> Result<(), StoreError> {
        let len = payload.len() as u64;
        let mut head = key.to_vec();
        head.extend(len.to_le_bytes());
        let check = Sha256::new().chain_update(&head).chain_update(payload).finalize();
        let write = |file: &mut File| {
            file.seek(SeekFrom::Start(self.end))?;
            file.write_all(&head)?;
            file.write_all(payload)?;
            file.write_all(&check[..CHECK])
        };
        write(&mut self.file).map_err(|source| StoreError::Io { path: self.path.clone(), source })?;
        self.index.insert(key, (self.end + head.len() as u64, len));
        self.end += head.len() as u64 + len + CHECK as u64;
        Ok(())
    }

    /// A damaged-file error for a payload that does not read as it should.
    pub fn damaged(&self, what: impl Into<String>) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), what: what.into() }
    }
}

type CacheIndex = HashMap<CacheKey, (u64, u64)>;

/// Checks the header and every record; returns where the good part ends.
fn scan(file: &mut File, header: &[u8], path: &Path) -> Result<(CacheIndex, u64), StoreError> {
    let io = |source| StoreError::Io { path: path.into(), source };
    let size = file.metadata().map_err(io)?.len();
    let damaged = |what: &str| StoreError::Damaged { path: path.into(), what: what.into() };
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut head = vec![0; MAGIC.len() + 8 + header.len() + CHECK];
    reader.read_exact(&mut head).map_err(|_| damaged("the header is cut off"))?;
    if &head[..8] != MAGIC || &head[16..16 + header.len()] != header {
        return Err(damaged("it has another header"));
    }
    let mut at = head.len() as u64;
    let mut index = CacheIndex::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let mut start = [0; 40];
        if reader.read_exact(&mut start).is_err() {
            return Ok((index, at));
        }
        let mut key = [0; 32];
        key.copy_from_slice(&start[..32]);
        let mut len = [0; 8];
        len.copy_from_slice(&start[32..]);
        let len = u64::from_le_bytes(len);
        if len > size {
            return Ok((index, at));
        }
        let mut hash = Sha256::new().chain_update(start);
        let mut left = len;
        while left > 0 {
            let n = left.min(buffer.len() as u64) as usize;
            if reader.read_exact(&mut buffer[..n]).is_err() {
                return Ok((index, at));
            }
            hash.update(&buffer[..n]);
            left -= n as u64;
        }
        let mut check = [0; CHECK];
        if reader.read_exact(&mut check).is_err() || hash.finalize()[..CHECK] != check {
            return Ok((index, at));
        }
        index.insert(key, (at + 40, len));
        at += 40 + len + CHECK as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn records_survive_any_cut() {
        let dir = tempfile::tempdir().unwrap();
        let header = json!({"model": "x"});
        let mut store = CacheStore::open(dir.path(), "t", &header).unwrap();
        assert!(store.is_empty());
        assert!(matches!(CacheStore::open(dir.path(), "t", &header), Err(StoreError::Busy { .. })));
        let empty = store.len();
        store.put([1; 32], b"one").unwrap();
        let one = store.len();
        store.put([2; 32], b"two two").unwrap();
        let path = store.path().to_owned();
        drop(store);
        let bytes = std::fs::read(&path).unwrap();
        for len in empty as usize..=bytes.len() {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let mut store = CacheStore::open(dir.path(), "t", &header).unwrap();
            assert_eq!(store.get(&[1; 32]).unwrap(), (len as u64 >= one).then(|| b"one".to_vec()), "cut to {len}");
            assert_eq!(store.has(&[2; 32]), len == bytes.len());
            store.put([3; 32], b"three").unwrap();
            drop(store);
            let mut store = CacheStore::open(dir.path(), "t", &header).unwrap();
            assert_eq!(store.get(&[3; 32]).unwrap().unwrap(), b"three");
        }
    }

    #[test]
    fn a_flipped_bit_ends_the_good_part() {
        let dir = tempfile::tempdir().unwrap();
        let header = json!(1);
        let mut store = CacheStore::open(dir.path(), "t", &header).unwrap();
        store.put([1; 32], b"one").unwrap();
        let good = store.len();
        store.put([2; 32], b"two").unwrap();
        let path = store.path().to_owned();
        drop(store);
        let bytes = std::fs::read(&path).unwrap();
        for at in good as usize..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            let store = CacheStore::open(dir.path(), "t", &header).unwrap();
            assert!(store.has(&[1; 32]) && !store.has(&[2; 32]), "byte {at}");
        }
    }
}

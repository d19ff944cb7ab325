//! What a calibration keeps on disk until the model is written: the finished blocks' numbers in a progress file, the
//! finished tensors a file each, and a lock that says whose they are.
use super::CalibrateError;
use crate::Error;
use crate::digest::hex;
use crate::error::advice;
use crate::events::{Event, Observer};
use crate::ggml::GgmlType;
use crate::interrupted::Leftover;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Which calibration something belongs to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobId {
    /// What the user calls it.
    pub model: String,
    /// Its contents: [`crate::front::Tensors::fingerprint`].
    pub weights: String,
    /// Digest of settings and calibration data.
    pub settings: String,
}

impl JobId {
    /// 16 hexadecimal digits.
    fn digest(&self) -> String {
        hex(&Sha256::digest(format!("{}\n{}\n{}", self.model, self.weights, self.settings))[..8])
    }
}

const ANSWERS: &str = ".answers.json";

/// A calibration's files, named from one stem and locked against other processes.
pub struct WorkFiles {
    stem: PathBuf,
    _lock: Option<Lock>,
}

impl WorkFiles {
    /// Takes the files `STEM.json` (progress), `STEM.answers.json`, `STEM/` (tensors) and `STEM.lock`. `who` is what another process is told.
    ///
    /// # Errors
    /// Another process has them; the directory cannot be written.
    pub fn take(stem: PathBuf, who: &str, observer: &dyn Observer) -> Result<Self, Error> {
        // The longest name first, which would else be refused only when there are answers.
        let answers = with(&stem, ANSWERS);
        match answers.symlink_metadata() {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(fail(&answers, &e)),
            _ => {}
        }
        let lock = Lock::take(with(&stem, ".lock"), who)?;
        if lock.is_none() {
            let note = "this file system has no locks: see to it that no other conversion writes here";
            observer.event(Event::Note(format!("{}: {note}", stem.display())));
        }
        Ok(WorkFiles { stem, _lock: lock })
    }

    /// Where finished blocks are written down.
    pub fn progress(&self) -> PathBuf {
        with(&self.stem, ".json")
    }

    /// Where the model's own answers are.
    pub fn answers(&self) -> PathBuf {
        with(&self.stem, ANSWERS)
    }

    /// The tensors of `job`: those of another are never read.
    pub fn store(&self, job: &JobId) -> Store {
        Store::new(self.stem.join(job.digest()))
    }

    /// Removes progress, answers and tensors of all jobs.
    ///
    /// # Errors
    /// They cannot be removed.
    pub fn clear(&self) -> Result<(), Error> {
        let removed = |path: &Path, result: std::io::Result<()>| match result {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(fail(path, &e)),
            _ => Ok(()),
        };
        for path in [self.progress(), self.answers()] {
            for path in [part(&path), path] {
                removed(&path, std::fs::remove_file(&path))?;
            }
        }
        removed(&self.stem, std::fs::remove_dir_all(&self.stem))
    }
}

/// Where [`replace`] writes what will be at `path`.
fn part(path: &Path) -> PathBuf {
    path.with_extension("part")
}

/// Writes `path` beside, then renames it: an interruption, of the power too, leaves the last whole state.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    write_beside(&part(path), path, bytes).map_err(|e| fail(path, &e))
}

/// Writes `beside`, which is on disk before it becomes `path`. Nothing of it is left where it cannot be written.
fn write_beside(beside: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let _unfinished = Leftover::new(beside);
    let write = || {
        let mut file = File::create(beside)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        std::fs::rename(beside, path)
    };
    write().inspect_err(|_| drop(std::fs::remove_file(beside)))
}

/// `path` with `ending` after its name.
fn with(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// A file that one process holds. The system lets go of it when the process ends, however it ends; what it says then
/// is of no matter.
struct Lock {
    path: PathBuf,
    _leftover: Leftover,
    _file: File,
}

impl Lock {
    /// Takes the lock, or `None` where the file system has none.
    fn take(path: PathBuf, who: &str) -> Result<Option<Self>, Error> {
        let io = |e| fail(&path, &e);
        // The holder removes the file when it is done: a file that was opened before and locked after that locks nothing.
        loop {
            let mut file =
                File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(io)?;
            match file.try_lock() {
                Ok(()) if !is_at(&file, &path) => continue,
                Ok(()) => {
                    let text = format!("process {}: {who}", std::process::id());
                    file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).map_err(io)?;
                    return Ok(Some(Lock { _leftover: Leftover::new(&path), path, _file: file }));
                }
                Err(TryLockError::WouldBlock) => {
                    let holder = std::fs::read_to_string(&path).unwrap_or_default();
                    let problem = format!(
                        "another conversion works here ({holder}): wait for it, or name another output or --work-dir"
                    );
                    return Err(CalibrateError::File { path, problem }.into());
                }
                Err(TryLockError::Error(_)) => {
                    let _ = std::fs::remove_file(&path);
                    return Ok(None);
                }
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the lock goes with the file.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether `path` still names the open `file`.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |m: std::fs::Metadata| (m.dev(), m.ino());
    matches!((file.metadata().map(id), std::fs::metadata(path).map(id)), (Ok(a), Ok(b)) if a == b)
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.exists()
}

/// Finished tensors, a file each, so that memory does not grow with the model and an interrupted run can go on.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// A store in `dir`, made when first needed.
    pub fn new(dir: PathBuf) -> Self {
        Store { dir }
    }

    /// The file of a tensor.
    pub(super) fn path(&self, source: &str, ty: GgmlType) -> PathBuf {
        self.dir.join(format!("{source}.{ty}"))
    }

    /// Written beside, then renamed.
    pub(super) fn put(&self, source: &str, ty: GgmlType, bytes: &[u8]) -> Result<(), Error> {
        let path = self.path(source, ty);
        let beside = self.dir.join("part");
        let write = || {
            std::fs::create_dir_all(&self.dir)?;
            write_beside(&beside, &path, bytes)
        };
        write().map_err(|e| fail(&path, &e))
    }

    /// The tensor's bytes in type `ty`.
    ///
    /// # Errors
    /// It is not there, or cannot be read.
    pub(super) fn get(&self, source: &str, ty: GgmlType) -> Result<Vec<u8>, Error> {
        let path = self.path(source, ty);
        match std::fs::read(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let problem = "is missing: start without --resume".into();
                Err(CalibrateError::File { path, problem }.into())
            }
            read => read.map_err(|e| fail(&path, &e)),
        }
    }
}

fn fail(path: &Path, e: &std::io::Error) -> Error {
    CalibrateError::File { path: path.into(), problem: format!("{e}{}", advice(e)) }.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Silent;

    fn job(weights: &str) -> JobId {
        JobId { model: "model".into(), weights: weights.into(), settings: "settings".into() }
    }

    #[test]
    fn one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let stem = dir.path().join("m.mbq-progress");
        let take = |who: &str| WorkFiles::take(stem.clone(), who, &Silent);
        // What a killed process leaves locks nothing.
        std::fs::write(with(&stem, ".lock"), "process 1: killed").unwrap();
        let first = take("a -> b.gguf").unwrap();
        let error = take("c -> d.gguf").err().unwrap().to_string();
        let who = format!("process {}: a -> b.gguf", std::process::id());
        assert!(error.contains("m.mbq-progress.lock") && error.contains(&who), "{error}");
        drop(first);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        take("c -> d.gguf").unwrap();
    }

    #[test]
    fn jobs_do_not_see_each_others_tensors() {
        let dir = tempfile::tempdir().unwrap();
        let files = WorkFiles::take(dir.path().join("w"), "", &Silent).unwrap();
        let (a, b) = (files.store(&job("a")), files.store(&job("b")));
        a.put("t", GgmlType::MBQ3, b"a").unwrap();
        let error = b.get("t", GgmlType::MBQ3).unwrap_err().to_string();
        assert!(error.contains("t.mbq3") && error.contains("is missing"), "{error}");
        b.put("t", GgmlType::MBQ3, b"b").unwrap();
        assert_eq!(a.get("t", GgmlType::MBQ3).unwrap(), b"a");
        std::fs::write(files.progress(), "{}").unwrap();
        files.clear().unwrap();
        assert!(a.get("t", GgmlType::MBQ3).is_err() && !files.progress().exists());
        files.clear().unwrap();
    }
}

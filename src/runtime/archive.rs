//! The embedded zip archives. Nothing is written in place: files get their names when whole.

use super::RuntimeError;
use crate::gguf::Output;
use std::fs;
use std::io::{self, Cursor};
use std::path::Path;
use zip::ZipArchive;

pub struct Archive {
    zip: ZipArchive<Cursor<&'static [u8]>>,
}

impl Archive {
    pub fn open(bytes: Option<&'static [u8]>) -> Result<Self, RuntimeError> {
        let bytes = bytes.ok_or(RuntimeError::NotEmbedded)?;
        Ok(Self { zip: ZipArchive::new(Cursor::new(bytes)).map_err(damaged)? })
    }

    /// Whether `dir` holds every file at its full size.
    pub fn is_extracted(&self, dir: &Path) -> bool {
        let mut zip = self.zip.clone();
        (0..zip.len()).all(|i| {
            zip.by_index_raw(i).is_ok_and(|entry| {
                let name = entry.enclosed_name();
                name.and_then(|name| fs::metadata(dir.join(name)).ok()).is_some_and(|meta| meta.len() == entry.size())
            })
        })
    }

    /// Writes every file into `dir`, which is made if need be. Each gets its name when it is whole, so that other
    /// processes may do the same at the same time, and the next one completes what an interrupted one began.
    pub fn extract_into(&self, dir: &Path) -> Result<(), RuntimeError> {
        fs::create_dir_all(dir).map_err(io_error(dir, "cannot make the folder"))?;
        let mut zip = self.zip.clone();
        for i in 0..zip.len() {
            let mut entry = zip.by_index(i).map_err(damaged)?;
            let name = entry.enclosed_name().ok_or_else(|| damaged("a path leads out of it"))?;
            let path = dir.join(name);
            let parent = path.parent().unwrap_or(dir);
            fs::create_dir_all(parent).map_err(io_error(parent, "cannot make the folder"))?;
            let mut file = Output::create(&path).map_err(Box::new)?;
            io::copy(&mut entry, file.stream()).map_err(io_error(&path, "cannot write"))?;
            #[cfg(unix)]
            {
                use std::os::unix::fs::PermissionsExt;
                let permissions = fs::Permissions::from_mode(entry.unix_mode().unwrap_or(0o644) & 0o777);
                file.permit(permissions).map_err(Box::new)?;
            }
            file.appear().map_err(Box::new)?;
        }
        Ok(())
    }
}

fn damaged(what: impl ToString) -> RuntimeError {
    RuntimeError::Archive(what.to_string())
}

fn io_error(path: &Path, action: &'static str) -> impl Fn(io::Error) -> RuntimeError {
    move |source| RuntimeError::Io { path: path.to_path_buf(), action, source }
}

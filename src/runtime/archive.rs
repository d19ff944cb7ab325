//! The embedded zip archives. Nothing is written in place: files and folders get their names when whole.

use super::RuntimeError;
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

    /// Makes `dir`, all at once; another process may do the same at the same time. A folder that exists
    /// is completed.
    pub fn extract_as(&self, dir: &Path) -> Result<(), RuntimeError> {
        if dir.exists() {
            return self.extract_into(dir);
        }
        let parent = dir.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(io_error(parent, "cannot make the folder"))?;
        let temporary = tempfile::Builder::new()
            .prefix(".runtime-")
            .tempdir_in(parent)
            .map_err(io_error(parent, "cannot write"))?;
        self.extract_into(temporary.path())?;
        match fs::rename(temporary.path(), dir) {
            Ok(()) => {
                // It has its new name; there is nothing left to remove.
                let _ = temporary.keep();
                // A temporary folder is closed to others, which an installed one need not be.
                #[cfg(unix)]
                {
                    use std::os::unix::fs::PermissionsExt;
                    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
                        .map_err(io_error(dir, "cannot set permissions"))?;
                }
                Ok(())
            }
            Err(_) if self.is_extracted(dir) => Ok(()),
            Err(e) => Err(io_error(dir, "cannot make the folder")(e)),
        }
    }

    /// Writes every file into `dir`, each under a temporary name first.
    pub fn extract_into(&self, dir: &Path) -> Result<(), RuntimeError> {
        fs::create_dir_all(dir).map_err(io_error(dir, "cannot make the folder"))?;
        let mut zip = self.zip.clone();
        for i in 0..zip.len() {
            let mut entry = zip.by_index(i).map_err(damaged)?;
            let name = entry.enclosed_name().ok_or_else(|| damaged("a path leads out of it"))?;
            let path = dir.join(name);
            let parent = path.parent().unwrap_or(dir);
            fs::create_dir_all(parent).map_err(io_error(parent, "cannot make the folder"))?;
            let mut file = tempfile::NamedTempFile::new_in(parent).map_err(io_error(parent, "cannot write"))?;
            io::copy(&mut entry, &mut file).map_err(io_error(&path, "cannot write"))?;
            #[cfg(unix)]
            {
                use std::os::unix::fs::PermissionsExt;
                let permissions = fs::Permissions::from_mode(entry.unix_mode().unwrap_or(0o644) & 0o777);
                file.as_file().set_permissions(permissions).map_err(io_error(&path, "cannot set permissions"))?;
            }
            file.persist(&path).map_err(|e| io_error(&path, "cannot write")(e.error))?;
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

//! The built llama.cpp that this program carries: where it is, how it is installed. `sys` holds bindgen's bindings
//! to its shared libraries, reached by dlopen.
//!
//! Feature `runtime` embeds two archives that build.rs makes: libraries and tools, and the patched source
//! tree. A runtime that is needed to run something is extracted once into the user's cache folder, or
//! taken from a folder that the user names (a CUDA runtime for a CPU build of this program, say).

mod archive;
pub mod assumed;
pub mod engine;
mod hunks;
mod mmproj;
mod patch;
#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    unsafe_code,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    missing_docs
)]
pub(crate) mod sys;

pub use mmproj::find_mmproj;
pub use patch::{Patched, patch};

use crate::digest::hex;
use archive::Archive;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

#[cfg(all(feature = "runtime", not(docsrs)))]
mod embedded {
    //! What build.rs packed.
    pub static RUNTIME: Option<&[u8]> = Some(include_bytes!(concat!(env!("OUT_DIR"), "/runtime.zip")));
    pub static SOURCE: Option<&[u8]> = Some(include_bytes!(concat!(env!("OUT_DIR"), "/source.zip")));
}

#[cfg(not(all(feature = "runtime", not(docsrs))))]
mod embedded {
    //! Built without feature `runtime`.
    pub static RUNTIME: Option<&[u8]> = None;
    pub static SOURCE: Option<&[u8]> = None;
}

/// Why there is no runtime to use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    #[error("this mbq-convert was built without the runtime (feature `runtime`); name one with --runtime DIR")]
    NotEmbedded,
    #[error("{path}: not a runtime: {missing} is not in it (`mbq-convert runtime install DIR` makes one)")]
    NotARuntime { path: PathBuf, missing: String },
    #[error("{path}: no {missing} in it; give the top folder of a llama.cpp checkout")]
    NotACheckout { path: PathBuf, missing: String },
    #[error("no cache folder: {0}; name a runtime with --runtime DIR, a cache with --cache DIR")]
    NoCache(&'static str),
    #[error("{path}: {action}: {source}{}", crate::error::advice(source))]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    #[error(transparent)]
    Write(#[from] Box<crate::gguf::GgufError>),
    #[error("the embedded archive is damaged: {0}")]
    Archive(String),
    #[error("{model}: no mmproj*.gguf beside it; name the vision file with --mmproj")]
    NoMmproj { model: PathBuf },
    #[error("{model}: several vision files beside it ({found}); name one with --mmproj")]
    AmbiguousMmproj { model: PathBuf, found: String },
}

/// The llama.cpp that the patches are made for.
pub const LLAMA_CPP: &str = "b12032";

/// Writes libraries and tools into `dir`, which is made if need be. Files of the same name are replaced.
pub fn install(dir: &Path) -> Result<(), RuntimeError> {
    Archive::open(embedded::RUNTIME)?.extract_into(dir)
}

/// Writes the patched source tree into `dir`, which is made if need be.
pub fn write_source(dir: &Path) -> Result<(), RuntimeError> {
    Archive::open(embedded::SOURCE)?.extract_into(dir)
}

/// The folder of the runtime to use: `chosen` if given, else the embedded one in the user's cache.
pub fn directory(chosen: Option<&Path>) -> Result<PathBuf, RuntimeError> {
    if let Some(path) = chosen {
        let missing = library_file("mtmd");
        if !path.join(&missing).is_file() {
            return Err(RuntimeError::NotARuntime { path: path.to_path_buf(), missing });
        }
        return Ok(path.to_path_buf());
    }
    cached(embedded::RUNTIME, &cache_dir()?)
}

/// The folder below `cache` that holds the extracted `archive`, named by its digest.
fn cached(archive: Option<&'static [u8]>, cache: &Path) -> Result<PathBuf, RuntimeError> {
    let bytes = archive.ok_or(RuntimeError::NotEmbedded)?;
    let digest = hex(&Sha256::digest(bytes)[..8]);
    let dir = cache.join(format!("runtime-{digest}"));
    let archive = Archive::open(Some(bytes))?;
    if !archive.is_extracted(&dir) {
        archive.extract_into(&dir)?;
    }
    Ok(dir)
}

/// Where this program keeps what it can make again.
///
/// # Errors
/// No variable says where the user's cache folder is.
pub fn cache_dir() -> Result<PathBuf, RuntimeError> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = if cfg!(windows) {
        variable("LOCALAPPDATA").ok_or(RuntimeError::NoCache("LOCALAPPDATA is not set"))?
    } else if let Some(dir) = variable("XDG_CACHE_HOME").filter(|dir| dir.is_absolute()) {
        dir
    } else {
        let home = variable("HOME").ok_or(RuntimeError::NoCache("neither XDG_CACHE_HOME nor HOME is set"))?;
        home.join(if cfg!(target_os = "macos") { "Library/Caches" } else { ".cache" })
    };
    Ok(base.join("mbq-convert"))
}

/// The file name of library `name` (`mtmd`, `llama`, `ggml`) on this system.
pub fn library_file(name: &str) -> String {
    format!("{}{name}{}", if cfg!(windows) { "" } else { std::env::consts::DLL_PREFIX }, std::env::consts::DLL_SUFFIX)
}

/// The file name of tool `name` (`llama-mtmd-cli`) on this system.
pub fn tool_file(name: &str) -> String {
    format!("{name}{}", std::env::consts::EXE_SUFFIX)
}

/// The path of tool `name` in the runtime at `dir`.
pub fn tool(dir: &Path, name: &str) -> Result<PathBuf, RuntimeError> {
    let missing = tool_file(name);
    let path = dir.join(&missing);
    if path.is_file() { Ok(path) } else { Err(RuntimeError::NotARuntime { path: dir.to_path_buf(), missing }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive of one tool, as build.rs packs them.
    pub(super) fn example() -> Vec<u8> {
        use std::io::Write;
        let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default().unix_permissions(0o755);
        for (name, text) in [("tool", "#!/bin/sh\necho ran\n"), ("sub/data", "data")] {
            writer.start_file(name, options).unwrap();
            writer.write_all(text.as_bytes()).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    #[test]
    fn the_cache_is_filled_once_by_many_threads_and_mended() {
        let bytes: &'static [u8] = example().leak();
        let cache = tempfile::tempdir().unwrap();
        let dirs: Vec<PathBuf> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..8).map(|_| scope.spawn(|| cached(Some(bytes), cache.path()).unwrap())).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        assert!(dirs.iter().all(|dir| dir == &dirs[0]));
        assert_eq!(std::fs::read_to_string(dirs[0].join("sub/data")).unwrap(), "data");
        let left: Vec<_> = std::fs::read_dir(cache.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "temporary folders are gone");
        #[cfg(unix)]
        {
            let output = std::process::Command::new(dirs[0].join("tool")).output().unwrap();
            assert_eq!(output.stdout, b"ran\n");
        }
        // A truncated file is noticed and replaced.
        std::fs::write(dirs[0].join("sub/data"), "da").unwrap();
        cached(Some(bytes), cache.path()).unwrap();
        assert_eq!(std::fs::read_to_string(dirs[0].join("sub/data")).unwrap(), "data");
    }

    #[test]
    fn a_folder_without_libraries_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = directory(Some(dir.path())).unwrap_err().to_string();
        assert!(error.contains(&library_file("mtmd")), "{error}");
        assert!(tool(dir.path(), "llama-bench").unwrap_err().to_string().contains("llama-bench"));
        assert!(matches!(cached(None, dir.path()), Err(RuntimeError::NotEmbedded)));
    }
}

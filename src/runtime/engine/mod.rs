//! The installed runtime as an evaluation sees it: pictures to embeddings, prompts to logits.
//!
//! [`Runtime`] is the loaded library, [`Vision`] tokenises prompts and embeds pictures with the
//! projector, [`Decoder`] runs one text model. All unsafe calls of the evaluation are here. Each
//! safe type owns its pointers, which are non-null once it exists and freed when it is dropped.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, Mutex};

use crate::gguf::{GgufFile, ReadError};
use crate::runtime::{assumed, sys};

mod decoder;
mod model;
mod sequences;
mod vision;

pub use decoder::{Decoder, Times};
pub use model::Model;
pub use sequences::{BatchEntry, Sequences};
pub use vision::{Chunks, Media, Piece, Place, Vision};

/// A token id.
pub type Token = i32;

/// What the runtime refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    #[error(transparent)]
    File(#[from] ReadError),
    #[error("cannot load the runtime from {path}: {what}; {}", remedy(what))]
    Runtime { path: PathBuf, what: String },
    #[error("the runtime cannot load {path}: {log}")]
    Model { path: PathBuf, log: String },
    #[error("the runtime cannot use {path} with {model}: {log}")]
    Projector { path: PathBuf, model: PathBuf, log: String },
    #[error("the runtime cannot use picture {path}: {log}")]
    Picture { path: PathBuf, log: String },
    #[error("{what}: {log}")]
    Call { what: &'static str, log: String },
    #[error("the runtime in {runtime} finds no device {wanted}, but: {found}")]
    Device { wanted: String, runtime: PathBuf, found: String },
    #[error("{0} is not a path the runtime can take: it holds a zero byte or is not UTF-8")]
    Path(PathBuf),
}

/// What helps where the loader says `what`. A copy of the same libraries asks for the same system.
fn remedy(what: &str) -> &'static str {
    if what.contains("version `") {
        "this system is older than the one that the runtime was built on: use one that was built here (--runtime DIR)"
    } else if what.contains("libgomp") {
        "install it (Debian, Ubuntu: libgomp1), or use a program built with MBQ_PORTABLE=1, which needs none"
    } else {
        "install one with `mbq-convert runtime install`"
    }
}

/// What llama.cpp said last at warning level and above; it says why a call failed only there.
static LOG: Mutex<Vec<String>> = Mutex::new(Vec::new());

unsafe extern "C" fn keep_log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() || (level != sys::GGML_LOG_LEVEL_ERROR && level != sys::GGML_LOG_LEVEL_WARN) {
        return;
    }
    // SAFETY: llama.cpp hands over a C string that lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned();
    if let Ok(mut log) = LOG.lock() {
        if log.len() >= 8 {
            log.remove(0);
        }
        log.push(text);
    }
}

/// The files that were given to llama.cpp, for [`on_abort`].
static FILES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Refuses a file that llama.cpp would not survive, and remembers one that it gets.
fn check(path: &Path) -> Result<(), EngineError> {
    assumed::check(&GgufFile::open(path)?)?;
    let name = path.display().to_string();
    if let Ok(mut files) = FILES.lock()
        && !files.contains(&name)
    {
        files.push(name);
    }
    Ok(())
}

/// Ends the program where ggml ends it, as an error and not as a crash: what is half written has no name yet.
unsafe extern "C" fn on_abort(message: *const c_char) {
    unsafe extern "C" {
        fn _exit(status: std::ffi::c_int) -> !;
    }
    // SAFETY: ggml hands over a C string that lives for the call.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    let files = FILES.try_lock().map(|files| files.join(", ")).unwrap_or_default();
    eprintln!(
        "error: llama.cpp gave up ({message}) on one of {files}: it is damaged, or no model that it can run; `mbq-convert inspect --verify` checks a file"
    );
    // SAFETY: it may be called at any time. Other threads are still inside of the library: exit() would take it from them.
    unsafe { _exit(1) }
}

fn take_log() -> String {
    let lines = LOG.lock().map(|mut l| std::mem::take(&mut *l)).unwrap_or_default();
    if lines.is_empty() { "no reason given".into() } else { lines.join("; ") }
}

/// The loaded library.
pub struct Runtime {
    lib: sys::Mtmd,
    dir: PathBuf,
    /// The device that models run on, by ggml's name; without one llama.cpp chooses.
    device: Option<CString>,
}

/// How models are run.
#[derive(Debug, Clone, Copy)]
pub struct Compute {
    /// CPU threads.
    pub threads: i32,
    /// Layers on the GPU; negative for all.
    pub gpu_layers: i32,
    /// Tokens computed at once.
    pub batch: u32,
    /// No flash attention and a cache in f32: closest to the exact result; otherwise what llama.cpp's tools do.
    pub exact: bool,
}

impl Runtime {
    /// Loads the libraries of the installed runtime in `dir`.
    ///
    /// # Errors
    /// No library there, or one that lacks a function this version calls.
    pub fn open(dir: &Path) -> Result<Arc<Self>, EngineError> {
        Self::open_on(dir, None)
    }

    /// As [`open`](Self::open), for models on one device: `Vulkan0`, `CUDA0`, as ggml names them.
    ///
    /// # Errors
    /// Also where there is no such device; the error names those that there are.
    pub fn open_on(dir: &Path, device: Option<&str>) -> Result<Arc<Self>, EngineError> {
        let name = crate::runtime::library_file("mtmd");
        let path = [dir.join(&name), dir.join("bin").join(&name), dir.join("lib").join(&name)]
            .into_iter()
            .find(|p| p.is_file())
            .ok_or_else(|| EngineError::Runtime { path: dir.into(), what: format!("there is no {name}") })?;
        let fail = |e: libloading::Error| {
            // The error itself says only that it failed; which library is missing says its source.
            let what = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
            EngineError::Runtime { path: path.clone(), what }
        };
        // SAFETY: the file is llama.cpp's own library, whose initialisers only register things; the bindings are
        // generated from the headers of the pinned version.
        let lib = unsafe { sys::Mtmd::new(&path) }.map_err(fail)?;
        let dir = path.parent().unwrap_or(dir).to_owned();
        let c_dir = c_path(&dir)?;
        // SAFETY: the callback is a plain function without user data; the path outlives the call.
        unsafe {
            lib.ggml_set_abort_callback(Some(on_abort));
            lib.llama_log_set(Some(keep_log), ptr::null_mut());
            lib.mtmd_helper_log_set(Some(keep_log), ptr::null_mut());
            lib.ggml_backend_load_all_from_path(c_dir.as_ptr());
            lib.llama_backend_init();
        }
        take_log();
        let mut runtime = Self { lib, dir, device: None };
        if let Some(wanted) = device {
            let found = runtime.accelerators().into_iter().find(|name| name.as_bytes() == wanted.as_bytes());
            runtime.device = Some(found.ok_or_else(|| runtime.no_device(wanted))?);
        }
        Ok(Arc::new(runtime))
    }

    /// The devices that are not the processor itself, by ggml's names.
    fn accelerators(&self) -> Vec<CString> {
        let lib = &self.lib;
        // SAFETY: indices are below the count; devices and their names live as long as the library.
        unsafe {
            (0..lib.ggml_backend_dev_count())
                .map(|i| lib.ggml_backend_dev_get(i))
                .filter(|device| lib.ggml_backend_dev_type(*device) != sys::GGML_BACKEND_DEVICE_TYPE_CPU)
                .map(|device| CStr::from_ptr(lib.ggml_backend_dev_name(device)).to_owned())
                .collect()
        }
    }

    fn no_device(&self, wanted: &str) -> EngineError {
        let names: Vec<_> = self.accelerators().iter().map(|name| name.to_string_lossy().into_owned()).collect();
        let found = if names.is_empty() { "the processor alone".into() } else { names.join(", ") };
        EngineError::Device { wanted: wanted.into(), runtime: self.dir.clone(), found }
    }

    /// The chosen device, or null.
    fn chosen_device(&self) -> sys::ggml_backend_dev_t {
        // SAFETY: the name is a C string; an unknown one gives null.
        self.device.as_ref().map_or(ptr::null_mut(), |name| unsafe { self.lib.ggml_backend_dev_by_name(name.as_ptr()) })
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Version of llama.cpp, the features of the processor that it uses, and the device if one was chosen.
    pub fn describe(&self) -> String {
        // SAFETY: both return static strings.
        unsafe {
            let text = |p: *const c_char| CStr::from_ptr(p).to_string_lossy().trim().to_owned();
            let on = self.device.as_ref().map_or_else(String::new, |name| format!("; on {}", name.to_string_lossy()));
            format!("llama.cpp {}; {}{on}", text(self.lib.llama_version()), text(self.lib.llama_print_system_info()))
        }
    }
}

/// The path as llama.cpp takes it: its bytes on Unix, UTF-8 elsewhere.
fn c_path(path: &Path) -> Result<CString, EngineError> {
    #[cfg(unix)]
    let bytes = Some(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()));
    #[cfg(not(unix))]
    let bytes = path.to_str().map(str::as_bytes);
    bytes.and_then(|b| CString::new(b).ok()).ok_or_else(|| EngineError::Path(path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_lacks_is_told() {
        let said = |what: &str| EngineError::Runtime { path: "runtime".into(), what: what.into() }.to_string();
        let older = "/lib/libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by libmtmd.so)";
        assert!(said(older).contains("older than") && !said(older).contains("runtime install"), "{}", said(older));
        assert!(said("libgomp.so.1: cannot open shared object file: No such file or directory").contains("libgomp1"));
        assert!(said("there is no libmtmd.so").ends_with("`mbq-convert runtime install`"));
    }
}

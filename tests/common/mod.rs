//! What the tests that run llama.cpp share.
#![allow(dead_code)] // not every test uses all of it
pub mod compared;
pub mod served;

use mbq_convert::runtime;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The root of this package.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The runtime to test: `MBQ_RUNTIME` if set, else the embedded one; none in a build without it.
pub fn runtime_dir() -> Option<PathBuf> {
    let chosen = std::env::var_os("MBQ_RUNTIME").map(PathBuf::from);
    if chosen.is_none() && !cfg!(feature = "runtime") {
        eprintln!("skipped: built without the runtime, and MBQ_RUNTIME is not set");
        return None;
    }
    Some(runtime::directory(chosen.as_deref()).unwrap())
}

/// Converts `checkpoint` by rounding to nearest and returns the language model's path, in `folder`.
pub fn convert(checkpoint: &Path, kind: &str, folder: &Path) -> PathBuf {
    let model = folder.join("model.gguf");
    let output = Command::new(env!("CARGO_BIN_EXE_mbq-convert"))
        .arg(checkpoint)
        .args(["--method", "rtn", "--quiet", "--type", kind, "-o"])
        .arg(&model)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    model
}

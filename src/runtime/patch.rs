//! Applies this program's changes to somebody's llama.cpp checkout: all of them, or none.
use super::{RuntimeError, hunks};
use crate::gguf::{GgufError, Output};
use std::fs;
use std::path::Path;

macro_rules! embedded {
    ($folder:literal: $($name:literal),+ $(,)?) => {
        [$(($name, include_str!(concat!("../../patches/", $folder, $name)))),+]
    };
}

/// Name and text of every patch, in their order.
const PATCHES: [(&str, &str); 10] = embedded!["":
    "0001-mtmd-llava-onevision.patch",
    "0002-mbq3.patch",
    "0003-mbq3-cuda.patch",
    "0004-mtmd-cli.patch",
    "0005-mtmd-llava-clip.patch",
    "0006-mtmd-internvl.patch",
    "0007-mtmd-gemma3-idefics3.patch",
    "0008-tower-f16.patch",
    "0009-mbq3-vulkan.patch",
    "0010-qwen2vl-epsilon.patch",
];

/// Path and text of every file of ours.
const FILES: [(&str, &str); 22] = embedded!["files/":
    "ggml/src/ggml-cpu/mbq3/mbq3-kernel.c",
    "ggml/src/ggml-cpu/mbq3/mbq3-kernel.h",
    "ggml/src/ggml-cpu/mbq3/mbq3.c",
    "ggml/src/ggml-cpu/mbq3/mbq3.h",
    "ggml/src/ggml-cuda/linear-f16.cu",
    "ggml/src/ggml-cuda/linear-f16.cuh",
    "ggml/src/ggml-cuda/mbq3-mma.cu",
    "ggml/src/ggml-cuda/mbq3-mma.cuh",
    "ggml/src/ggml-cuda/mbq3-mmq.cuh",
    "ggml/src/ggml-cuda/mbq3-mmvq.cu",
    "ggml/src/ggml-cuda/mbq3-mmvq.cuh",
    "ggml/src/ggml-cuda/mbq3.cuh",
    "ggml/src/ggml-cuda/template-instances/mmq-instance-mbq3.cu",
    "ggml/src/ggml-vulkan/vulkan-shaders/dequant_mbq3.comp",
    "ggml/src/ggml-vulkan/vulkan-shaders/mbq3.glsl",
    "ggml/src/ggml-mbq3.c",
    "ggml/src/ggml-mbq3.h",
    "tools/mtmd/llava-anyres.h",
    "tools/mtmd/models/llava-onevision.cpp",
    "tools/mtmd/models/llava-onevision.h",
    "tools/mtmd/mtmd-image-internvl.h",
    "tools/mtmd/mtmd-image-llava.h",
];

/// What became of a checkout.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Patched {
    /// Files that were changed or added.
    pub changed: Vec<String>,
    /// Files that had the changes already.
    pub present: Vec<String>,
    /// Why nothing was written: a line for each change that does not fit.
    pub failed: Vec<String>,
}

/// Changes the checkout in `dir`; where a change does not fit, nothing is written and [`Patched::failed`] says what.
///
/// # Errors
/// `dir` is no checkout, or cannot be read or written.
pub fn patch(dir: &Path) -> Result<Patched, RuntimeError> {
    if !dir.join("ggml/include/ggml.h").is_file() {
        let missing = "ggml/include/ggml.h".to_string();
        return Err(RuntimeError::NotACheckout { path: dir.into(), missing });
    }
    let (mut done, mut new) = (Patched::default(), Vec::new());
    for (path, edits) in hunks::edits(PATCHES).map_err(RuntimeError::Archive)? {
        let before = read(&dir.join(&path))?;
        match hunks::edited(&path, before.as_deref(), &edits) {
            Ok(after) if before.is_some_and(|before| before == after) => done.present.push(path),
            Ok(after) => new.push((path, after)),
            Err(failures) => done.failed.extend(failures),
        }
    }
    for (path, text) in FILES {
        match read(&dir.join(path))? {
            None => new.push((path.into(), text.into())),
            Some(there) if there == text => done.present.push(path.into()),
            Some(_) => done.failed.push(format!("{path}: another version of it is there")),
        }
    }
    if done.failed.is_empty() {
        write(dir, &new)?;
        done.changed = new.into_iter().map(|(path, _)| path).collect();
    }
    Ok(done)
}

/// The file's text; none where there is no file.
fn read(path: &Path) -> Result<Option<String>, RuntimeError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(RuntimeError::Io { path: path.into(), action: "cannot read", source }),
    }
}

/// Writes all files without names, then puts them in their places, so that a full disk or Ctrl-C leaves the checkout as it is.
fn write(dir: &Path, files: &[(String, String)]) -> Result<(), RuntimeError> {
    let mut outputs = Vec::new();
    for (name, text) in files {
        let path = dir.join(name);
        let parent = path.parent().unwrap_or(dir);
        let failed = |source| RuntimeError::Io { path: parent.into(), action: "cannot make the folder", source };
        fs::create_dir_all(parent).map_err(failed)?;
        outputs.push(output(&path, text).map_err(Box::new)?);
    }
    Ok(Output::publish(outputs).map_err(Box::new)?)
}

/// The file at `path` with another text, and the permissions that it has.
fn output(path: &Path, text: &str) -> Result<Output, GgufError> {
    let mut output = Output::create(path)?;
    output.write(text.as_bytes())?;
    if let Ok(old) = fs::metadata(path) {
        output.permit(old.permissions())?;
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// Files below `dir`, by their paths in it.
    fn below(dir: &Path, root: &Path, out: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => below(&path, root, out),
                false => out.push(path.strip_prefix(root).unwrap().into()),
            }
        }
        out.sort();
    }

    #[test]
    fn every_patch_and_file_is_embedded() {
        let patches = Path::new(env!("CARGO_MANIFEST_DIR")).join("patches");
        let mut found = Vec::new();
        below(&patches, &patches, &mut found);
        let mut known: Vec<PathBuf> = PATCHES.iter().map(|(name, _)| name.into()).collect();
        known.extend(FILES.iter().map(|(name, _)| Path::new("files").join(name)));
        known.sort();
        assert_eq!(found, known);
        assert!(hunks::edits(PATCHES).unwrap().len() > 20);
    }
}

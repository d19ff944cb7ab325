//! Finds the llama.cpp source and makes the patched tree.
//!
//! The tree is the source plus `patches/*.patch` in the order of their names, plus every file below
//! `patches/files` at its own path. Only files whose content differs are written, so that a changed
//! patch recompiles what it touches and nothing else.

#[path = "../src/runtime/hunks.rs"]
mod hunks;

use crate::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The package that carries the pinned source.
const PACKAGE: &str = "llama-cpp-sys-4";

/// What a build of the libraries and tools reads, of all that a checkout holds (`scripts`: llama-server's page).
const TOP_LEVEL: [&str; 10] =
    ["CMakeLists.txt", "LICENSE", "cmake", "common", "ggml", "include", "scripts", "src", "tools", "vendor"];

/// Parts of these folders that no build of ours reads: backends that `patches/` does not know and that
/// most machines lack, and test media.
const LEFT_OUT: [&str; 16] = [
    "ggml/src/ggml-cann",
    "ggml/src/ggml-et",
    "ggml/src/ggml-hexagon",
    "ggml/src/ggml-opencl",
    "ggml/src/ggml-openvino",
    "ggml/src/ggml-sycl",
    "ggml/src/ggml-virtgpu",
    "ggml/src/ggml-webgpu",
    "ggml/src/ggml-zdnn",
    "ggml/src/ggml-zendnn",
    "tools/mtmd/legacy-models",
    "tools/mtmd/tests",
    "tools/mtmd/test-1.jpeg",
    "tools/mtmd/test-2.mp3",
    "tools/mtmd/test-3.mp4",
    "tools/ui/node_modules",
];

/// Brings `tree` to the patched state of the source that this build uses.
pub fn prepare(manifest_dir: &Path, tree: &Path) -> Result<()> {
    println!("cargo::rerun-if-env-changed=MBQ_LLAMA_CPP_DIR");
    println!("cargo::rerun-if-changed=Cargo.lock");
    let source = find(manifest_dir, std::env::var_os("MBQ_LLAMA_CPP_DIR"))?;
    let patches = manifest_dir.join("patches");
    println!("cargo::rerun-if-changed={}", patches.display());
    patch(&source, &patches, tree)
}

/// Brings `tree` to the state of `source` with `patches` applied.
pub fn patch(source: &Path, patches: &Path, tree: &Path) -> Result<()> {
    let mut files = BTreeSet::new();
    for name in TOP_LEVEL {
        list(source, Path::new(name), &mut files)?;
    }
    let patched = patched_files(source, patches)?;
    for path in patched.keys() {
        files.insert(path.clone());
    }
    for relative in &files {
        let content = match patched.get(relative) {
            Some(content) => content.clone(),
            None => read(&source.join(relative))?,
        };
        write_if_changed(&tree.join(relative), &content)?;
    }

    let mut present = BTreeSet::new();
    list(tree, Path::new(""), &mut present)?;
    for relative in present {
        if !files.contains(&relative) {
            let path = tree.join(&relative);
            fs::remove_file(&path).map_err(|e| format!("{}: cannot remove: {e}", path.display()))?;
        }
    }
    Ok(())
}

/// The folder of the unpatched source: `chosen`, if set, or the locked package's.
pub fn find(manifest_dir: &Path, chosen: Option<OsString>) -> Result<PathBuf> {
    if let Some(dir) = chosen.filter(|dir| !dir.is_empty()) {
        let dir = PathBuf::from(dir);
        if !dir.join("ggml/include/ggml.h").is_file() {
            return Err(format!(
                "MBQ_LLAMA_CPP_DIR={}: no ggml/include/ggml.h in it; it has to name the top folder of a llama.cpp checkout",
                dir.display()
            ));
        }
        // A path that is not there would make cargo build again every time.
        for path in TOP_LEVEL.map(|name| dir.join(name)).iter().filter(|path| path.exists()) {
            println!("cargo::rerun-if-changed={}", path.display());
        }
        return Ok(dir);
    }
    let offline = package_dir(manifest_dir, true);
    let dir = match offline {
        Ok(dir) => dir,
        Err(first) => package_dir(manifest_dir, false).map_err(|second| {
            format!(
                "the llama.cpp source (package {PACKAGE}) was not found.\n\
                 Run `cargo fetch --locked` (without --target) once with a network connection, \
                 or set MBQ_LLAMA_CPP_DIR to a llama.cpp checkout.\n\
                 offline: {first}\nonline: {second}"
            )
        })?,
    };
    let source = dir.join("llama.cpp");
    if source.join("ggml/include/ggml.h").is_file() {
        Ok(source)
    } else {
        Err(format!("{}: no llama.cpp source in this package", dir.display()))
    }
}

/// Asks cargo where the locked package lies (and to download it, when not `offline`).
fn package_dir(manifest_dir: &Path, offline: bool) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["metadata", "--format-version", "1", "--locked", "--manifest-path"]);
    command.arg(manifest_dir.join("Cargo.toml"));
    if offline {
        command.arg("--offline");
    }
    let output = command.output().map_err(|e| format!("cargo metadata does not start: {e}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).map_err(|e| format!("cargo metadata printed invalid JSON: {e}"))?;
    metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == PACKAGE)
        .and_then(|package| package["manifest_path"].as_str())
        .and_then(|path| Path::new(path).parent())
        .map(Path::to_path_buf)
        .ok_or_else(|| format!("cargo metadata lists no package {PACKAGE}"))
}

/// Files that patches and overlays make or change, by path in the tree. What has the changes already (`mbq-convert runtime
/// patch` made them) stays as it is.
fn patched_files(source: &Path, patches: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut changed = BTreeMap::new();
    let texts = patch_texts(patches)?;
    let mut failed = Vec::new();
    for (path, edits) in hunks::edits(texts.iter().map(|(name, text)| (name.as_str(), text.as_str())))? {
        let at = source.join(&path);
        let before = if at.exists() { Some(read_text(&at)?) } else { None };
        match hunks::edited(&path, before.as_deref(), &edits) {
            Ok(after) => drop(changed.insert(path.into(), after.into_bytes())),
            Err(failures) => failed.extend(failures),
        }
    }
    if !failed.is_empty() {
        let what = failed.join("\n");
        return Err(format!(
            "{}: another llama.cpp than the patches are made for (see vendor/README.md)\n{what}",
            source.display()
        ));
    }
    let overlay = patches.join("files");
    if overlay.is_dir() {
        let mut own = BTreeSet::new();
        list(&overlay, Path::new(""), &mut own)?;
        for relative in own {
            let content = read(&overlay.join(&relative))?;
            changed.insert(relative, content);
        }
    }
    Ok(changed)
}

/// Name and text of `patches/*.patch`, in the order of their names.
fn patch_texts(patches: &Path) -> Result<BTreeMap<String, String>> {
    if !patches.is_dir() {
        return Ok(BTreeMap::new());
    }
    fs::read_dir(patches)
        .map_err(|e| format!("{}: {e}", patches.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "patch"))
        .map(|path| Ok((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), read_text(&path)?)))
        .collect()
}

/// Adds every file at or below `root/relative` to `files`, by its path below `root`.
fn list(root: &Path, relative: &Path, files: &mut BTreeSet<PathBuf>) -> Result<()> {
    if LEFT_OUT.iter().any(|path| relative == Path::new(path)) {
        return Ok(());
    }
    let path = root.join(relative);
    if path.is_file() {
        files.insert(relative.to_path_buf());
    } else if path.is_dir() {
        let entries = fs::read_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        for entry in entries {
            let entry = entry.map_err(|e| format!("{}: {e}", path.display()))?;
            if entry.file_name() != ".git" {
                list(root, &relative.join(entry.file_name()), files)?;
            }
        }
    }
    Ok(())
}

/// Every file of a prepared tree, by its path in it.
#[cfg(feature = "runtime")]
pub fn list_all(tree: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    list(tree, Path::new(""), &mut files)?;
    Ok(files)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Writes `content` unless the file already holds it; keeps the time stamp in that case.
pub fn write_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|e| format!("{}: {e}", parent.display()))?;
    }
    fs::write(path, content).map_err(|e| format!("{}: cannot write: {e}", path.display()))
}

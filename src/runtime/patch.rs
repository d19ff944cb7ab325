//! Applies this program's changes to somebody's llama.cpp checkout: all of them, or none.
use super::RuntimeError;
use crate::gguf::{GgufError, Output};
use diffy::patch_set::{FileOperation, ParseOptions, PatchSet};
use diffy::{Hunk, Line, Patch};
use std::collections::BTreeMap;
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

type Edits = BTreeMap<String, Vec<(&'static str, Patch<'static, str>)>>;

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
    for (path, edits) in edits().map_err(RuntimeError::Archive)? {
        let before = match read(&dir.join(&path))? {
            Some(text) => text,
            None => {
                done.failed.push(format!("{path}: is not there; {} changes it", names(&edits)));
                continue;
            }
        };
        if is_applied(&before, &edits) {
            done.present.push(path);
        } else {
            match apply(&before, &edits) {
                Ok(after) => new.push((path, after)),
                Err(failures) => done.failed.extend(failures.into_iter().map(|what| format!("{path}: {what}"))),
            }
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

/// The patches by the file that they change.
fn edits() -> Result<Edits, String> {
    let mut edits = Edits::new();
    for (name, text) in PATCHES {
        for file in PatchSet::parse(text, ParseOptions::gitdiff()) {
            let file = file.map_err(|e| format!("{name}: {e}"))?;
            let path = match file.operation().strip_prefix(1) {
                FileOperation::Modify { modified, .. } => modified.to_string(),
                _ => return Err(format!("{name}: it does more than change files")),
            };
            let patch = file.patch().as_text().ok_or_else(|| format!("{name}: {path} is not text"))?.clone();
            edits.entry(path).or_default().push((name, patch));
        }
    }
    Ok(edits)
}

fn names(edits: &[(&str, Patch<str>)]) -> String {
    edits.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// Whether a file is what the edits make: they can all be taken back, and lead here again.
fn is_applied(text: &str, edits: &[(&str, Patch<str>)]) -> bool {
    let back = edits.iter().rev().try_fold(text.to_owned(), |text, (_, patch)| diffy::apply(&text, &patch.reverse()));
    let again = back.ok().and_then(|text| apply(&text, edits).ok());
    again.is_some_and(|again| again == text)
}

/// The text with all edits, or what does not fit.
fn apply(text: &str, edits: &[(&str, Patch<str>)]) -> Result<String, Vec<String>> {
    let (mut text, mut failures) = (text.to_owned(), Vec::new());
    for (name, patch) in edits {
        match diffy::apply(&text, patch) {
            Ok(after) => text = after,
            Err(error) => {
                let hunks = patch.hunks();
                let before = failures.len();
                for (i, hunk) in hunks.iter().enumerate() {
                    let [old, new] = sides(hunk);
                    if text.contains(&old) {
                        // What comes after is judged with the changes that fit.
                        text = text.replacen(&old, &new, 1);
                    } else {
                        let at = hunk.old_range().start();
                        let place = hunk.function_context().map_or(String::new(), |c| format!(", {}", c.trim()));
                        failures.push(format!(
                            "{name}, hunk {} of {} (line {at}{place}) does not fit",
                            i + 1,
                            hunks.len()
                        ));
                    }
                }
                if failures.len() == before {
                    failures.push(format!("{name}: {error}"));
                }
            }
        }
    }
    if failures.is_empty() {
        return Ok(text);
    }
    if text.contains("\r\n") {
        failures = vec!["it has lines that end in CR LF; clone with `git -c core.autocrlf=false clone …`".into()];
    }
    Err(failures)
}

/// The lines of a hunk before and after.
fn sides(hunk: &Hunk<str>) -> [String; 2] {
    let mut sides = [String::new(), String::new()];
    for line in hunk.lines() {
        let (text, of) = match line {
            Line::Context(text) => (text, [true, true]),
            Line::Delete(text) => (text, [true, false]),
            Line::Insert(text) => (text, [false, true]),
        };
        sides.iter_mut().zip(of).filter(|(_, of)| *of).for_each(|(side, _)| side.push_str(text));
    }
    sides
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
        assert!(edits().unwrap().len() > 20);
    }

    #[test]
    fn hunks_that_do_not_fit_are_named_one_by_one() {
        let text = "--- a/f\n+++ b/f\n@@ -1,2 +1,3 @@\n a\n+new\n b\n@@ -5,2 +6,2 @@ fn place()\n e\n-f\n+F\n";
        let edits = [("0001.patch", Patch::from_str(text).unwrap())];
        let old = "a\nb\nc\nd\ne\nf\n";
        let new = apply(old, &edits).unwrap();
        assert_eq!(new, "a\nnew\nb\nc\nd\ne\nF\n");
        assert!(is_applied(&new, &edits) && !is_applied(old, &edits));
        let said = apply("a\nb\nc\nd\ne\nother\n", &edits).unwrap_err();
        assert_eq!(said, ["0001.patch, hunk 2 of 2 (line 5, fn place()) does not fit"]);
        assert_eq!(apply("x\ny\n", &edits).unwrap_err().len(), 2);
        assert!(apply(&old.replace('\n', "\r\n"), &edits).unwrap_err()[0].contains("CR LF"));
    }
}

//! `mbq-convert bundle`: a model with everything that answers with it, in a folder or a zip file, to carry to a machine
//! that has nothing: the program, its llama.cpp, the GGUF files, a script to start and a text to read.
mod libraries;
mod start;

use crate::digest::file_name;
use crate::events::{Event, Observer};
use crate::gguf::{GgufError, GgufFile, ReadError, check_pair};
use crate::record::ConversionRecord;
use crate::runtime::engine::EngineError;
use crate::runtime::{RuntimeError, tool_file};
pub use start::System;
use start::{Guide, Launcher};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use zip::write::SimpleFileOptions;

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    #[error("{path}: {problem}")]
    Unfit { path: PathBuf, problem: String },
    #[error("{path}: {action}: {source}")]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    #[error("{path}: cannot write the zip file: {source}")]
    Zip { path: PathBuf, source: zip::result::ZipError },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl BundleError {
    fn unfit(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        BundleError::Unfit { path: path.into(), problem: problem.into() }
    }

    fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| BundleError::Io { path: path.into(), action, source }
    }

    fn unwritten(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        Self::io(path, "cannot write")
    }
}

/// What goes into a bundle.
#[derive(Debug, Clone, Copy)]
pub struct Sources<'a> {
    /// The language model's file, of a split model the first.
    pub model: &'a Path,
    pub mmproj: &'a Path,
    /// Folder of llama.cpp's libraries.
    pub runtime: &'a Path,
    /// mbq-convert itself.
    pub program: &'a Path,
}

#[derive(Debug)]
enum Content {
    File(PathBuf),
    Text(String),
}

#[derive(Debug)]
struct Entry {
    /// Below the bundle's folder, with `/`.
    name: String,
    content: Content,
    bytes: u64,
    executable: bool,
    /// Weights do not get smaller.
    deflate: bool,
}

/// A bundle, to be written.
#[derive(Debug)]
pub struct Bundle {
    entries: Vec<Entry>,
    /// What somebody who passes it on should know.
    pub notes: Vec<String>,
}

/// Copied at a time.
const PIECE: usize = 1 << 20;

impl Bundle {
    /// Collects the files and checks that they go together.
    ///
    /// # Errors
    /// A file that cannot be read or is none of the kind, a shard that is missing, a vision file of another model, a
    /// runtime that does not load, a file's name that a script cannot have.
    pub fn new(sources: &Sources) -> Result<Self, BundleError> {
        let model = GgufFile::open(sources.model)?;
        if model.architecture() == "clip" {
            return Err(BundleError::unfit(
                sources.model,
                "is a vision file; give the language model, it is found beside it",
            ));
        }
        let mmproj = GgufFile::open(sources.mmproj)?;
        if mmproj.architecture() != "clip" {
            return Err(BundleError::unfit(sources.mmproj, "is no vision file (mmproj); --mmproj names it"));
        }
        check_pair(sources.model, sources.mmproj)?;

        let system = System::here();
        let mut bundle = Bundle { entries: Vec::new(), notes: Vec::new() };
        let program = tool_file("mbq-convert");
        bundle.file(&program, sources.program, true)?;
        let portable = bundle.runtime(sources.runtime)?;
        let carried = libraries::of_system(sources.runtime)?;
        for library in &carried.files {
            // The program's own are used only where the other machine has none; the runtime finds OpenMP beside itself.
            let folder = if file_name(library).starts_with("libgomp") { "runtime" } else { "lib" };
            bundle.file(&format!("{folder}/{}", file_name(library)), library, true)?;
        }
        for (path, _) in model.contents().iter().chain(&mmproj.contents()) {
            bundle.weights(path)?;
        }
        if let Ok(Some((path, _))) = ConversionRecord::beside(sources.model) {
            bundle.file(&format!("model/{}", file_name(&path)), &path, false)?;
        }
        let guide = Guide {
            system,
            name: crate::gguf::ShardName::stem_of(sources.model),
            base: model.metadata.str("general.source.huggingface.repository").map(String::from),
            license: license(&model),
            portable,
            glibc: libraries::newest_glibc(bundle.binaries())?,
            carried: carried.files.iter().map(|path| file_name(path)).collect(),
            missing: carried.missing,
        };
        bundle.notes = guide.notes();
        let launcher = Launcher {
            program: &program,
            model: &file_name(sources.model),
            mmproj: &file_name(sources.mmproj),
            name: &guide.name,
        };
        for (name, text, executable) in launcher.scripts(system) {
            bundle.text(name, text, executable);
        }
        bundle.text("README.txt".into(), guide.text(&bundle.listing()), false);
        bundle.text("LICENSE.txt".into(), start::LICENSES.into(), false);
        Ok(bundle)
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }

    fn text(&mut self, name: String, text: String, executable: bool) {
        self.entries.push(Entry {
            name,
            bytes: text.len() as u64,
            content: Content::Text(text),
            executable,
            deflate: true,
        });
    }

    fn file(&mut self, name: &str, path: &Path, executable: bool) -> Result<(), BundleError> {
        let about = std::fs::metadata(path).map_err(BundleError::io(path, "cannot read"))?;
        let content = Content::File(path.into());
        self.entries.push(Entry { name: name.into(), content, bytes: about.len(), executable, deflate: true });
        Ok(())
    }

    fn weights(&mut self, path: &Path) -> Result<(), BundleError> {
        let plain = |name: &&str| !name.contains(|c: char| c.is_control() || "\"\\".contains(c));
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(plain) else {
            return Err(BundleError::unfit(path, "has a name that a start script cannot have; rename it"));
        };
        let name = format!("model/{name}");
        if self.entries.iter().any(|entry| entry.name == name) {
            return Err(BundleError::unfit(path, "is named as another of the bundle's files; rename it"));
        }
        self.file(&name, path, false)?;
        self.entries.last_mut().into_iter().for_each(|entry| entry.deflate = false);
        Ok(())
    }

    /// The runtime's libraries, and the one tool that `chat` uses. Whether they are for any processor.
    fn runtime(&mut self, dir: &Path) -> Result<bool, BundleError> {
        let list = std::fs::read_dir(dir).map_err(BundleError::io(dir, "cannot list the folder"))?;
        let mut names: Vec<String> = list.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        // What tools share with nobody is called lib…-impl.
        let wanted =
            |name: &&String| is_library(name) && !name.contains("-impl.") || **name == tool_file("llama-mtmd-cli");
        for name in names.iter().filter(wanted) {
            self.file(&format!("runtime/{name}"), &dir.join(name), true)?;
        }
        // One library for each generation of processors, or one for all.
        Ok(names.iter().any(|name| name.contains("ggml-cpu-")))
    }

    /// What always runs: `lib/` is for machines without libraries of their own.
    fn binaries(&self) -> impl Iterator<Item = &Path> {
        self.entries.iter().filter(|entry| entry.executable && !entry.name.starts_with("lib/")).filter_map(|entry| {
            match &entry.content {
                Content::File(path) => Some(path.as_path()),
                Content::Text(_) => None,
            }
        })
    }

    /// Names and bytes of the files.
    fn listing(&self) -> Vec<(String, u64)> {
        self.entries.iter().map(|entry| (entry.name.clone(), entry.bytes)).collect()
    }

    /// Writes the bundle as the folder `output`, or as a zip file where its name ends in `.zip`; it gets its name when it is
    /// whole.
    ///
    /// # Errors
    /// There is something at `output` already, or it cannot be written.
    pub fn write(&self, output: &Path, observer: &dyn Observer) -> Result<(), BundleError> {
        if output.symlink_metadata().is_ok() {
            return Err(BundleError::unfit(output, "exists; name another output, or remove it"));
        }
        let parent = output.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        observer.event(Event::PhaseStart { name: "bundle".into(), total: self.bytes(), unit: "B" });
        let is_zip = output.extension().is_some_and(|e| e.eq_ignore_ascii_case("zip"));
        let done = if is_zip { self.zip(output, parent, observer) } else { self.folder(output, parent, observer) };
        observer.event(Event::PhaseEnd);
        done
    }

    fn folder(&self, output: &Path, parent: &Path, observer: &dyn Observer) -> Result<(), BundleError> {
        let mut part = tempfile::Builder::new();
        let part = part.prefix(".mbq-").suffix(".part").tempdir_in(parent).map_err(BundleError::unwritten(output))?;
        for entry in &self.entries {
            let path = part.path().join(&entry.name);
            let folder = path.parent().unwrap_or(part.path());
            std::fs::create_dir_all(folder).map_err(BundleError::unwritten(folder))?;
            let mut file = File::create(&path).map_err(BundleError::unwritten(&path))?;
            entry.copy(&mut file, observer, BundleError::unwritten(&output.join(&entry.name)))?;
            permit(&path, if entry.executable { 0o755 } else { 0o644 })?;
        }
        permit(part.path(), 0o755)?;
        std::fs::rename(part.path(), output).map_err(BundleError::unwritten(output))?;
        // It has its new name; there is nothing left to remove.
        let _ = part.keep();
        Ok(())
    }

    fn zip(&self, output: &Path, parent: &Path, observer: &dyn Observer) -> Result<(), BundleError> {
        let failed = |source| BundleError::Zip { path: output.into(), source };
        // What it unpacks into.
        let top = output.file_stem().and_then(|stem| stem.to_str()).filter(|stem| !stem.is_empty());
        let top = top.ok_or_else(|| BundleError::unfit(output, "has a name that is not UTF-8; name another output"))?;
        let part = tempfile::Builder::new().prefix(".mbq-").suffix(".part").tempfile_in(parent);
        let part = part.map_err(BundleError::unwritten(output))?;
        let mut zip = zip::ZipWriter::new(part.as_file());
        for entry in &self.entries {
            let method = if entry.deflate { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
            let options = SimpleFileOptions::default()
                .compression_method(method)
                // The same bytes for the same files.
                .last_modified_time(zip::DateTime::default())
                .large_file(entry.bytes >= u64::from(u32::MAX))
                .unix_permissions(if entry.executable { 0o755 } else { 0o644 });
            zip.start_file(format!("{top}/{}", entry.name), options).map_err(failed)?;
            entry.copy(&mut zip, observer, BundleError::unwritten(output))?;
        }
        zip.finish().map_err(failed)?;
        permit(part.path(), 0o644)?;
        part.persist_noclobber(output).map_err(|e| BundleError::unwritten(output)(e.error))?;
        Ok(())
    }
}

impl Entry {
    /// Writes the content, which must be as long as it was, piece by piece.
    fn copy(
        &self,
        out: &mut impl Write,
        observer: &dyn Observer,
        failed: impl FnOnce(std::io::Error) -> BundleError,
    ) -> Result<(), BundleError> {
        let detail = || file_name(Path::new(&self.name));
        let path = match &self.content {
            Content::Text(text) => {
                out.write_all(text.as_bytes()).map_err(failed)?;
                observer.event(Event::Advance { n: self.bytes, detail: detail() });
                return Ok(());
            }
            Content::File(path) => path,
        };
        let mut file = File::open(path).map_err(BundleError::io(path, "cannot read"))?;
        let (mut piece, mut copied) = (vec![0; PIECE], 0u64);
        loop {
            let n = file.read(&mut piece).map_err(BundleError::io(path, "cannot read"))?;
            if n == 0 {
                break;
            }
            if let Err(error) = out.write_all(&piece[..n]) {
                return Err(failed(error));
            }
            copied += n as u64;
            observer.event(Event::Advance { n: n as u64, detail: detail() });
        }
        if copied != self.bytes {
            return Err(BundleError::unfit(path, "changed while it was copied; begin again"));
        }
        Ok(())
    }
}

/// Sets permissions where there are such.
fn permit(path: &Path, mode: u32) -> Result<(), BundleError> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
            .map_err(BundleError::io(path, "cannot set permissions"))?;
    }
    #[cfg(not(unix))]
    let _ = (path, mode);
    Ok(())
}

/// The model's licence in a line, as its file has it.
fn license(model: &GgufFile) -> Option<String> {
    let key = |name: &str| model.metadata.str(&format!("general.license{name}")).filter(|text| !text.is_empty());
    let name = key(".name").or(key(""))?;
    Some(key(".link").map_or_else(|| name.to_owned(), |link| format!("{name} ({link})")))
}

/// Whether a file is a shared library by its name: `libllama.so.0` is one, too.
fn is_library(name: &str) -> bool {
    name.contains(".so.") || [".so", ".dylib", ".dll"].iter().any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    #[test]
    fn libraries_are_told_by_their_names() {
        let names = [
            "libllama.so",
            "libllama.so.0",
            "libgomp.so.1.0.0",
            "libggml.dylib",
            "llama.dll",
            "llama-mtmd-cli",
            "a.sol",
        ];
        assert_eq!(names.map(super::is_library), [true, true, true, true, true, false, false]);
    }
}

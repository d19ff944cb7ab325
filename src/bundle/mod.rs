//! `mbq-convert bundle`: a model with everything that answers with it, in a folder or a zip file, to carry to a machine
//! that has nothing: the program, its llama.cpp, the GGUF files, a script to start and a text to read.
mod libraries;
mod start;
mod until_failure;

use crate::digest::file_name;
use crate::events::{Event, Observer};
use crate::gguf::{GgufError, GgufFile, Output, ReadError, check_pair, folder_of};
use crate::record::ConversionRecord;
use crate::runtime::engine::EngineError;
use crate::runtime::{RuntimeError, tool_file};
pub use start::System;
use start::{Guide, Launcher};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use until_failure::UntilFailure;
use zip::write::SimpleFileOptions;

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    #[error("{path}: {problem}")]
    Unfit { path: PathBuf, problem: String },
    #[error("{path}: {action}: {source}{}", crate::error::advice(source))]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    #[error("{path}: cannot write the zip file: {source}")]
    Zip { path: PathBuf, source: zip::result::ZipError },
    #[error("{0}: interrupted; nothing of it is left")]
    Interrupted(PathBuf),
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
        if model.is_projector() {
            return Err(BundleError::unfit(
                sources.model,
                "is a vision file; give the language model, it is found beside it",
            ));
        }
        let mmproj = GgufFile::open(sources.mmproj)?;
        if !mmproj.is_projector() {
            return Err(BundleError::unfit(sources.mmproj, "is no vision file (mmproj); --mmproj names it"));
        }
        check_pair(&model, &mmproj)?;

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
    /// whole. Setting `stop` ends it, and nothing is left.
    ///
    /// # Errors
    /// There is something at `output` already, or it cannot be written.
    pub fn write(&self, output: &Path, stop: &AtomicBool, observer: &dyn Observer) -> Result<(), BundleError> {
        is_free(output)?;
        observer.event(Event::PhaseStart { name: "bundle".into(), total: self.bytes(), unit: "B" });
        let is_zip = output.extension().is_some_and(|e| e.eq_ignore_ascii_case("zip"));
        let to = Destination { output, stop, observer };
        let done = if is_zip { self.zip(&to) } else { self.folder(&to) };
        observer.event(Event::PhaseEnd);
        done
    }

    fn folder(&self, to: &Destination) -> Result<(), BundleError> {
        let output = to.output;
        let (parent, mut part) = (folder_of(output)?, tempfile::Builder::new());
        let part = part.prefix(".mbq-").suffix(".part").tempdir_in(parent).map_err(BundleError::unwritten(output))?;
        for entry in &self.entries {
            let path = part.path().join(&entry.name);
            let folder = path.parent().unwrap_or(part.path());
            std::fs::create_dir_all(folder).map_err(BundleError::unwritten(folder))?;
            let mut file = File::create(&path).map_err(BundleError::unwritten(&path))?;
            entry.copy(&mut file, to, BundleError::unwritten(&output.join(&entry.name)))?;
            permit(&path, if entry.executable { 0o755 } else { 0o644 })?;
        }
        permit(part.path(), 0o755)?;
        std::fs::rename(part.path(), output).map_err(BundleError::unwritten(output))?;
        // It has its new name; there is nothing left to remove.
        let _ = part.keep();
        Ok(())
    }

    fn zip(&self, to: &Destination) -> Result<(), BundleError> {
        let output = to.output;
        let failed = |source| BundleError::Zip { path: output.into(), source };
        // What it unpacks into.
        let top = output.file_stem().and_then(|stem| stem.to_str()).filter(|stem| !stem.is_empty());
        let top = top.ok_or_else(|| BundleError::unfit(output, "has a name that is not UTF-8; name another output"))?;
        let mut file = Output::create(output)?;
        let mut zip = zip::ZipWriter::new(UntilFailure::new(file.stream()));
        for entry in &self.entries {
            let method = if entry.deflate { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
            let options = SimpleFileOptions::default()
                .compression_method(method)
                // The same bytes for the same files.
                .last_modified_time(zip::DateTime::default())
                .large_file(entry.bytes >= u64::from(u32::MAX))
                .unix_permissions(if entry.executable { 0o755 } else { 0o644 });
            zip.start_file(format!("{top}/{}", entry.name), options).map_err(failed)?;
            entry.copy(&mut zip, to, BundleError::unwritten(output))?;
        }
        zip.finish().map_err(failed)?;
        is_free(output)?;
        Ok(Output::publish(vec![file])?)
    }
}

/// Where a bundle goes, who may stop it, and who is told.
struct Destination<'a> {
    output: &'a Path,
    stop: &'a AtomicBool,
    observer: &'a dyn Observer,
}

/// Refuses to replace anything.
fn is_free(output: &Path) -> Result<(), BundleError> {
    match output.symlink_metadata() {
        Ok(_) => Err(BundleError::unfit(output, "exists; name another output, or remove it")),
        Err(_) => Ok(()),
    }
}

impl Entry {
    /// Writes the content, which must be as long as it was, piece by piece.
    fn copy(
        &self,
        out: &mut impl Write,
        to: &Destination,
        failed: impl FnOnce(std::io::Error) -> BundleError,
    ) -> Result<(), BundleError> {
        let detail = || file_name(Path::new(&self.name));
        let path = match &self.content {
            Content::Text(text) => {
                out.write_all(text.as_bytes()).map_err(failed)?;
                to.observer.event(Event::Advance { n: self.bytes, detail: detail() });
                return Ok(());
            }
            Content::File(path) => path,
        };
        let mut file = File::open(path).map_err(BundleError::io(path, "cannot read"))?;
        let (mut piece, mut copied) = (vec![0; PIECE], 0u64);
        loop {
            if to.stop.load(Ordering::Relaxed) {
                return Err(BundleError::Interrupted(to.output.into()));
            }
            let n = file.read(&mut piece).map_err(BundleError::io(path, "cannot read"))?;
            if n == 0 {
                break;
            }
            if let Err(error) = out.write_all(&piece[..n]) {
                return Err(failed(error));
            }
            copied += n as u64;
            to.observer.event(Event::Advance { n: n as u64, detail: detail() });
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
    use super::*;

    /// A bundle of a text and a file that is longer than what is copied at a time.
    fn example(dir: &Path) -> Bundle {
        let file = dir.join("weights");
        std::fs::write(&file, vec![7; 3 * PIECE]).unwrap();
        let mut bundle = Bundle { entries: Vec::new(), notes: Vec::new() };
        bundle.text("README.txt".into(), "read".into(), false);
        bundle.file("model/weights", &file, false).unwrap();
        bundle
    }

    /// Sets the flag once a piece of the file is copied.
    struct Stops<'a>(&'a AtomicBool);

    impl Observer for Stops<'_> {
        fn event(&self, event: Event) {
            if matches!(event, Event::Advance { n, .. } if n == PIECE as u64) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
    }

    #[test]
    fn what_is_stopped_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = example(dir.path());
        for name in ["folder", "carry.zip"] {
            let (stop, output) = (AtomicBool::new(false), dir.path().join(name));
            let stopped = bundle.write(&output, &stop, &Stops(&stop)).unwrap_err();
            assert!(matches!(&stopped, BundleError::Interrupted(path) if *path == output), "{stopped}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{name}: the file that was copied alone");
        }
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = example(dir.path());
        for name in ["none/folder", "none/carry.zip"] {
            let failed = bundle.write(&dir.path().join(name), &AtomicBool::new(false), &crate::events::Silent);
            let said = failed.unwrap_err().to_string();
            assert!(said.contains(&format!("no folder {}", dir.path().join("none").display())), "{said}");
        }
    }

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
        assert_eq!(names.map(is_library), [true, true, true, true, true, false, false]);
    }
}

//! A folder, looked at before it is uploaded.
use super::GgufName;
use crate::ModelFileError;
use crate::digest::{FileDigest, file_name};
use crate::front::FrontMatter;
use crate::gguf::{GgufFile, ShardName, belongs};
use crate::inspect::RuntimeNeed;
use crate::record::{ConversionRecord, is_record};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What the hub recommends a file to be at most.
const LARGEST: u64 = 50_000_000_000;

/// Something that is wrong or worth knowing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Whether it is wrong; else it is advice.
    pub wrong: bool,
    pub file: String,
    pub what: String,
}

/// A folder as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// Language models, by the first of their files.
    pub models: usize,
    pub mmprojs: usize,
    pub records: usize,
    pub problems: Vec<Problem>,
}

impl Checked {
    /// Nothing is wrong.
    pub fn passed(&self) -> bool {
        !self.problems.iter().any(|p| p.wrong)
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.file, self.what)
    }
}

/// Whether a text is `org/name`.
pub(super) fn is_repository(id: &str) -> bool {
    id.parse::<crate::hub::HubId>().is_ok_and(|parsed| parsed.revision == "main" && !id.contains('@'))
}

/// A folder under examination.
struct Folder {
    dir: PathBuf,
    /// Of its files, without folders.
    names: Vec<String>,
    /// GGUF files are here that cannot be read: what they would be is not known.
    unread: bool,
    problems: Vec<Problem>,
}

impl Folder {
    fn wrong(&mut self, file: &str, what: impl Into<String>) {
        self.problems.push(Problem { wrong: true, file: file.into(), what: what.into() });
    }

    fn advice(&mut self, file: &str, what: impl Into<String>) {
        self.problems.push(Problem { wrong: false, file: file.into(), what: what.into() });
    }
}

/// Checks that the folder `dir` can be uploaded: names of the convention, whole split sets, an mmproj for every model,
/// sound front matter, files that are those of the records.
///
/// # Errors
/// The folder cannot be read; what is wrong in it is in the result.
pub fn check(dir: &Path) -> Result<Checked, ModelFileError> {
    let list = std::fs::read_dir(dir).map_err(|source| ModelFileError::Read { path: dir.into(), source })?;
    let paths = list.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file());
    let mut names: Vec<String> = paths.map(|path| file_name(&path)).collect();
    names.sort();
    let mut folder = Folder { dir: dir.into(), names, unread: false, problems: Vec::new() };
    let files = folder.open_all();
    let (mmprojs, models): (Vec<GgufFile>, Vec<GgufFile>) = files.into_iter().partition(|f| f.is_projector());
    if models.is_empty() {
        folder.wrong(".", "no language model (.gguf) can be read here");
    }
    models.iter().for_each(|model| folder.name(model));
    folder.pairs(&models, &mmprojs);
    let records = folder.records(&models, &mmprojs)?;
    folder.front_matter(!mmprojs.is_empty());
    Ok(Checked { models: models.len(), mmprojs: mmprojs.len(), records, problems: folder.problems })
}

impl Folder {
    /// Every GGUF file, and every split set by its first.
    fn open_all(&mut self) -> Vec<GgufFile> {
        let mut files = Vec::new();
        let mut sets = BTreeSet::new();
        for name in self.names.clone() {
            if name.ends_with(".part") || name.contains(".mbq-progress") {
                self.wrong(&name, "is left of an interrupted conversion; finish it or delete this");
            }
            if !name.ends_with(".gguf") || name.ends_with("imatrix.gguf") {
                continue;
            }
            let path = self.dir.join(&name);
            let first = match ShardName::parse(&name) {
                Some(shard) => ShardName::path(&path, 1, shard.count as usize),
                None => path,
            };
            if !sets.insert(first.clone()) {
                continue;
            }
            match GgufFile::open(&first) {
                Ok(file) => files.push(file),
                Err(error) => {
                    self.unread = true;
                    self.wrong(&name, error.to_string());
                }
            }
        }
        files
    }

    /// The model's name says what it is.
    fn name(&mut self, model: &GgufFile) {
        let name = file_name(&model.path);
        let suggested = GgufName::suggested(&model.metadata);
        let better = suggested.map_or(String::new(), |s| format!("; by its metadata it would be {s}"));
        match GgufName::parse(&name) {
            Err(what) => self.wrong(&name, format!("its name {what}{better}")),
            Ok(parsed) => {
                let id = model.metadata.u64("general.file_type");
                let promised = parsed.file_type().map(|t| u64::from(t.id()));
                if promised.is_some() && id.is_some() && promised != id {
                    let what =
                        format!("its name says {}, its general.file_type is {}", parsed.encoding, id.unwrap_or(0));
                    self.wrong(&name, format!("{what}{better}"));
                }
            }
        }
        for (path, bytes) in model.contents() {
            if bytes.len() as u64 > LARGEST {
                self.advice(&file_name(path), "is larger than the 50 GB that the hub recommends; --split-max-size 50G");
            }
        }
    }

    /// Every model has a vision file, and every vision file a model.
    fn pairs(&mut self, models: &[GgufFile], mmprojs: &[GgufFile]) {
        let goes = |model: &GgufFile, mmproj: &GgufFile| belongs(&model.metadata, &mmproj.metadata);
        for model in models.iter().filter(|model| !mmprojs.iter().any(|m| goes(model, m))) {
            let what = match mmprojs.len() {
                0 => "has no mmproj*.gguf beside it: without one it sees no pictures",
                _ => "goes with none of the mmproj files here: they were made for other models (mbq.pair differs)",
            };
            self.wrong(&file_name(&model.path), what);
        }
        for mmproj in mmprojs {
            let name = file_name(&mmproj.path);
            if !name.starts_with("mmproj") {
                self.wrong(&name, "is a vision file; programs find it by a name that begins with mmproj");
            }
            if !self.unread && !models.iter().any(|model| goes(model, mmproj)) {
                self.wrong(&name, "goes with none of the models here");
            }
        }
        let ours = models.iter().chain(mmprojs).filter(|f| !RuntimeNeed::of(f).stock).count();
        if ours > 0 && !self.names.iter().any(|name| name == "README.md") {
            self.advice("README.md", "some of these files run only in mbq-convert's llama.cpp: a card should say so");
        }
    }

    /// The files are those of the records. Returns how many records there are.
    fn records(&mut self, models: &[GgufFile], mmprojs: &[GgufFile]) -> Result<usize, ModelFileError> {
        let contents = models.iter().chain(mmprojs).flat_map(|f| f.contents());
        let digests: Vec<FileDigest> = contents.map(|(path, bytes)| FileDigest::of(path, bytes)).collect();
        let mut records = 0;
        let mut listed = BTreeSet::new();
        for name in self.names.clone().iter().filter(|name| is_record(Path::new(name))) {
            records += 1;
            let record = match ConversionRecord::read(&self.dir.join(name)) {
                Ok(record) => record,
                Err(error) => {
                    self.wrong(name, error.to_string());
                    continue;
                }
            };
            if record.files().next().is_none() {
                self.advice(name, "has no digests: an older version wrote it");
            }
            for file in record.files() {
                listed.insert(file.sha256.clone());
                let there = digests.iter().find(|d| d.name == file.name);
                match (digests.iter().any(|d| d.sha256 == file.sha256), there) {
                    (true, _) => (),
                    (false, Some(other)) => {
                        let what = format!("its SHA-256 is {}, the record {name} says {}", other.sha256, file.sha256);
                        self.wrong(&file.name, what);
                    }
                    // It cannot be read, and that was said.
                    (false, None) if self.unread && self.names.contains(&file.name) => (),
                    (false, None) => self.wrong(name, format!("lists {}, which is not here", file.name)),
                }
            }
        }
        if records > 0 {
            for digest in digests.iter().filter(|d| !listed.contains(&d.sha256)) {
                let named_wrong = self.problems.iter().any(|p| p.wrong && p.file == digest.name);
                if !named_wrong {
                    self.advice(&digest.name, "is in no record (.mbq.json) here: its digest cannot be checked");
                }
            }
        } else if !models.is_empty() {
            self.advice(".", "there is no record (.mbq.json): digests cannot be checked");
        }
        Ok(records)
    }

    /// README.md's front matter, as the hub wants it.
    fn front_matter(&mut self, vision: bool) {
        const README: &str = "README.md";
        let text = match std::fs::read(self.dir.join(README)) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) => {
                return self.wrong(README, format!("cannot be read ({e}); `mbq-convert card MODEL.gguf` writes one"));
            }
        };
        let front = match FrontMatter::parse(&text) {
            Ok(Some(front)) => front,
            Ok(None) => return self.wrong(README, "has no front matter between two lines of ---"),
            Err(error) => return self.wrong(README, error),
        };
        let mut keys = BTreeSet::new();
        for (key, _) in &front.0 {
            if !keys.insert(key) {
                self.wrong(README, format!("`{key}` stands twice in the front matter"));
            }
        }
        self.base_model(&front);
        self.license(&front);
        let want = if vision { "image-text-to-text" } else { "text-generation" };
        match front.get("pipeline_tag") {
            [tag] if tag == want => (),
            [] => self.wrong(README, format!("`pipeline_tag` is missing; it is {want}")),
            tags => self.wrong(README, format!("`pipeline_tag` is {}, expected {want}", tags.join(", "))),
        }
        if front.get("library_name").is_empty() {
            self.advice(README, "`library_name` is missing; it is gguf");
        }
        for language in front.get("language") {
            let (code, rest) = language.split_once('-').unwrap_or((language, "x"));
            let letters = (2..=3).contains(&code.len()) && code.bytes().all(|b| b.is_ascii_lowercase());
            let known = letters && !rest.is_empty() || matches!(language.as_str(), "multilingual" | "code");
            if !known {
                self.wrong(README, format!("`language` has {language:?}, which is no ISO 639 code such as en"));
            }
        }
    }

    fn base_model(&mut self, front: &FrontMatter) {
        const README: &str = "README.md";
        let models = front.get("base_model");
        if models.is_empty() {
            self.advice(README, "`base_model` is missing: the hub cannot show what was quantised");
        }
        for id in models.iter().filter(|id| !is_repository(id)) {
            self.wrong(README, format!("`base_model` has {id:?}, which is no repository org/name"));
        }
        match front.get("base_model_relation") {
            [relation] if relation == "quantized" => (),
            [] if models.is_empty() => (),
            [] => self.wrong(README, "`base_model_relation` is missing; it is quantized"),
            other => self.wrong(README, format!("`base_model_relation` is {}, expected quantized", other.join(", "))),
        }
    }

    fn license(&mut self, front: &FrontMatter) {
        const README: &str = "README.md";
        match front.get("license") {
            [] if !front.get("license_name").is_empty() => {
                self.wrong(README, "`license_name` stands without `license: other`");
            }
            [] => self.advice(README, "`license` is missing: without it nobody may use the files"),
            [other] if other == "other" => {
                for key in ["license_name", "license_link"] {
                    if front.get(key).is_empty() {
                        self.wrong(README, format!("`license` is other, so `{key}` has to be there"));
                    }
                }
            }
            _ => (),
        }
        let here = |folder: &Self, link: &str| link.contains("://") || folder.names.iter().any(|name| name == link);
        for link in front.get("license_link") {
            if !here(self, link) {
                self.wrong(README, format!("`license_link` is {link}, which is neither a URL nor a file here"));
            }
        }
    }
}

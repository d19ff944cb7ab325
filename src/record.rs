//! `model.mbq.json`: what a conversion read, did and wrote. docs/format.md has its keys.
use crate::convert::Summary;
use crate::digest::{FileDigest, file_name};
use crate::files::read_plain;
use crate::front::Origin;
use crate::gguf::ShardName;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Of the keys' meaning.
const FORMAT: u32 = 1;

/// The record of a conversion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConversionRecord {
    pub format: u32,
    /// Program and version.
    pub converter: String,
    /// The model's name as the user gave it: `org/name` on the hub, or a path.
    pub source: String,
    /// The files that it was read from; older records lack them.
    #[serde(default)]
    pub origin: Option<Origin>,
    pub method: String,
    pub summary: Summary,
    pub calibration: Option<serde_json::Value>,
}

/// Why there is no record to use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    #[error("{path}: cannot read: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a record of a conversion: {problem}; convert the model again")]
    Form { path: PathBuf, problem: String },
    #[error("{path}: record of format {found}; this version reads {FORMAT}: use the mbq-convert that wrote it")]
    Format { path: PathBuf, found: u64 },
    #[error("{model}: there is no record {record} beside it; put it there (the conversion wrote it), or convert again")]
    Missing { model: PathBuf, record: String },
}

impl ConversionRecord {
    /// Of a conversion that this program did.
    pub fn new(origin: &Origin, method: String, summary: Summary, calibration: Option<serde_json::Value>) -> Self {
        ConversionRecord {
            format: FORMAT,
            converter: concat!("mbq-convert ", env!("CARGO_PKG_VERSION")).into(),
            source: origin.name.clone(),
            origin: Some(origin.clone()),
            method,
            summary,
            calibration,
        }
    }

    /// Reads the record at `path`.
    ///
    /// # Errors
    /// No such file, or not a record that this version reads.
    pub fn read(path: &Path) -> Result<Self, RecordError> {
        let text = read_plain(path).map_err(|source| RecordError::Read { path: path.into(), source })?;
        let fail = |e: serde_json::Error| RecordError::Form { path: path.into(), problem: e.to_string() };
        let json: serde_json::Value = serde_json::from_slice(&text).map_err(fail)?;
        match json.get("format").and_then(serde_json::Value::as_u64) {
            Some(found) if found != u64::from(FORMAT) => Err(RecordError::Format { path: path.into(), found }),
            _ => serde_json::from_value(json).map_err(fail),
        }
    }

    /// Where the record of the model at `model` (the first of its shards) is.
    pub fn path_of(model: &Path) -> PathBuf {
        model.with_file_name(format!("{}.mbq.json", ShardName::stem_of(model)))
    }

    /// The record of the model or mmproj at `path`: the one named after it, or one in its folder that lists a file of its
    /// name.
    ///
    /// # Errors
    /// A record that cannot be read. None at all is none.
    pub fn beside(path: &Path) -> Result<Option<(PathBuf, Self)>, RecordError> {
        let named = Self::path_of(path);
        if named.is_file() {
            return Ok(Some((named.clone(), Self::read(&named)?)));
        }
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let list = std::fs::read_dir(dir).map_err(|source| RecordError::Read { path: dir.into(), source })?;
        let mut records: Vec<PathBuf> =
            list.filter_map(|entry| Some(entry.ok()?.path())).filter(|p| is_record(p)).collect();
        records.sort();
        // Another model's record, which may be a damaged one, is no concern of this one.
        let name = file_name(path);
        let lists = |record: &Self| record.files().any(|f| f.name == name);
        Ok(records
            .into_iter()
            .filter_map(|p| Some((Self::read(&p).ok()?, p)))
            .find(|(r, _)| lists(r))
            .map(|(r, p)| (p, r)))
    }

    /// All files that were written, but for the record.
    pub fn files(&self) -> impl Iterator<Item = &FileDigest> {
        self.summary.model.files.iter().chain(self.summary.mmproj.iter().flat_map(|m| &m.files))
    }

    /// As it stands in the file.
    pub fn encode(&self) -> Vec<u8> {
        // invariant: strings, numbers and lists always serialise.
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }
}

/// Whether a path is named as records are.
pub fn is_record(path: &Path) -> bool {
    file_name(path).ends_with(".mbq.json")
}

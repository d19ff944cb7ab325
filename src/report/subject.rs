//! What a page is about, read and held against each other before a word is written.
use super::noted::Noted;
use crate::digest::{FileDigest, file_name};
use crate::eval::report::Report;
use crate::gguf::{GgufFile, ReadError, ShardName};
use crate::inspect::{Severity, compare};
use crate::record::{ConversionRecord, RecordError};
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    #[error(transparent)]
    Model(#[from] ReadError),
    #[error("{path}: is a vision file (mmproj); give the language model that it belongs to")]
    Vision { path: PathBuf },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(
        "{model}: the record {record} is not this file's: {problem}; put the record of its own conversion beside it, or \
         convert again"
    )]
    OtherModel { model: PathBuf, record: PathBuf, problem: String },
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: not what `mbq-convert eval --json` writes: {problem}; evaluate again with --json {path}")]
    Eval { path: PathBuf, problem: String },
    #[error(
        "{path}: {model} was not measured there; it has {measured}. Evaluate this very file (mbq-convert eval {model} \
         --reference F16.gguf … --json {path}), or leave out --eval"
    )]
    NotMeasured { path: PathBuf, model: PathBuf, measured: String },
}

/// A model with everything that is known about it.
pub struct Subject {
    pub file: GgufFile,
    /// For headings.
    pub name: String,
    pub record: ConversionRecord,
    /// Where a model was calibrated.
    pub noted: Option<Noted>,
    /// The record names no digests, so that only sizes could be compared.
    pub undigested: bool,
    pub eval: Option<Evaluated>,
}

/// An evaluation, and which of its candidates the model is.
pub struct Evaluated {
    pub report: Report,
    pub index: usize,
}

impl Subject {
    /// Reads the model, its record and the evaluation at `eval`, and checks that they are of one model.
    pub fn read(model: &Path, eval: Option<&Path>) -> Result<Self, ReportError> {
        let file = GgufFile::open(model)?;
        if file.is_projector() {
            return Err(ReportError::Vision { path: model.into() });
        }
        let missing =
            || RecordError::Missing { model: model.into(), record: file_name(&ConversionRecord::path_of(model)) };
        let (path, record) = ConversionRecord::beside(model)?.ok_or_else(missing)?;
        let undigested = record.files().next().is_none();
        check(&file, &path, &record)?;
        let noted = record.calibration.clone().map(serde_json::from_value).transpose();
        let noted = noted.map_err(|e| RecordError::Form { path, problem: format!("calibration: {e}") })?;
        let eval = eval.map(|path| Evaluated::read(path, &file)).transpose()?;
        let name = file.metadata.str("general.name").map(str::trim).filter(|name| !name.is_empty());
        let name = name.map_or_else(|| ShardName::stem_of(model), String::from);
        Ok(Subject { file, name, record, noted, undigested, eval })
    }

    /// Bytes of the model's files as they are.
    pub fn bytes(&self) -> u64 {
        self.file.file_size()
    }
}

/// Holds the files against the record at `path`: digests, or sizes where an older record has none.
fn check(file: &GgufFile, path: &Path, record: &ConversionRecord) -> Result<(), ReportError> {
    let fail = |problem| Err(ReportError::OtherModel { model: file.path.clone(), record: path.into(), problem });
    let contents = file.contents();
    let digests: Vec<FileDigest> = contents.par_iter().map(|(path, bytes)| FileDigest::of(path, bytes)).collect();
    let mut findings = compare(path, record, file, &digests).into_iter();
    if let Some(finding) = findings.find(|finding| finding.severity == Severity::Error) {
        return fail(finding.to_string());
    }
    let written = &record.summary.model;
    let (tensors, bytes) = (file.tensors.len(), file.file_size());
    if (written.tensors, written.bytes) != (tensors, bytes) {
        return fail(format!(
            "it is of {} tensors in {} bytes, the file has {tensors} in {bytes}",
            written.tensors, written.bytes
        ));
    }
    Ok(())
}

impl Evaluated {
    fn read(path: &Path, file: &GgufFile) -> Result<Self, ReportError> {
        let fail = |problem: String| ReportError::Eval { path: path.into(), problem };
        let text = std::fs::read(path).map_err(|source| ReportError::Read { path: path.into(), source })?;
        let report: Report = serde_json::from_slice(&text).map_err(|e| fail(e.to_string()))?;
        let answers = report.candidates.len();
        if let Some(q) = report.questions.iter().find(|q| q.candidates.len() != answers) {
            return Err(fail(format!("question {:?} has {} answers of {answers} models", q.id, q.candidates.len())));
        }
        let digest = crate::digest::hex(&file.digest());
        match report.candidates.iter().position(|c| c.model.sha256 == digest) {
            Some(index) => Ok(Evaluated { report, index }),
            None => {
                let of = |m: &crate::eval::report::ModelInfo| format!("{} ({:.12}…)", m.name, m.sha256);
                let names: Vec<String> = report.candidates.iter().map(|c| of(&c.model)).collect();
                let measured = match report.reference.sha256 == digest {
                    true => format!("it as the reference, and as candidates {}", names.join(", ")),
                    false => format!("{}, and this file's SHA-256 begins {digest:.12}", names.join(", ")),
                };
                Err(ReportError::NotMeasured { path: path.into(), model: file.path.clone(), measured })
            }
        }
    }
}

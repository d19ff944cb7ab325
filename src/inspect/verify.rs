//! Whether a file is sound: where its data lies, whether every number is one, whether it is what was written.
use crate::ModelFileError;
use crate::digest::{FileDigest, as_texts, file_name};
use crate::ggml::{GgmlType, dequantize, validate};
use crate::gguf::{GgufFile, PAIR_KEY, ReadError, TensorInfo, belongs};
use crate::record::ConversionRecord;
use crate::runtime::assumed;
use rayon::prelude::*;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Bytes that one task checks.
const CHUNK: usize = 1 << 20;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The file must not be used.
    Error,
    /// Worth knowing.
    Note,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    /// The file's name.
    pub file: String,
    pub tensor: Option<String>,
    pub problem: String,
}

/// The result of reading everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// No finding is an error.
    pub sound: bool,
    /// The record that the files were compared with.
    #[serde(serialize_with = "as_texts")]
    pub record: Option<PathBuf>,
    /// Of the model's files and of its mmproj's.
    pub digests: Vec<FileDigest>,
    pub findings: Vec<Finding>,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.tensor {
            Some(tensor) => write!(f, "{}: tensor `{tensor}` {}", self.file, self.problem),
            None => write!(f, "{}: {}", self.file, self.problem),
        }
    }
}

fn found(severity: Severity, path: &Path, problem: impl Into<String>) -> Finding {
    Finding { severity, file: file_name(path), tensor: None, problem: problem.into() }
}

impl Verification {
    /// Checks `file`, and `mmproj` beside it if it is a model.
    ///
    /// # Errors
    /// A record beside it that cannot be read.
    pub fn run(file: &GgufFile, mmproj: Option<&GgufFile>) -> Result<Self, ModelFileError> {
        let files: Vec<&GgufFile> = std::iter::once(file).chain(mmproj).collect();
        let contents: Vec<(&Path, &[u8])> = files.iter().flat_map(|f| f.contents()).collect();
        let digests: Vec<FileDigest> = contents.par_iter().map(|(path, bytes)| FileDigest::of(path, bytes)).collect();
        let mut findings: Vec<Finding> = files.iter().flat_map(|f| layout(f)).collect();
        findings.extend(files.iter().filter_map(|f| assumed::check(f).err()).filter_map(unfit));
        findings.extend(files.iter().flat_map(|f| values(f)));
        let record = ConversionRecord::beside(&file.path)?;
        match &record {
            Some((path, record)) => findings.extend(compare(path, record, file, &digests)),
            None => findings.push(found(Severity::Note, &file.path, "there is no record (.mbq.json) to compare with")),
        }
        if !file.is_projector() {
            findings.push(pairing(file, mmproj));
        }
        let sound = !findings.iter().any(|f| f.severity == Severity::Error);
        Ok(Verification { sound, record: record.map(|(path, _)| path), digests, findings })
    }
}

/// What llama.cpp would not survive.
fn unfit(error: ReadError) -> Option<Finding> {
    match error {
        ReadError::Unfit { path, what } => Some(found(Severity::Error, &path, what)),
        _ => None,
    }
}

/// Data that lies where no other's does, at multiples of the alignment. That it lies in the file, its reader has checked.
fn layout(file: &GgufFile) -> Vec<Finding> {
    let alignment = file.metadata.u64("general.alignment").unwrap_or(32).max(1);
    let mut order: Vec<&TensorInfo> = file.tensors.iter().collect();
    order.sort_by_key(|t| (file.tensor_path(t), t.offset));
    let mut findings = Vec::new();
    let mut error = |t: &TensorInfo, problem: String| {
        let mut finding = found(Severity::Error, file.tensor_path(t), problem);
        finding.tensor = Some(t.name.clone());
        findings.push(finding);
    };
    for t in &order {
        if t.size.is_none() {
            error(t, format!("has type {}, which this version does not know", t.type_id));
        }
        if t.offset % alignment != 0 {
            error(t, format!("begins at byte {}, which is no multiple of {alignment}", t.offset));
        }
    }
    for pair in order.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        let end = a.offset.saturating_add(a.size.unwrap_or(0));
        if file.tensor_path(a) == file.tensor_path(b) && end > b.offset {
            error(b, format!("begins at byte {}, inside the data of `{}`, which ends at {end}", b.offset, a.name));
        }
    }
    findings
}

/// What is seen of a tensor's data.
#[derive(Default, Clone, Copy)]
struct Seen {
    blocks: usize,
    /// Blocks of a quantised type whose weights are all equal: their scale is zero.
    flat: usize,
    /// The first block that is no number, and how many of them there are.
    first_bad: Option<usize>,
    bad: usize,
    nonzero: bool,
}

impl Seen {
    fn and(self, other: Seen) -> Seen {
        Seen {
            blocks: self.blocks + other.blocks,
            flat: self.flat + other.flat,
            first_bad: match (self.first_bad, other.first_bad) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
            bad: self.bad + other.bad,
            nonzero: self.nonzero || other.nonzero,
        }
    }

    /// Looks at whole blocks, the first of which is block `first` of its tensor.
    fn look(ty: GgmlType, data: &[u8], first: usize) -> Seen {
        let size = ty.type_size();
        let mut seen = Seen { blocks: data.len() / size, nonzero: true, ..Seen::default() };
        let Ok(values) = dequantize(ty, data) else { return seen };
        let not_finite = |(_, block): &(usize, &[f32])| !block.iter().all(|v| v.is_finite());
        let mut bad = values.chunks(ty.block_size()).enumerate().filter(not_finite);
        seen.first_bad = bad.next().map(|(i, _)| first + i);
        seen.bad = seen.first_bad.map_or(0, |_| 1 + bad.count());
        // ggml writes a line of its own where it finds fault: it is asked last, for codes that do not exist.
        if seen.first_bad.is_none() && validate(ty, data).is_err() {
            (seen.first_bad, seen.bad) = (Some(first), 1);
        }
        seen.nonzero = values.iter().any(|v| *v != 0.0);
        if ty.is_quantized() {
            let flat = |block: &&[f32]| block.iter().all(|v| *v == block[0]);
            seen.flat = values.chunks(ty.block_size()).filter(flat).count();
        }
        seen
    }
}

/// Numbers that are none, and weights that are nothing.
fn values(file: &GgufFile) -> Vec<Finding> {
    file.tensors.iter().flat_map(|t| values_of(file, t)).collect()
}

fn values_of(file: &GgufFile, t: &TensorInfo) -> Option<Finding> {
    use GgmlType::{F64, I8, I16, I32, I64};
    let ty = t.ty().filter(|ty| !matches!(ty, F64 | I8 | I16 | I32 | I64))?;
    let size = ty.type_size();
    let per_chunk = (CHUNK / size).max(1);
    let chunks = file.data(t).par_chunks(per_chunk * size).enumerate();
    let seen = chunks.map(|(i, data)| Seen::look(ty, data, i * per_chunk)).reduce(Seen::default, Seen::and);
    file.release(t);
    let finding = |severity, problem: String| {
        let name = Some(t.name.clone());
        Some(Finding { tensor: name, ..found(severity, file.tensor_path(t), problem) })
    };
    let Seen { blocks, flat, bad, .. } = seen;
    match seen.first_bad {
        Some(first) if ty.is_quantized() => {
            let problem = format!(
                "({ty}): {bad} of {blocks} blocks have a scale that is NaN or infinite, or codes that do \
                                   not exist; the first is block {first}"
            );
            finding(Severity::Error, problem)
        }
        Some(first) => {
            finding(Severity::Error, format!("({ty}) holds NaN or infinity {bad} times; first at element {first}"))
        }
        None if !seen.nonzero && blocks > 0 => finding(Severity::Note, format!("({ty}) is zero throughout")),
        None if flat > 0 => finding(Severity::Note, format!("({ty}): {flat} of {blocks} blocks have a scale of zero")),
        None => None,
    }
}

/// Names, sizes and digests of the record `path`.
pub(crate) fn compare(path: &Path, record: &ConversionRecord, file: &GgufFile, digests: &[FileDigest]) -> Vec<Finding> {
    let error = |path: &Path, problem: String| found(Severity::Error, path, problem);
    let listed: Vec<&FileDigest> = record.files().collect();
    if listed.is_empty() {
        return vec![found(Severity::Note, path, "the record has no digests: an older version wrote it")];
    }
    let mut findings = Vec::new();
    for digest in digests {
        let known = listed.iter().any(|f| f.sha256 == digest.sha256);
        let file = Path::new(&digest.name);
        match listed.iter().find(|f| f.name == digest.name) {
            _ if known => (),
            Some(f) if f.bytes != digest.bytes => {
                let problem = format!("has {} bytes, the record {} says {}", digest.bytes, file_name(path), f.bytes);
                findings.push(error(file, problem));
            }
            Some(f) => findings.push(error(
                file,
                format!("its SHA-256 is {}, the record {} says {}", digest.sha256, file_name(path), f.sha256),
            )),
            None => findings.push(error(
                file,
                format!("is none of the files of the record {}: that is another model's", file_name(path)),
            )),
        }
    }
    let pair = file.metadata.str(PAIR_KEY);
    if pair != record.summary.pair.as_deref() {
        findings.push(error(path, format!("the record is of pair {:?}, the file of {pair:?}", record.summary.pair)));
    }
    findings
}

/// Whether the vision file is the model's.
fn pairing(file: &GgufFile, mmproj: Option<&GgufFile>) -> Finding {
    let Some(mmproj) = mmproj else {
        return found(Severity::Note, &file.path, "no vision file of this model (mmproj*.gguf) is beside it");
    };
    let name = file_name(&mmproj.path);
    match (file.metadata.str(PAIR_KEY), belongs(&file.metadata, &mmproj.metadata)) {
        (_, false) => {
            found(Severity::Error, &mmproj.path, "was made for another model (mbq.pair or mbq.rotation differs)")
        }
        (Some(id), true) => found(Severity::Note, &file.path, format!("goes with {name} (pair {id})")),
        (None, true) => {
            found(Severity::Note, &file.path, format!("has no pair id to tell whether {name} goes with it"))
        }
    }
}

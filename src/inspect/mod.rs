//! What a GGUF file holds, what it needs to run, and whether it is sound.
mod memory;
mod metadata;
mod verify;

pub use memory::{MemoryEstimate, PictureTokens};
pub use metadata::{show, to_json};
pub(crate) use verify::compare;
pub use verify::{Finding, Severity, Verification};

use crate::ModelFileError;
use crate::digest::{as_text, as_texts};
use crate::gguf::{GgufFile, TensorInfo, belongs};
use crate::runtime::{RuntimeError, find_mmproj};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub struct InspectOptions {
    /// Tokens that the memory is estimated for; none: the model's context length, 4096 at most.
    pub context: Option<u64>,
    /// The vision file; none: the one beside the model.
    pub mmproj: Option<PathBuf>,
    /// Read all data and check it.
    pub verify: bool,
}

/// A file, described. Its fields' names are the keys of `inspect --json`.
#[derive(Debug, Serialize)]
pub struct Inspection {
    #[serde(serialize_with = "as_text")]
    pub file: PathBuf,
    pub gguf_version: u32,
    /// Several of a split model.
    pub files: Vec<SizedFile>,
    pub architecture: String,
    pub tensor_count: usize,
    pub weights: u64,
    /// Over all tensors; none where a type is unknown.
    pub bits_per_weight: Option<f64>,
    /// Over the matrices of the blocks.
    pub block_bits_per_weight: Option<f64>,
    /// Largest first.
    pub types: Vec<TypeShare>,
    pub runtime: RuntimeNeed,
    /// The vision file of a language model.
    #[serde(serialize_with = "as_texts")]
    pub mmproj: Option<PathBuf>,
    /// Of a language model.
    pub memory: Option<MemoryEstimate>,
    pub metadata: serde_json::Map<String, serde_json::Value>,
    pub tensors: Vec<TensorLine>,
    /// If it was asked for.
    pub verification: Option<Verification>,
}

#[derive(Debug, Serialize)]
pub struct SizedFile {
    pub name: String,
    pub bytes: u64,
}

/// What tensors of one type take.
#[derive(Debug, Serialize)]
pub struct TypeShare {
    #[serde(rename = "type")]
    pub name: String,
    pub tensors: usize,
    pub weights: u64,
    pub bytes: u64,
}

/// A tensor's line in the list.
#[derive(Debug, Serialize)]
pub struct TensorLine {
    pub name: String,
    #[serde(rename = "type")]
    pub type_name: String,
    /// The row length first.
    pub shape: Vec<usize>,
    pub file: String,
    pub offset: u64,
    pub bytes: Option<u64>,
}

/// Which llama.cpp runs a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RuntimeNeed {
    /// Whether an unpatched one does.
    pub stock: bool,
    /// Why it does not.
    pub reasons: Vec<String>,
}

/// The projector type that our llama.cpp adds.
const OUR_PROJECTOR: &str = "llava_onevision";

impl RuntimeNeed {
    /// Of a model's file or an mmproj's.
    pub fn of(file: &GgufFile) -> Self {
        let mut reasons = Vec::new();
        let ours = |t: &&TensorInfo| t.ty() == Some(crate::ggml::GgmlType::MBQ3);
        match file.tensors.iter().filter(ours).count() {
            0 => (),
            n => reasons.push(format!("{n} tensors are mbq3")),
        }
        if file.metadata.str("clip.projector_type") == Some(OUR_PROJECTOR) {
            reasons.push(format!("the projector is {OUR_PROJECTOR}"));
        }
        RuntimeNeed { stock: reasons.is_empty(), reasons }
    }

    /// Of both files together.
    pub fn and(mut self, other: Self) -> Self {
        self.stock &= other.stock;
        self.reasons.extend(other.reasons);
        self
    }
}

/// A tensor's type as text, also of one that this program does not know.
fn type_name(t: &TensorInfo) -> String {
    t.ty().map_or_else(|| format!("type {}", t.type_id), |ty| ty.to_string())
}

/// Describes the GGUF file at `path`, or the split model whose first file that is.
///
/// # Errors
/// A file that cannot be read; with `verify`, a record beside it that cannot.
pub fn inspect(path: &Path, options: &InspectOptions) -> Result<Inspection, ModelFileError> {
    let file = GgufFile::open(path)?;
    let is_model = !file.is_projector();
    let mmproj = match &options.mmproj {
        Some(_) if !is_model => {
            let problem = "is an mmproj itself; --mmproj goes with the language model";
            return Err(ModelFileError::unfit(path, problem));
        }
        Some(given) => Some(GgufFile::open(given)?),
        None if is_model => beside(path, &file)?,
        None => None,
    };
    if let Some(mmproj) = &mmproj
        && !mmproj.is_projector()
    {
        let problem = "is no mmproj (its architecture is not `clip`)";
        return Err(ModelFileError::unfit(&mmproj.path, problem));
    }
    let runtime = RuntimeNeed::of(&file);
    let runtime = mmproj.iter().map(RuntimeNeed::of).fold(runtime, RuntimeNeed::and);
    let memory = is_model.then(|| MemoryEstimate::new(&file, mmproj.as_ref(), options.context)).flatten();
    let verification = options.verify.then(|| Verification::run(&file, mmproj.as_ref())).transpose()?;
    Ok(Inspection {
        file: path.into(),
        gguf_version: file.version,
        files: file.contents().iter().map(|(p, bytes)| SizedFile::of(p, bytes.len() as u64)).collect(),
        architecture: file.architecture().into(),
        tensor_count: file.tensors.len(),
        weights: file.weights(),
        bits_per_weight: file.bits_per_weight(),
        block_bits_per_weight: file.block_bits_per_weight(),
        types: TypeShare::all(&file),
        runtime,
        mmproj: mmproj.map(|m| m.path),
        memory,
        metadata: file.metadata.iter().map(|(key, value)| (key.to_string(), to_json(value))).collect(),
        tensors: file.tensors.iter().map(|t| TensorLine::of(&file, t)).collect(),
        verification,
    })
}

/// The vision file beside a language model. One that does not go with it is another model's; of several that do, none is
/// taken.
fn beside(path: &Path, model: &GgufFile) -> Result<Option<GgufFile>, ModelFileError> {
    match find_mmproj(path) {
        Ok(found) => Ok(Some(GgufFile::open(&found)?).filter(|m| belongs(&model.metadata, &m.metadata))),
        Err(RuntimeError::NoMmproj { .. } | RuntimeError::AmbiguousMmproj { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl TypeShare {
    /// Of all types of a file, the largest share first.
    pub fn all(file: &GgufFile) -> Vec<Self> {
        let mut types: Vec<TypeShare> = Vec::new();
        for t in &file.tensors {
            let name = type_name(t);
            let at = types.iter().position(|share| share.name == name).unwrap_or_else(|| {
                types.push(TypeShare { name, tensors: 0, weights: 0, bytes: 0 });
                types.len() - 1
            });
            let share = &mut types[at];
            share.tensors += 1;
            share.weights += t.elements() as u64;
            share.bytes += t.size.unwrap_or(0);
        }
        types.sort_by_key(|share| std::cmp::Reverse(share.bytes));
        types
    }
}

impl SizedFile {
    fn of(path: &Path, bytes: u64) -> Self {
        SizedFile { name: crate::digest::file_name(path), bytes }
    }
}

impl TensorLine {
    fn of(file: &GgufFile, t: &TensorInfo) -> Self {
        TensorLine {
            name: t.name.clone(),
            type_name: type_name(t),
            shape: t.shape.clone(),
            file: crate::digest::file_name(file.tensor_path(t)),
            offset: t.offset,
            bytes: t.size,
        }
    }
}

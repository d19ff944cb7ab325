//! The trivial front: a GGUF file that llama.cpp's own converter made, or anyone else's.
use super::{FrontError, ModelName, Pair, Source, TensorSpec, Tensors};
use crate::Error;
use crate::digest::{self, WHOLE, hex};
use crate::ggml::{GgmlType, dequantize};
use crate::gguf::{GgufError, GgufFile, ShardName, TensorInfo, belongs};
use crate::runtime::assumed;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// Types that weights are taken from: what was lost before cannot be weighed.
const READABLE: [GgmlType; 4] = [GgmlType::F32, GgmlType::F16, GgmlType::BF16, GgmlType::Q8_0];

/// A file's tensors, by name.
struct File {
    file: GgufFile,
    index: HashMap<String, usize>,
}

/// Opens a GGUF file (the first of a split model's).
///
/// # Errors
/// Not a GGUF file, a damaged one, or one that llama.cpp would not survive; a tensor of a type that is quantised already.
pub fn open(path: &Path) -> Result<Source<'static>, Error> {
    let file = GgufFile::open(path).map_err(GgufError::from)?;
    assumed::check(&file).map_err(GgufError::from)?;
    let tensors = file.tensors.iter().map(|t| spec(&file, t)).collect::<Result<Vec<_>, _>>()?;
    let mut metadata = file.metadata.clone();
    // Of the files that it was read from, not of those that are written.
    metadata.remove(|key| key.starts_with("split."));
    let index = file.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
    Ok(Source { metadata, tensors, values: Box::new(File { file, index }) })
}

/// A language model's file and its mmproj's.
///
/// # Errors
/// As [`open`]; the files given the wrong way round.
pub fn pair(text: &Path, mmproj: Option<&Path>) -> Result<Pair<'static>, Error> {
    let fail = |file: &Path, problem: &str| FrontError::File { file: file.into(), problem: problem.into() };
    let source = open(text)?;
    if source.metadata.is_projector() {
        return Err(fail(text, "is a projector (mmproj); give the language model as MODEL and this as --mmproj").into());
    }
    let vision = mmproj.map(open).transpose()?;
    if let (Some(path), Some(vision)) = (mmproj, &vision)
        && !vision.metadata.is_projector()
    {
        return Err(fail(path, "is no projector (its architecture is not `clip`); give an mmproj file").into());
    }
    if let (Some(path), Some(vision)) = (mmproj, &vision)
        && !belongs(&source.metadata, &vision.metadata)
    {
        return Err(GgufError::Pair { model: text.into(), mmproj: path.into() }.into());
    }
    let name = source.metadata.str("general.name").map_or_else(|| ShardName::stem_of(text), String::from);
    let name = ModelName::parse(&name, source.elements());
    Ok(Pair { text: source, mmproj: vision, name, notes: Vec::new() })
}

fn spec(file: &GgufFile, t: &TensorInfo) -> Result<TensorSpec, FrontError> {
    let fail = |problem: String| FrontError::Tensor { file: file.tensor_path(t).into(), name: t.name.clone(), problem };
    match t.ty() {
        Some(ty) if READABLE.contains(&ty) || !ty.is_quantized() => {
            let shape: Vec<usize> = t.shape.iter().rev().copied().collect();
            Ok(TensorSpec { name: t.name.clone(), shape, stored: ty })
        }
        Some(ty) => Err(fail(format!("is {ty}: quantised already; give the model as F16, BF16, F32 or Q8_0"))),
        None => Err(fail(format!("has type {}, which this version does not know", t.type_id))),
    }
}

impl File {
    fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).and_then(|&i| self.file.tensors.get(i))
    }
}

impl Tensors for File {
    fn values(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>, Error> {
        let fail = |problem: String| FrontError::Tensor { file: self.path(name).into(), name: name.into(), problem };
        let tensor = self.tensor(name).ok_or_else(|| fail("is missing".into()))?;
        let ty = tensor.ty().ok_or_else(|| fail("has an unknown type".into()))?;
        let block = ty.block_size();
        // Whole blocks are read; what stands before and behind the range is cut off.
        let (first, end) = (range.start / block, range.end.div_ceil(block));
        let bytes = self.file.data(tensor).get(first * ty.type_size()..end * ty.type_size());
        let bytes = bytes.ok_or_else(|| fail(format!("has no elements {range:?}")))?;
        let mut values = dequantize(ty, bytes).map_err(|e| fail(e.to_string()))?;
        values.truncate(range.end - first * block);
        values.drain(..range.start - first * block);
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(i) => Err(fail(format!("holds {} at element {}", values[i], range.start + i)).into()),
        }
    }

    fn bytes(&self, name: &str) -> Option<(GgmlType, &[u8])> {
        let tensor = self.tensor(name)?;
        Some((tensor.ty()?, self.file.data(tensor)))
    }

    fn release(&self, name: &str) {
        if let Some(tensor) = self.tensor(name) {
            self.file.release(tensor);
        }
    }

    fn path(&self, name: &str) -> &Path {
        self.tensor(name).map_or(&self.file.path, |t| self.file.tensor_path(t))
    }

    fn origin<'n>(&'n self, name: &'n str) -> &'n str {
        name
    }

    fn fingerprint(&self) -> String {
        let whole = self.file.file_size() <= WHOLE as u64;
        hex(&digest::files(Sha256::new(), &self.file.contents(), whole).finalize())
    }
}

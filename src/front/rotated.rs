//! A pair whose residual stream is rotated ([`crate::quant::rotate`]): tensors are rotated when they are read, and
//! nothing is written in between. The basis follows from the width alone, so that every file made of one model shares
//! one projector and one reference.
use super::pair_id::pair_id;
use super::{FrontError, Pair, Source, TensorSpec, Tensors};
use crate::Error;
use crate::digest::hex;
use crate::ggml::GgmlType;
use crate::gguf::{PAIR_KEY, ROTATION_KEY};
use crate::quant::rotate::Rotation;
use crate::text::{self, Group, LinearName, Producer, TensorRole, TextConfig, Weights};
use candle_core::{Device, Tensor};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Draws the signs of every model's rotation.
const SEED: u64 = 0;

const ROTATION: &str = "hadamard-0";

const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";
const HEAD_NORM: &str = "output_norm.weight";

/// What happens to a tensor.
#[derive(Clone)]
enum Change {
    /// A norm's gain, moved into the linears behind it.
    Ones,
    /// Of `from`: rows are multiplied by the gain before them, and by Q.
    Reads { from: String, gain: Option<Arc<[f32]>> },
    /// Columns are multiplied by Q.
    Writes,
}

/// The tensors of an mmproj whose rows or values enter the stream, by `clip.projector_type` (llama.cpp, clip.cpp). Gemma
/// 3's is not among them: its text model cannot be rotated.
fn projector_writers(kind: &str) -> Option<&'static [&'static str]> {
    Some(match kind {
        "llava_onevision" | "mlp" => &["mm.2.weight", "mm.2.bias", "v.image_newline", "model.image_newline"],
        "qwen2vl_merger" | "qwen2.5vl_merger" => &["mm.2.weight", "mm.2.bias"],
        "qwen3vl_merger" => &["mm.2.weight", "mm.2.bias", "v.deepstack.*.fc2.weight", "v.deepstack.*.fc2.bias"],
        "internvl" => &["mm.model.mlp.3.weight", "mm.model.mlp.3.bias"],
        "idefics3" => &["mm.model.fc.weight"],
        _ => return None,
    })
}

/// Whether `name` is `pattern`, whose `*` stands for a number.
fn fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, end)) => {
            let number = name.strip_prefix(start).and_then(|rest| rest.strip_suffix(end));
            number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        }
    }
}

/// Whether the head of `pair` is a tensor of its own: a rotation gives a model whose head is the embedding a second one.
pub fn has_own_head(pair: &Pair) -> bool {
    pair.text.tensor(HEAD).is_some()
}

/// Why `pair` cannot be rotated, in words.
///
/// # Errors
/// The text model's metadata is not understood.
pub fn obstacle(pair: &Pair) -> Result<Option<String>, Error> {
    let config = pair.text.text_config()?;
    let kind = pair.mmproj.as_ref().and_then(|m| m.metadata.str("clip.projector_type"));
    Ok(if pair.text.metadata.get(ROTATION_KEY).is_some() {
        Some("it is rotated already".into())
    } else if !config.arch.rotates() {
        Some(format!("norms stand between {}'s linears and its residual stream", config.arch.name))
    } else if pair.mmproj.is_some() && kind.and_then(projector_writers).is_none() {
        let kind = kind.unwrap_or("none");
        Some(format!("which layer of projector type `{kind}` writes to the residual stream is not known"))
    } else {
        None
    })
}

/// Rotates a pair for which there is no [`obstacle`].
///
/// # Errors
/// A norm's gain cannot be read; a tensor has another width than the stream.
pub fn rotate(pair: Pair) -> Result<Pair, Error> {
    let config = pair.text.text_config()?;
    let rotation = Arc::new(Rotation::new(config.hidden_size, SEED));
    let id = match (pair.text.metadata.str(PAIR_KEY), &pair.mmproj) {
        (Some(id), _) => Some(id.to_string()),
        (None, Some(mmproj)) => Some(pair_id(mmproj)?),
        (None, None) => None,
    };
    // Another stream: another projector belongs to it.
    let id = id.map(|id| hex(&Sha256::digest(format!("{ROTATION} {id}"))[..16]));
    let mark = |source: &mut Source| {
        source.metadata.set(ROTATION_KEY, ROTATION);
        if let Some(id) = &id {
            source.metadata.set(PAIR_KEY, id);
        }
    };
    let mut text = decoder(pair.text, &config, &rotation)?;
    mark(&mut text);
    let mmproj = match pair.mmproj {
        None => None,
        Some(source) => {
            let mut mmproj = projector(source, &rotation)?;
            mark(&mut mmproj);
            Some(mmproj)
        }
    };
    Ok(Pair { text, mmproj, ..pair })
}

fn decoder<'a>(mut source: Source<'a>, config: &TextConfig, rotation: &Arc<Rotation>) -> Result<Source<'a>, Error> {
    let mut changes = HashMap::new();
    let gain =
        |name: &str| -> Result<Option<Arc<[f32]>>, Error> { Ok(Some(source.f32(name, &[config.hidden_size])?.into())) };
    for t in text::tensors(config).into_iter().filter(|t| source.tensor(&t.name).is_some() || t.name == HEAD) {
        let before = |name: LinearName| match (Group::of(name).producer(), t.layer) {
            (Producer::AttnNorm, Some(layer)) => gain(&text::in_block(layer, "attn_norm.weight")),
            (Producer::MlpNorm, Some(layer)) => gain(&text::in_block(layer, "ffn_norm.weight")),
            _ => Ok(None),
        };
        let change = match t.role {
            TensorRole::OutputNorm | TensorRole::Norm(_) => Change::Ones,
            TensorRole::Embedding => Change::Reads { from: t.name.clone(), gain: None },
            TensorRole::Output => {
                let from = if source.tensor(HEAD).is_some() { HEAD } else { EMBEDDING };
                Change::Reads { from: from.into(), gain: gain(HEAD_NORM)? }
            }
            TensorRole::Weight(LinearName::O | LinearName::Down)
            | TensorRole::Bias(LinearName::O | LinearName::Down) => Change::Writes,
            TensorRole::Weight(name) => Change::Reads { from: t.name.clone(), gain: before(name)? },
            TensorRole::Bias(_) | TensorRole::RopeFactors | TensorRole::FixedNorm => continue,
        };
        changes.insert(t.name, change);
    }
    if source.tensor(HEAD).is_none() {
        // The head of a tied model sees a gain that the embedding does not.
        let Some(at) = source.tensors.iter().position(|t| t.name == EMBEDDING) else {
            return wrap(source, changes, rotation);
        };
        let head = TensorSpec { name: HEAD.into(), ..source.tensors[at].clone() };
        source.tensors.insert(source.tensors.iter().position(|t| t.name == HEAD_NORM).unwrap_or(at) + 1, head);
    }
    wrap(source, changes, rotation)
}

fn projector<'a>(source: Source<'a>, rotation: &Arc<Rotation>) -> Result<Source<'a>, Error> {
    let kind = source.metadata.str("clip.projector_type").unwrap_or_default();
    let writers = projector_writers(kind).unwrap_or_default();
    let writes = |t: &&TensorSpec| writers.iter().any(|pattern| fits(pattern, &t.name));
    let changes = source.tensors.iter().filter(writes).map(|t| (t.name.clone(), Change::Writes)).collect();
    wrap(source, changes, rotation)
}

/// Checks the widths.
fn wrap<'a>(
    source: Source<'a>,
    changes: HashMap<String, Change>,
    rotation: &Arc<Rotation>,
) -> Result<Source<'a>, Error> {
    for t in &source.tensors {
        let side = match changes.get(&t.name) {
            Some(Change::Writes | Change::Ones) => t.shape.first(),
            Some(Change::Reads { .. }) => t.shape.last(),
            None => continue,
        };
        if side != Some(&rotation.len()) {
            let problem = format!("has shape {:?}, but the residual stream has {} channels", t.shape, rotation.len());
            let (file, name) = (source.values.path(&t.name).into(), t.name.clone());
            return Err(FrontError::Tensor { file, name, problem }.into());
        }
    }
    let shapes = source.tensors.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
    let values = Rotated {
        inner: source.values,
        shapes,
        changes,
        rotation: rotation.clone(),
        last: Mutex::default(),
        matrix: Mutex::default(),
    };
    Ok(Source { metadata: source.metadata, tensors: source.tensors, values: Box::new(values) })
}

struct Rotated<'a> {
    inner: Box<dyn Tensors + 'a>,
    shapes: HashMap<String, Vec<usize>>,
    changes: HashMap<String, Change>,
    rotation: Arc<Rotation>,
    /// The writer that was read last: every row of it depends on the whole tensor.
    last: Mutex<Option<(String, Arc<Vec<f32>>)>>,
    /// The rotation's matrix, on the device that asked for it.
    matrix: Mutex<Option<Tensor>>,
}

impl Rotated<'_> {
    fn writer(&self, name: &str, shape: &[usize]) -> Result<Arc<Vec<f32>>, Error> {
        let last = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, values)) = last().as_ref().filter(|(n, _)| n == name) {
            return Ok(values.clone());
        }
        // Never while the lock is held: a thread that waits for its part of this work takes up other work meanwhile, which
        // may be another part of the same tensor, and would wait for itself.
        let (n, cols) = (shape.iter().product(), shape[1..].iter().product());
        let values = Arc::new(self.rotation.writers(&self.inner.values(name, 0..n)?, cols));
        *last() = Some((name.into(), values.clone()));
        Ok(values)
    }

    fn matrix(&self, device: &Device) -> Result<Tensor, Error> {
        let mut kept = self.matrix.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(matrix) = kept.as_ref().filter(|m| m.device().same_device(device)) {
            return Ok(matrix.clone());
        }
        let n = self.rotation.len();
        Ok(kept.insert(Tensor::from_vec(self.rotation.matrix(), (n, n), device)?).clone())
    }
}

impl Tensors for Rotated<'_> {
    fn values(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>, Error> {
        let shape = self.shapes.get(name).map(Vec::as_slice).unwrap_or_default();
        match self.changes.get(name) {
            None => self.inner.values(name, range),
            Some(Change::Ones) => Ok(vec![1.0; range.len()]),
            Some(Change::Writes) => Ok(self.writer(name, shape)?[range].to_vec()),
            Some(Change::Reads { from, gain }) => {
                let cols = self.rotation.len();
                let rows = range.start / cols * cols..range.end.next_multiple_of(cols);
                let mut values = self.inner.values(from, rows.clone())?;
                self.rotation.readers(&mut values, gain.as_deref());
                values.truncate(range.end - rows.start);
                values.drain(..range.start - rows.start);
                Ok(values)
            }
        }
    }

    fn prepare(&self, name: &str) -> Result<(), Error> {
        match self.changes.get(name) {
            Some(Change::Writes) => {
                let shape = self.shapes.get(name).map(Vec::as_slice).unwrap_or_default();
                // What was read last is not needed any more.
                self.last.lock().unwrap_or_else(PoisonError::into_inner).take_if(|(n, _)| n != name);
                self.writer(name, shape).map(|_| ())
            }
            Some(Change::Reads { from, .. }) => self.inner.prepare(from),
            _ => self.inner.prepare(name),
        }
    }

    fn bytes(&self, name: &str) -> Option<(GgmlType, &[u8])> {
        if self.changes.contains_key(name) { None } else { self.inner.bytes(name) }
    }

    /// Multiplied by the whole matrix there, in f32: what is little work on a device, and the transform in f64 much on the CPU.
    fn on_device(&self, name: &str, shape: &[usize], device: &Device) -> Result<Option<Tensor>, Error> {
        let from = match self.changes.get(name) {
            None => return self.inner.on_device(name, shape, device),
            Some(Change::Reads { from, .. }) => from,
            Some(Change::Writes) => name,
            Some(Change::Ones) => return Ok(None),
        };
        let matrix = || self.matrix(device);
        let found = if shape.len() == 2 { self.inner.on_device(from, shape, device)? } else { None };
        let Some(w) = found else { return Ok(None) };
        Ok(Some(match self.changes.get(name) {
            Some(Change::Reads { gain: Some(gain), .. }) => {
                w.broadcast_mul(&Tensor::new(&gain[..], device)?)?.matmul(&matrix()?)?
            }
            Some(Change::Reads { gain: None, .. }) => w.matmul(&matrix()?)?,
            _ => matrix()?.t()?.matmul(&w)?,
        }))
    }

    fn release(&self, name: &str) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref().is_some_and(|(n, _)| n == name) {
            *last = None;
        }
        match self.changes.get(name) {
            Some(Change::Reads { from, .. }) => self.inner.release(from),
            _ => self.inner.release(name),
        }
    }

    fn path(&self, name: &str) -> &Path {
        self.inner.path(name)
    }

    fn origin<'n>(&'n self, name: &'n str) -> &'n str {
        self.inner.origin(name)
    }

    fn fingerprint(&self) -> String {
        hex(&Sha256::digest(format!("{ROTATION} {}", self.inner.fingerprint())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    /// One tensor whose values are their places.
    struct Counted;

    impl Tensors for Counted {
        fn values(&self, _: &str, range: Range<usize>) -> Result<Vec<f32>, Error> {
            Ok(range.map(|i| i as f32).collect())
        }
        fn bytes(&self, _: &str) -> Option<(GgmlType, &[u8])> {
            None
        }
        fn release(&self, _: &str) {}
        fn path(&self, _: &str) -> &Path {
            Path::new("counted")
        }
        fn origin<'n>(&'n self, name: &'n str) -> &'n str {
            name
        }
        fn fingerprint(&self) -> String {
            String::new()
        }
    }

    /// Threads that read parts of one tensor do not wait for themselves: this test would not end.
    #[test]
    fn writers_are_read_on_many_threads() {
        let (rows, cols) = (256, 64);
        let rotated = || Rotated {
            inner: Box::new(Counted),
            shapes: HashMap::from([("w".into(), vec![rows, cols])]),
            changes: HashMap::from([("w".into(), Change::Writes)]),
            rotation: Arc::new(Rotation::new(rows, SEED)),
            last: Mutex::default(),
            matrix: Mutex::default(),
        };
        let whole = rotated().values("w", 0..rows * cols).unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        for parts in (2..=16).cycle().take(600) {
            let rotated = rotated();
            let some = rows / 16 * cols;
            let read = |i: usize| rotated.values("w", i * some..(i + 1) * some).unwrap();
            let read: Vec<Vec<f32>> = pool.install(|| (0..parts).into_par_iter().with_max_len(1).map(read).collect());
            assert_eq!(read.concat(), whole[..parts * some]);
        }
    }

    /// Halfs in a file.
    struct Stored(Vec<u8>);

    impl Tensors for Stored {
        fn values(&self, _: &str, range: Range<usize>) -> Result<Vec<f32>, Error> {
            Ok(range.map(|i| half::bf16::from_le_bytes([self.0[2 * i], self.0[2 * i + 1]]).to_f32()).collect())
        }
        fn bytes(&self, _: &str) -> Option<(GgmlType, &[u8])> {
            Some((GgmlType::BF16, &self.0))
        }
        fn release(&self, _: &str) {}
        fn path(&self, _: &str) -> &Path {
            Path::new("stored")
        }
        fn origin<'n>(&'n self, name: &'n str) -> &'n str {
            name
        }
        fn fingerprint(&self) -> String {
            String::new()
        }
    }

    /// The product with the whole matrix, as devices do it, is the transform: readers with and without a gain, writers, and
    /// what is not rotated. Biases and norms are left to the CPU.
    #[test]
    fn devices_rotate_alike() {
        let (rows, n) = (24, 56);
        let bytes =
            (0..rows * n).flat_map(|i| half::bf16::from_f32((i * 37 % 101) as f32 - 50.0).to_le_bytes()).collect();
        let gain: Arc<[f32]> = (0..n).map(|i| 1.0 + i as f32 / 8.0).collect();
        let shapes = [("plain", [rows, n]), ("gained", [rows, n]), ("writer", [n, rows]), ("other", [rows, n])];
        let rotated = Rotated {
            inner: Box::new(Stored(bytes)),
            shapes: shapes.iter().map(|(name, shape)| ((*name).into(), shape.to_vec())).collect(),
            changes: HashMap::from([
                ("plain".into(), Change::Reads { from: "plain".into(), gain: None }),
                ("gained".into(), Change::Reads { from: "gained".into(), gain: Some(gain) }),
                ("writer".into(), Change::Writes),
                ("bias".into(), Change::Writes),
                ("norm".into(), Change::Ones),
            ]),
            rotation: Arc::new(Rotation::new(n, SEED)),
            last: Mutex::default(),
            matrix: Mutex::default(),
        };
        for (name, shape) in shapes {
            let there = rotated.on_device(name, &shape, &Device::Cpu).unwrap().unwrap();
            let there: Vec<f32> = there.flatten_all().unwrap().to_vec1().unwrap();
            let here = rotated.values(name, 0..rows * n).unwrap();
            let size = here.iter().fold(0f32, |a, b| a.max(b.abs()));
            // Sums of 56 in f32.
            let off = there.iter().zip(&here).fold(0f32, |a, (x, y)| a.max((x - y).abs()));
            assert!(size >= 50.0 && off < 2e-6 * size, "{name}: {off} of {size}");
        }
        assert!(rotated.on_device("bias", &[n], &Device::Cpu).unwrap().is_none());
        assert!(rotated.on_device("norm", &[n], &Device::Cpu).unwrap().is_none());
    }
}

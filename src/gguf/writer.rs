//! Tensor data, streamed: rows are read from the mapped checkpoint, changed, encoded on all cores and appended, a
//! slab at a time, so that memory depends neither on the model nor on its largest tensor.
use super::plan::Planned;
use super::{GgufError, Header, Output};
use crate::digest::{FileDigest, file_name, hex};
use crate::events::{Event, Observer};
use crate::front::Source;
use crate::ggml::{GgmlType, quantize_rows, validate};
use crate::quant::fold::Folds;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Makes the blocks of a tensor in another way than by rounding each row: for codes that compensate errors.
pub trait Encoder: Sync {
    /// The tensor's bytes in type `ty` (folds included: the encoder has applied them), or `None` to have it rounded.
    /// `shape`'s outermost dimension comes first.
    ///
    /// # Errors
    /// The encoder's own.
    fn encode(&self, name: &str, shape: &[usize], ty: GgmlType) -> Result<Option<Vec<u8>>, crate::Error>;
}

/// How the source's values change on the way.
#[derive(Clone, Copy)]
pub struct Changes<'a> {
    pub folds: &'a Folds,
    pub encoder: Option<&'a dyn Encoder>,
    /// Importance of a tensor's columns, by name.
    pub importance: &'a BTreeMap<String, Vec<f32>>,
}

impl Changes<'static> {
    /// None at all.
    pub const NONE: Changes<'static> = Changes { folds: &Folds::new(), encoder: None, importance: &BTreeMap::new() };
}

/// Values that one task turns into blocks: small beside a core's cache of megabytes, large beside a task's cost.
const CHUNK: usize = 1 << 18;
/// Chunks that are held before they are written.
const CHUNKS: usize = 64;

/// Lists the tensors of `plan` in `header`.
///
/// # Errors
/// A name is too long or listed twice.
pub fn list(header: &mut Header, plan: &[Planned]) -> Result<(), GgufError> {
    for tensor in plan {
        let shape: Vec<usize> = tensor.shape.iter().rev().copied().collect();
        header.add_tensor(&tensor.name, tensor.ty, &shape)?;
    }
    Ok(())
}

/// An output whose bytes are counted and hashed on their way.
struct Hashed<'o> {
    output: &'o mut Output,
    hash: Sha256,
    bytes: u64,
}

impl Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        self.output.write(bytes)
    }
}

/// Bytes of a tensor, or of the header.
enum Bytes<'s> {
    Made(Vec<Vec<u8>>),
    Stored(&'s [u8]),
}

/// What goes to the file next, behind the end of a tensor.
struct Part<'s> {
    ended: Option<&'s str>,
    bytes: Bytes<'s>,
}

/// Hands parts over to whoever writes them. A tensor's end goes with what follows it: alone it would wait for the tensor's
/// last bytes to be written, and nothing be made meanwhile.
struct Parts<'s> {
    to: SyncSender<Part<'s>>,
    ended: Option<&'s str>,
    path: PathBuf,
}

impl<'s> Parts<'s> {
    /// # Errors
    /// The other side has stopped; why, it says itself.
    fn send(&mut self, bytes: Bytes<'s>) -> Result<(), GgufError> {
        let part = Part { ended: self.ended.take(), bytes };
        let stopped = |_| GgufError::Write { path: self.path.clone(), source: ErrorKind::BrokenPipe.into() };
        self.to.send(part).map_err(stopped)
    }
}

/// Writes header and tensors of one file. Returns what was written. While a slab is hashed and written, the next is made.
///
/// # Errors
/// A tensor is missing, misshapen, not finite or beyond its type; the disk is full.
pub fn write(
    source: &Source,
    header: &Header,
    plan: &[Planned],
    changes: Changes,
    output: &mut Output,
    observer: &dyn Observer,
) -> Result<FileDigest, crate::Error> {
    let path = output.path().to_path_buf();
    let name = file_name(&path);
    let mut file = Hashed { output, hash: Sha256::new(), bytes: 0 };
    let total = plan.iter().map(|t| t.elements() as u64).sum();
    observer.event(Event::PhaseStart { name: name.clone(), total, unit: "weights" });
    std::thread::scope(|scope| {
        // Without room for parts that wait: one is written, and one is made.
        let (to, parts) = sync_channel(0);
        let writer = scope.spawn(|| write_all(parts, source, header.alignment(), &mut file));
        let made = make_all(source, header, plan, &changes, Parts { to, ended: None, path }, observer);
        // Where the writer stopped, that is why no more could be made.
        writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        made
    })?;
    observer.event(Event::PhaseEnd);
    Ok(FileDigest { name, bytes: file.bytes, sha256: hex(&file.hash.finalize()) })
}

/// Writes what comes, until nothing does.
fn write_all(parts: Receiver<Part>, source: &Source, alignment: u64, file: &mut Hashed) -> Result<(), GgufError> {
    for Part { ended, bytes } in parts {
        if let Some(tensor) = ended {
            source.values.release(tensor);
            // The data begins at a multiple of the alignment: what is aligned in the file is aligned in the data.
            let padding = file.bytes.next_multiple_of(alignment) - file.bytes;
            file.write(&vec![0; padding as usize])?;
        }
        match bytes {
            Bytes::Made(slab) => slab.iter().try_for_each(|bytes| file.write(bytes))?,
            Bytes::Stored(bytes) => file.write(bytes)?,
        }
    }
    Ok(())
}

/// Makes everything that the file holds, in order.
fn make_all<'s>(
    source: &'s Source,
    header: &Header,
    plan: &'s [Planned],
    changes: &Changes,
    mut parts: Parts<'s>,
    observer: &dyn Observer,
) -> Result<(), crate::Error> {
    parts.send(Bytes::Made(vec![header.encode()]))?;
    for tensor in plan {
        let mut append = |bytes: Bytes<'s>, values: usize| -> Result<(), GgufError> {
            parts.send(bytes)?;
            observer.event(Event::Advance { n: values as u64, detail: tensor.name.clone() });
            Ok(())
        };
        let encoded = match changes.encoder {
            Some(encoder) => encoder.encode(&tensor.name, &tensor.shape, tensor.ty)?,
            None => None,
        };
        match (encoded, as_stored(source, tensor, changes)?) {
            (Some(bytes), _) => append(Bytes::Made(vec![whole(source, tensor, bytes)?]), tensor.elements())?,
            (None, Some(bytes)) => append(Bytes::Stored(bytes), tensor.elements())?,
            (None, None) => rounded(source, tensor, changes, &mut append)?,
        }
        parts.ended = Some(&tensor.name);
    }
    Ok(parts.send(Bytes::Made(Vec::new()))?)
}

/// The encoder's bytes, if they are as many as the tensor's blocks take.
fn whole(source: &Source, t: &Planned, bytes: Vec<u8>) -> Result<Vec<u8>, GgufError> {
    let (given, want) = (bytes.len(), t.rows() * t.ty.row_size(t.row())?);
    if given == want {
        return Ok(bytes);
    }
    Err(GgufError::EncoderSize {
        file: source.values.path(&t.name).into(),
        tensor: source.values.origin(&t.name).into(),
        given,
        want,
    })
}

/// The source's own bytes, where nothing about the tensor changes.
fn as_stored<'s>(source: &'s Source, t: &Planned, changes: &Changes) -> Result<Option<&'s [u8]>, GgufError> {
    let Some((ty, bytes)) = source.values.bytes(&t.name).filter(|(ty, _)| *ty == t.ty) else { return Ok(None) };
    if changes.folds.contains_key(&t.name) {
        return Ok(None);
    }
    let fail = |source_| GgufError::Quantise {
        file: source.values.path(&t.name).into(),
        tensor: source.values.origin(&t.name).into(),
        source: source_,
    };
    if ty.is_quantized() || matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16) {
        validate(ty, bytes).map_err(fail)?;
    }
    Ok(Some(bytes))
}

/// Takes bytes, and how many values they stand for.
type Append<'a, 's> = &'a mut dyn FnMut(Bytes<'s>, usize) -> Result<(), GgufError>;

/// Rounds a tensor, slab by slab.
fn rounded(source: &Source, t: &Planned, changes: &Changes, append: Append) -> Result<(), crate::Error> {
    let rows_per_chunk = (CHUNK / t.row().max(1)).max(1);
    let chunks: Vec<Range<usize>> =
        (0..t.rows()).step_by(rows_per_chunk).map(|r| r..(r + rows_per_chunk).min(t.rows())).collect();
    source.values.prepare(&t.name)?;
    for slab in chunks.chunks(CHUNKS) {
        let rows: usize = slab.iter().map(Range::len).sum();
        let blocks: Vec<Vec<u8>> =
            slab.par_iter().map(|rows| chunk(source, t, changes, rows.clone())).collect::<Result<_, _>>()?;
        append(Bytes::Made(blocks), rows * t.row())?;
    }
    Ok(())
}

/// Blocks of the rows `rows` of a tensor.
fn chunk(source: &Source, t: &Planned, changes: &Changes, rows: Range<usize>) -> Result<Vec<u8>, crate::Error> {
    let cols = t.row();
    let mut values = source.values.values(&t.name, rows.start * cols..rows.end * cols)?;
    if let Some(fold) = changes.folds.get(&t.name) {
        // A fold sees a tensor as rows of its first dimension; vectors have rows of one value.
        let inner = t.elements() / t.shape.first().copied().unwrap_or(1).max(1);
        if inner == cols {
            fold.apply(&mut values, rows.start, cols);
        } else {
            fold.apply(&mut values, rows.start * cols, 1);
        }
    }
    let file = || source.values.path(&t.name).to_path_buf();
    let origin = || source.values.origin(&t.name).to_string();
    if t.ty == GgmlType::F16
        && let Some(&value) = values.iter().find(|v| v.abs() > half::f16::MAX.to_f32())
    {
        return Err(GgufError::BeyondF16 { file: file(), tensor: origin(), value }.into());
    }
    let fail = |source| GgufError::Quantise { file: file(), tensor: origin(), source };
    let importance = changes.importance.get(&t.name).map(Vec::as_slice);
    let blocks = quantize_rows(t.ty, &values, cols, importance).map_err(fail)?;
    if t.ty.is_quantized() {
        // Scales are halfs, which large weights overflow.
        validate(t.ty, &blocks).map_err(fail)?;
    }
    Ok(blocks)
}

//! Tensor data, streamed: rows are read from the mapped checkpoint, changed, encoded on all cores and appended, a
//! slab at a time, so that memory depends neither on the model nor on its largest tensor.
use super::plan::Planned;
use super::{GgufError, Header, Output};
use crate::checkpoint::Checkpoint;
use crate::events::{Event, Observer};
use crate::ggml::{GgmlType, quantize_rows, validate};
use crate::quant::fold::Folds;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;

/// Makes the blocks of a tensor in another way than by rounding each row: for codes that compensate errors.
pub trait Encoder: Sync {
    /// The tensor's bytes in type `ty` (folds included: the encoder has applied them), or `None` to have it rounded.
    /// `source` is the canonical name; `shape` the checkpoint's.
    ///
    /// # Errors
    /// The encoder's own.
    fn encode(&self, source: &str, shape: &[usize], ty: GgmlType) -> Result<Option<Vec<u8>>, crate::Error>;
}

/// How the checkpoint's values change on the way.
#[derive(Clone, Copy)]
pub struct Changes<'a> {
    pub folds: &'a Folds,
    pub encoder: Option<&'a dyn Encoder>,
    /// Importance of a tensor's columns, by canonical name.
    pub importance: &'a BTreeMap<String, Vec<f32>>,
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

/// Writes header and tensors of one file. Returns the bytes written.
///
/// # Errors
/// A tensor is missing, misshapen, not finite or beyond its type; the disk is full.
pub fn write(
    checkpoint: &Checkpoint,
    header: &Header,
    plan: &[Planned],
    changes: Changes,
    output: &mut Output,
    observer: &dyn Observer,
) -> Result<u64, crate::Error> {
    let meta = header.encode();
    output.write(&meta)?;
    let mut written = meta.len() as u64;
    let name = output.path().file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let total =
        plan.iter().map(|t| Ok(checkpoint.tensor(&t.source)?.bytes.len() as u64)).sum::<Result<_, crate::Error>>()?;
    observer.event(Event::PhaseStart { name, total, unit: "B" });
    for tensor in plan {
        let mut size = 0u64;
        let bytes_per_value = checkpoint.tensor(&tensor.source)?.bytes.len() / tensor.elements().max(1);
        let mut append = |bytes: &[u8], values: usize| -> Result<(), GgufError> {
            output.write(bytes)?;
            size += bytes.len() as u64;
            let n = (values * bytes_per_value) as u64;
            observer.event(Event::Advance { n, detail: tensor.name.clone() });
            Ok(())
        };
        let encoded = match changes.encoder {
            Some(encoder) => encoder.encode(&tensor.source, &tensor.shape, tensor.ty)?,
            None => None,
        };
        match encoded {
            Some(bytes) => {
                let want = tensor.rows() * tensor.ty.row_size(tensor.row()).map_err(GgufError::Ggml)?;
                if bytes.len() != want {
                    let (file, given) = (checkpoint.dir().into(), bytes.len());
                    return Err(GgufError::EncoderSize { file, tensor: tensor.source.clone(), given, want }.into());
                }
                append(&bytes, tensor.elements())?;
            }
            None => {
                let rows_per_chunk = (CHUNK / tensor.row().max(1)).max(1);
                let chunks: Vec<Range<usize>> = (0..tensor.rows())
                    .step_by(rows_per_chunk)
                    .map(|r| r..(r + rows_per_chunk).min(tensor.rows()))
                    .collect();
                for slab in chunks.chunks(CHUNKS) {
                    let blocks: Vec<Vec<u8>> = slab
                        .par_iter()
                        .map(|rows| chunk(checkpoint, tensor, &changes, rows.clone()))
                        .collect::<Result<_, _>>()?;
                    for (rows, bytes) in slab.iter().zip(&blocks) {
                        append(bytes, rows.len() * tensor.row())?;
                    }
                }
            }
        }
        checkpoint.release(&tensor.source);
        let padding = size.next_multiple_of(header.alignment()) - size;
        output.write(&vec![0; padding as usize])?;
        written += size + padding;
    }
    observer.event(Event::PhaseEnd);
    Ok(written)
}

/// Blocks of the rows `rows` of a tensor.
fn chunk(checkpoint: &Checkpoint, t: &Planned, changes: &Changes, rows: Range<usize>) -> Result<Vec<u8>, crate::Error> {
    let cols = t.row();
    let mut values = checkpoint.f32_range(&t.source, &t.shape, rows.start * cols..rows.end * cols)?;
    if let Some(fold) = changes.folds.get(&t.source) {
        // A fold sees a tensor as rows of its first dimension; vectors have rows of one value.
        let inner = t.elements() / t.shape.first().copied().unwrap_or(1).max(1);
        if inner == cols {
            fold.apply(&mut values, rows.start, cols);
        } else {
            fold.apply(&mut values, rows.start * cols, 1);
        }
    }
    let file = || checkpoint.dir().to_path_buf();
    if t.ty == GgmlType::F16
        && let Some(&value) = values.iter().find(|v| v.abs() > half::f16::MAX.to_f32())
    {
        return Err(GgufError::BeyondF16 { file: file(), tensor: t.source.clone(), value }.into());
    }
    let fail = |source| GgufError::Quantise { file: file(), tensor: t.source.clone(), source };
    let importance = changes.importance.get(&t.source).map(Vec::as_slice);
    let blocks = quantize_rows(t.ty, &values, cols, importance).map_err(fail)?;
    if t.ty.is_quantized() {
        // Scales are halfs, which large weights overflow.
        validate(t.ty, &blocks).map_err(fail)?;
    }
    Ok(blocks)
}

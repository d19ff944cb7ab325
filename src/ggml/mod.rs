//! The patched ggml: storage types and its quantisers.
//!
//! [`sys`] holds bindgen's bindings to the statically linked ggml-base; everything else here is a safe
//! wrapper that checks what ggml itself would only assert.
#![allow(unsafe_code)]

#[allow(clippy::undocumented_unsafe_blocks, missing_docs, non_camel_case_types, non_snake_case, non_upper_case_globals)]
pub mod sys;
mod types;

pub use types::GgmlType;

use std::borrow::Cow;

/// Alignment that the blocks of every type ask for, in bytes.
const BLOCK_ALIGN: usize = 8;

/// What the ggml wrapper refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgmlError {
    #[error("rows of {n_per_row} weights do not fit {ty}: its blocks hold {block}")]
    RowSize { ty: GgmlType, n_per_row: usize, block: usize },
    #[error("{len} weights are no whole number of rows of {n_per_row}")]
    RowCount { len: usize, n_per_row: usize },
    #[error("{len} bytes are no whole number of {ty} blocks of {block} bytes")]
    ByteCount { ty: GgmlType, len: usize, block: usize },
    #[error("importance matrix has {len} entries for rows of {n_per_row} weights")]
    Imatrix { len: usize, n_per_row: usize },
    #[error("{ty} cannot be quantised without an importance matrix")]
    NeedsImatrix { ty: GgmlType },
    #[error("{ty} cannot be written from f32")]
    NotWritable { ty: GgmlType },
    #[error("{ty} cannot be read as f32")]
    NotReadable { ty: GgmlType },
    #[error("weight {index} (row {row}) is {value}; only finite weights can be quantised to {ty}")]
    NotFinite { ty: GgmlType, index: usize, row: usize, value: f32 },
    #[error("{ty} data has non-finite scales or invalid codes")]
    Invalid { ty: GgmlType },
    #[error("GGUF {what} {name:?}: {problem}")]
    Gguf { what: &'static str, name: String, problem: String },
    #[error("{path}: not a readable GGUF file: {problem}")]
    Open { path: String, problem: String },
}

/// Quantises whole rows with ggml's own quantiser.
///
/// `weights` holds any number of rows of `n_per_row` values; `imatrix`, when given, one importance per
/// column. May be called from many threads at once.
pub fn quantize_rows(
    ty: GgmlType,
    weights: &[f32],
    n_per_row: usize,
    imatrix: Option<&[f32]>,
) -> Result<Vec<u8>, GgmlError> {
    let row_size = ty.row_size(n_per_row)?;
    if n_per_row == 0 || !weights.len().is_multiple_of(n_per_row) {
        return Err(GgmlError::RowCount { len: weights.len(), n_per_row });
    }
    if !ty.is_writable() {
        return Err(GgmlError::NotWritable { ty });
    }
    if let Some(imatrix) = imatrix.filter(|imatrix| imatrix.len() != n_per_row) {
        return Err(GgmlError::Imatrix { len: imatrix.len(), n_per_row });
    }
    // SAFETY: pure function of the id, which is one of ggml's.
    if imatrix.is_none() && unsafe { sys::ggml_quantize_requires_imatrix(ty.id()) } {
        return Err(GgmlError::NeedsImatrix { ty });
    }
    if ty.is_quantized() {
        // Some of ggml's searches abort or read past their tables on NaN.
        if let Some(index) = weights.iter().position(|w| !w.is_finite()) {
            let value = weights[index];
            return Err(GgmlError::NotFinite { ty, index, row: index / n_per_row, value });
        }
    }
    let rows = weights.len() / n_per_row;
    let mut out = vec![0u8; rows * row_size];
    if rows == 0 {
        return Ok(out);
    }
    // SAFETY: `weights` holds rows * n_per_row values, `out` rows * row_size bytes, `imatrix` n_per_row
    // values or null, as ggml_quantize_chunk reads and writes; n_per_row is a multiple of the block.
    // The call initialises the type's tables under ggml's own lock. The global allocator returns at
    // least 8-byte aligned memory on the supported platforms, which is all that the blocks need.
    let written = unsafe {
        sys::ggml_quantize_chunk(
            ty.id(),
            weights.as_ptr(),
            out.as_mut_ptr().cast(),
            0,
            rows as i64,
            n_per_row as i64,
            imatrix.map_or(std::ptr::null(), <[f32]>::as_ptr),
        )
    };
    debug_assert_eq!(written, out.len());
    Ok(out)
}

/// Decodes blocks of `ty` to f32; the result has `data.len() / type_size * block_size` values.
pub fn dequantize(ty: GgmlType, data: &[u8]) -> Result<Vec<f32>, GgmlError> {
    let blocks = ty.blocks_in(data)?;
    let n = blocks * ty.block_size();
    if ty == GgmlType::F32 {
        return Ok(data.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect());
    }
    let to_float = ty.traits().to_float.ok_or(GgmlError::NotReadable { ty })?;
    let data = aligned(data);
    let mut out = vec![0f32; n];
    if n > 0 {
        // SAFETY: to_float reads `blocks` blocks at an aligned address and writes n values.
        unsafe { to_float(data.as_ptr().cast(), out.as_mut_ptr(), n as i64) };
    }
    Ok(out)
}

/// Checks blocks for non-finite values and invalid codes, as llama.cpp's `--check-tensors` does.
pub fn validate(ty: GgmlType, data: &[u8]) -> Result<(), GgmlError> {
    ty.blocks_in(data)?;
    let data = aligned(data);
    // SAFETY: the length is a whole number of blocks, the address aligned.
    if unsafe { sys::ggml_validate_row_data(ty.id(), data.as_ptr().cast(), data.len()) } {
        Ok(())
    } else {
        Err(GgmlError::Invalid { ty })
    }
}

/// The same bytes at an address that a block may have.
fn aligned(data: &[u8]) -> Cow<'_, [u8]> {
    if data.as_ptr().align_offset(BLOCK_ALIGN) == 0 { Cow::Borrowed(data) } else { Cow::Owned(data.to_vec()) }
}

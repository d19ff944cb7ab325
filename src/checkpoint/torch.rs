//! PyTorch's `.bin` as torch.save writes it since 1.6: a zip archive with a pickle that names tensors, and an uncompressed
//! entry for each storage, so that tensors lie in the file as they do in safetensors.
use super::{Dtype, pickle};
use std::collections::{HashMap, HashSet};
use std::io::{Cursor, Read};
use std::ops::Range;
use zip::{CompressionMethod, ZipArchive};

/// A tensor's name, type, shape and bytes in the file.
pub(super) type Found = (String, Dtype, Vec<usize>, Range<usize>);

/// A pickle of names and numbers: longer ones are none.
const LONGEST_PICKLE: u64 = 256 << 20;

/// The tensors in `file`, all of it.
///
/// # Errors
/// In words: it is no such archive, or holds anything but plain tensors.
pub(super) fn tensors(file: &[u8]) -> Result<Vec<Found>, String> {
    // How pickles of the old format begin: its magic number.
    if file.starts_with(&[0x80, 2, 0x8a, 10]) {
        let what = "PyTorch's format from before 1.6, which is not read";
        return Err(format!("{what}: load the model with transformers and save it again (save_pretrained)"));
    }
    let damaged =
        |e: zip::result::ZipError| format!("no archive of torch.save: {e}; it may be truncated, download it again");
    let mut archive = ZipArchive::new(Cursor::new(file)).map_err(damaged)?;
    if archive.has_duplicate_names() {
        return Err("its archive has two entries of one name".into());
    }
    if archive.has_overlapping_entries().map_err(damaged)? {
        return Err("entries of its archive overlap".into());
    }
    let mut entries = HashMap::new();
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(damaged)?;
        let name = entry.name().map_err(damaged)?.into_owned();
        if entry.encrypted() || entry.compression() != CompressionMethod::Stored {
            return Err(format!(
                "entry {name} of its archive is compressed or encrypted, which torch.save never writes"
            ));
        }
        let start = entry.data_start().and_then(|at| usize::try_from(at).ok());
        let range = start.and_then(|start| Some(start..start.checked_add(usize::try_from(entry.size()).ok()?)?));
        let range = range.filter(|r| r.end <= file.len()).ok_or_else(|| format!("entry {name} lies beyond its end"))?;
        entries.insert(name, range);
    }
    let root = entries.keys().find_map(|name| Some(name.strip_suffix("/data.pkl")?.to_string()));
    let root = root.ok_or("no archive of torch.save: it has no data.pkl")?;
    if let Some(range) = entries.get(&format!("{root}/byteorder"))
        && &file[range.clone()] != b"little"
    {
        return Err("its numbers are not little-endian; save it on another machine".into());
    }
    let mut text = Vec::new();
    let entry = archive.by_name(&format!("{root}/data.pkl")).map_err(damaged)?;
    // Through the crate, which compares the checksum.
    entry.take(LONGEST_PICKLE).read_to_end(&mut text).map_err(|e| format!("its pickle is damaged: {e}"))?;
    let tensors = pickle::tensors(&text)?;

    let mut used = HashSet::new();
    let found = tensors
        .into_iter()
        .map(|(name, t)| {
            let key = format!("{root}/data/{}", t.storage.key);
            let range = entries.get(&key).ok_or_else(|| format!("tensor `{name}`: {key} is missing"))?;
            let bytes = place(&t, range.clone()).map_err(|problem| format!("tensor `{name}`: {problem}"))?;
            used.insert(key);
            Ok((name, t.storage.dtype, t.shape, bytes))
        })
        .collect::<Result<Vec<Found>, String>>()?;
    let data = format!("{root}/data/");
    match entries.keys().find(|name| name.starts_with(&data) && !used.contains(*name)) {
        Some(left) => Err(format!("storage {left} belongs to no tensor")),
        None => Ok(found),
    }
}

/// Where a tensor lies, its storage being `storage`, bytes of the file.
fn place(t: &pickle::PickledTensor, storage: Range<usize>) -> Result<Range<usize>, String> {
    let size = t.storage.dtype.bitsize() / 8;
    if t.storage.len.checked_mul(size) != Some(storage.len()) {
        let (len, dtype) = (t.storage.len, t.storage.dtype);
        return Err(format!("its storage should hold {len} values {dtype:?}, but has {} bytes", storage.len()));
    }
    let mut elements = 1usize;
    let mut contiguous = t.shape.len() == t.strides.len();
    for (&n, &stride) in t.shape.iter().zip(&t.strides).rev() {
        contiguous &= n == 1 || stride == elements;
        elements = elements.checked_mul(n).ok_or("its shape is beyond all memory")?;
    }
    if !contiguous && elements > 0 {
        let (shape, strides) = (&t.shape, &t.strides);
        return Err(format!("is not contiguous (shape {shape:?}, strides {strides:?}): save it with .contiguous()"));
    }
    if t.offset.checked_add(elements).is_none_or(|end| end > t.storage.len) {
        return Err(format!("reaches beyond its storage of {} values", t.storage.len));
    }
    let start = storage.start + t.offset * size;
    Ok(start..start + elements * size)
}

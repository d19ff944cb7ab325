//! Names of a split model's files, as llama.cpp has them: `STEM-00001-of-00003.gguf`.
use super::plan::Planned;
use super::{GgufError, Header, Metadata, ReadError};
use crate::digest::file_name;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The name of one of several files of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardName {
    pub stem: String,
    /// From 1 on.
    pub number: u32,
    pub count: u32,
}

impl ShardName {
    /// Takes a file's name apart; none where it is not a shard's.
    pub fn parse(name: &str) -> Option<Self> {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let read = |digits: &str| {
            let five = digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
            five.then(|| digits.parse::<u32>().ok()).flatten()
        };
        Some(ShardName { stem: stem.into(), number: read(number)?, count: read(count)? })
    }

    /// Shard `number` of the model that as one file would be at `model`.
    pub fn path(model: &Path, number: usize, count: usize) -> PathBuf {
        model.with_file_name(format!("{}-{number:05}-of-{count:05}.gguf", Self::stem_of(model)))
    }

    /// What files that belong to a model are named after: its file's name without `.gguf` and without a shard's number.
    pub fn stem_of(model: &Path) -> String {
        let name = file_name(model);
        let stem = || model.file_stem().map_or_else(|| "model".into(), |s| s.to_string_lossy().into_owned());
        Self::parse(&name).map_or_else(stem, |shard| shard.stem)
    }
}

/// What a shard's metadata say about the set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ShardKeys {
    pub number: Option<u64>,
    pub count: u64,
    pub tensors: Option<u64>,
}

impl ShardKeys {
    pub fn read(metadata: &Metadata) -> Self {
        let number = |key: &str| metadata.u64(key);
        ShardKeys {
            number: number("split.no"),
            count: number("split.count").unwrap_or(1),
            tensors: number("split.tensors.count"),
        }
    }

    /// Checks that the file at `shard` is number `place` (from 0 on) of the set that `self`, of the file at `first`, is of.
    pub fn check(&self, first: &Path, shard: &Path, place: u64, found: &Self) -> Result<(), ReadError> {
        let set = |keys: &Self| (keys.count, keys.tensors);
        let no = found.number.map_or("none".into(), |n| (n + 1).to_string());
        let what = if set(self) != set(found) {
            "it is one of another set: its split.count or split.tensors.count differs".to_string()
        } else if found.number.is_some_and(|no| no != place) {
            format!("it says that it is shard {no}, its name says {}", place + 1)
        } else {
            return Ok(());
        };
        let what = format!("does not belong to {}: {what}; fetch it again", first.display());
        Err(ReadError::Unfit { path: shard.into(), what })
    }
}

/// The number of a shard has 16 bits.
const MOST: usize = u16::MAX as usize;

/// A file of a model that is written.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardPlan {
    pub path: PathBuf,
    pub metadata: Metadata,
    /// Its tensors' places in the plan.
    pub tensors: Range<usize>,
    /// Of the whole file.
    pub bytes: u64,
}

/// The files of a model with `metadata` and the tensors of `plan`, which as one file would be at `model`: as few as hold
/// `largest` bytes at most, in the plan's order. A tensor that is larger has a file of its own. Without `largest`, and
/// where everything fits into one file, it is one at `model`; of several the first has all metadata.
///
/// # Errors
/// There would be more files than can be numbered.
pub fn shards(
    model: &Path,
    metadata: Metadata,
    plan: &[Planned],
    largest: Option<u64>,
) -> Result<Vec<ShardPlan>, GgufError> {
    let largest = largest.unwrap_or(u64::MAX);
    let alignment = Header::new(metadata.clone()).alignment();
    let keys = |no: usize, count: usize| {
        let mut keys = if no == 0 { metadata.clone() } else { Metadata::default() };
        // In llama-gguf-split's order.
        keys.set("split.no", no as u16).set("split.tensors.count", plan.len() as i32);
        keys.set("split.count", count as u16);
        keys
    };
    let header = |no: usize| Header::new(keys(no, 1)).encode_unpadded().len() as u64;
    let size = |(header, data): (u64, u64)| header.next_multiple_of(alignment) + data;
    let mut cuts: Vec<(Range<usize>, u64)> = Vec::new();
    let (mut start, mut bytes) = (0, (header(0), 0));
    for (i, tensor) in plan.iter().enumerate() {
        let (line, data) = (tensor.listed_bytes(), tensor.bytes().next_multiple_of(alignment));
        if start < i && size((bytes.0 + line, bytes.1 + data)) > largest {
            cuts.push((start..i, size(bytes)));
            (start, bytes) = (i, (header(1), 0));
        }
        bytes = (bytes.0 + line, bytes.1 + data);
    }
    cuts.push((start..plan.len(), size(bytes)));
    if let [(tensors, bytes)] = cuts.as_slice() {
        return Ok(vec![ShardPlan { path: model.into(), metadata, tensors: tensors.clone(), bytes: *bytes }]);
    }
    let count = cuts.len();
    if count > MOST {
        return Err(GgufError::Shards { count, most: MOST });
    }
    let shard = |(no, (tensors, bytes)): (usize, (Range<usize>, u64))| ShardPlan {
        path: ShardName::path(model, no + 1, count),
        metadata: keys(no, count),
        tensors,
        bytes,
    };
    Ok(cuts.into_iter().enumerate().map(shard).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_llama_cpps() {
        let name = ShardName::parse("Qwen2-VL-7B-MBQ3-00002-of-00003.gguf").unwrap();
        assert_eq!((name.stem.as_str(), name.number, name.count), ("Qwen2-VL-7B-MBQ3", 2, 3));
        for no in
            ["model.gguf", "model-1-of-3.gguf", "model-00001-of-00003", "00001-of-00003.gguf", "m-0000a-of-00003.gguf"]
        {
            assert_eq!(ShardName::parse(no), None, "{no}");
        }
        assert_eq!(ShardName::path(Path::new("d/m.gguf"), 1, 2), Path::new("d/m-00001-of-00002.gguf"));
        assert_eq!(ShardName::path(Path::new("d/m-00001-of-00002.gguf"), 2, 2), Path::new("d/m-00002-of-00002.gguf"));
        assert_eq!(ShardName::stem_of(Path::new("d/m-f16.gguf")), "m-f16");
    }
}

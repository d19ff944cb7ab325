//! The header of a GGUF file to be written: metadata and the list of tensors.
//!
//! The data is not held here: write [`Header::encode`], then each tensor's bytes in the order of
//! [`Header::add_tensor`], each padded to [`Header::alignment`]. The crate gguf-rs refuses types that it does not
//! know, MBQ3 among them, and ggml's own writer cuts strings at a zero byte: so both directions stand here.
use super::GgufError;
use super::value::{Array, Value, string};
use crate::ggml::GgmlType;

/// Where a tensor's data may begin, unless `general.alignment` says otherwise.
pub(super) const ALIGNMENT: u64 = 32;
/// ggml's limits of a name's bytes and of a tensor's dimensions.
const NAME: usize = 63;
pub(super) const DIMENSIONS: usize = 4;

/// Keys and values in the file's order; no key stands twice.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata(Vec<(String, Value)>);

impl Metadata {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// Sets a key; one that exists keeps its place.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        match self.0.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value.into(),
            None => self.0.push((key.into(), value.into())),
        }
        self
    }

    /// Appends a key that does not stand yet: [`Self::set`] looks at all of them, which many keys make slow.
    pub(super) fn push(&mut self, key: String, value: Value) {
        self.0.push((key, value));
    }

    /// Sets an array.
    pub fn set_array(&mut self, key: &str, values: impl Into<Array>) -> &mut Self {
        self.set(key, Value::Array(values.into()))
    }

    /// Inserts new keys before the first for which `at` holds, or behind all.
    pub fn insert_before<'k>(&mut self, at: impl Fn(&str) -> bool, pairs: impl IntoIterator<Item = (&'k str, Value)>) {
        let place = self.0.iter().position(|(key, _)| at(key)).unwrap_or(self.0.len());
        self.0.splice(place..place, pairs.into_iter().map(|(key, value)| (key.to_string(), value)));
    }

    /// Removes the keys for which `out` holds.
    pub fn remove(&mut self, out: impl Fn(&str) -> bool) {
        self.0.retain(|(key, _)| !out(key));
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v))
    }

    pub fn str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    pub fn u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// `general.architecture`, or an empty string.
    pub fn architecture(&self) -> &str {
        self.str("general.architecture").unwrap_or_default()
    }

    /// Whether it is a vision file's (mmproj), not a language model's.
    pub fn is_projector(&self) -> bool {
        self.architecture() == "clip"
    }
}

/// A tensor of the list.
#[derive(Debug, Clone, PartialEq)]
struct ListedTensor {
    name: String,
    ty: GgmlType,
    /// The row length first.
    shape: Vec<u64>,
    /// From the beginning of the data, bytes.
    offset: u64,
}

/// Metadata and tensors of a file to be written.
#[derive(Debug, Clone, Default)]
pub struct Header {
    pub metadata: Metadata,
    tensors: Vec<ListedTensor>,
    names: std::collections::HashSet<String>,
    /// Of all data so far, padding included.
    end: u64,
}

impl Header {
    pub fn new(metadata: Metadata) -> Self {
        Header { metadata, ..Header::default() }
    }

    /// Multiple at which every tensor's data begins, bytes.
    pub fn alignment(&self) -> u64 {
        self.metadata.u64("general.alignment").filter(|a| a.is_power_of_two()).unwrap_or(ALIGNMENT)
    }

    /// Lists a tensor. `shape` is in ggml's order: the row length comes first. Set the metadata's alignment before.
    ///
    /// # Errors
    /// A name that ggml does not take, or that is listed; a shape whose rows `ty` does not fit or that is too large.
    pub fn add_tensor(&mut self, name: &str, ty: GgmlType, shape: &[usize]) -> Result<(), GgufError> {
        let fail = |problem: String| GgufError::Entry { tensor: name.into(), problem };
        if name.is_empty() || name.len() > NAME {
            return Err(fail(format!("names have 1 to {NAME} bytes")));
        }
        if shape.is_empty() || shape.len() > DIMENSIONS {
            return Err(fail(format!("shape {shape:?}: 1 to {DIMENSIONS} dimensions")));
        }
        let row = ty.row_size(shape[0]).map_err(|e| fail(e.to_string()))?;
        let bytes = shape[1..].iter().try_fold(row, |n, &d| n.checked_mul(d)).filter(|&n| n > 0 && n < 1 << 48);
        let bytes = bytes.ok_or_else(|| fail(format!("shape {shape:?}: zero or too many elements")))? as u64;
        if !self.names.insert(name.into()) {
            return Err(fail("listed twice".into()));
        }
        // ggml counts no dimensions behind the last that is not 1.
        let rank = shape.iter().rposition(|&d| d != 1).map_or(1, |last| last + 1);
        let shape = shape[..rank].iter().map(|&d| d as u64).collect();
        self.tensors.push(ListedTensor { name: name.into(), ty, shape, offset: self.end });
        self.end = (self.end + bytes).next_multiple_of(self.alignment());
        Ok(())
    }

    /// Bytes of all tensors' data, padding included.
    pub fn data_bytes(&self) -> u64 {
        self.end
    }

    /// The header's bytes, padded to where the data begins.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.encode_unpadded();
        out.resize((out.len() as u64).next_multiple_of(self.alignment()) as usize, 0);
        out
    }

    pub(super) fn encode_unpadded(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.0.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata.0 {
            string(key.as_bytes(), &mut out);
            out.extend(value.kind().to_le_bytes());
            value.encode(&mut out);
        }
        for t in &self.tensors {
            string(t.name.as_bytes(), &mut out);
            out.extend((t.shape.len() as u32).to_le_bytes());
            t.shape.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend((t.ty as u32).to_le_bytes());
            out.extend(t.offset.to_le_bytes());
        }
        out
    }
}

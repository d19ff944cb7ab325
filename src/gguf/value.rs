//! Metadata values of a GGUF file (the specification is ggml's docs/gguf.md).

/// A metadata value with GGUF's own types, so that what is read can be written again byte by byte.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    /// Meant as UTF-8; tokens of some vocabularies are not.
    String(Vec<u8>),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array as it lies in the file: vocabularies have hundreds of thousands of elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// GGUF's id of the elements' type.
    kind: u32,
    len: u64,
    /// Little-endian numbers; strings as a u64 length and that many bytes each.
    bytes: Vec<u8>,
}

/// GGUF's ids of booleans, strings and arrays.
pub(super) const BOOL: u32 = 7;
pub(super) const STRING: u32 = 8;
pub(super) const ARRAY: u32 = 9;

/// Bytes of a number of type `kind`.
pub(super) fn width(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// The number of type `kind` at the beginning of `b`, which holds at least [`width`] bytes.
pub(super) fn number(kind: u32, b: &[u8]) -> Option<Value> {
    fn first<const N: usize>(b: &[u8]) -> Option<[u8; N]> {
        b.get(..N)?.try_into().ok()
    }
    Some(match kind {
        0 => Value::U8(first::<1>(b)?[0]),
        1 => Value::I8(first::<1>(b)?[0] as i8),
        2 => Value::U16(u16::from_le_bytes(first(b)?)),
        3 => Value::I16(i16::from_le_bytes(first(b)?)),
        4 => Value::U32(u32::from_le_bytes(first(b)?)),
        5 => Value::I32(i32::from_le_bytes(first(b)?)),
        6 => Value::F32(f32::from_le_bytes(first(b)?)),
        7 => Value::Bool(first::<1>(b)?[0] != 0),
        10 => Value::U64(u64::from_le_bytes(first(b)?)),
        11 => Value::I64(i64::from_le_bytes(first(b)?)),
        12 => Value::F64(f64::from_le_bytes(first(b)?)),
        _ => return None,
    })
}

impl Array {
    /// `bytes` holds `len` whole elements: the reader has checked it.
    pub(super) fn raw(kind: u32, len: u64, bytes: Vec<u8>) -> Self {
        Array { kind, len, bytes }
    }

    /// An array of strings.
    pub fn strings<S: AsRef<[u8]>>(values: &[S]) -> Self {
        let mut bytes = Vec::new();
        values.iter().for_each(|v| string(v.as_ref(), &mut bytes));
        Array { kind: STRING, len: values.len() as u64, bytes }
    }

    pub fn len(&self) -> usize {
        self.len as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in order.
    pub fn iter(&self) -> impl Iterator<Item = Value> + '_ {
        let (mut rest, kind) = (self.bytes.as_slice(), self.kind);
        std::iter::from_fn(move || {
            let taken = match width(kind) {
                Some(n) => {
                    let value = number(kind, rest)?;
                    rest = rest.get(n..)?;
                    return Some(value);
                }
                None => usize::try_from(u64::from_le_bytes(rest.get(..8)?.try_into().ok()?)).ok()?,
            };
            let text = rest.get(8..8usize.checked_add(taken)?)?;
            rest = rest.get(8 + taken..)?;
            Some(Value::String(text.to_vec()))
        })
    }
}

impl Value {
    pub(super) fn kind(&self) -> u32 {
        match self {
            Value::U8(_) => 0,
            Value::I8(_) => 1,
            Value::U16(_) => 2,
            Value::I16(_) => 3,
            Value::U32(_) => 4,
            Value::I32(_) => 5,
            Value::F32(_) => 6,
            Value::Bool(_) => 7,
            Value::String(_) => STRING,
            Value::Array(_) => ARRAY,
            Value::U64(_) => 10,
            Value::I64(_) => 11,
            Value::F64(_) => 12,
        }
    }

    /// Appends the value as it stands in a file, behind its type's id.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Value::U8(v) => out.push(*v),
            Value::I8(v) => out.push(*v as u8),
            Value::U16(v) => out.extend(v.to_le_bytes()),
            Value::I16(v) => out.extend(v.to_le_bytes()),
            Value::U32(v) => out.extend(v.to_le_bytes()),
            Value::I32(v) => out.extend(v.to_le_bytes()),
            Value::F32(v) => out.extend(v.to_le_bytes()),
            Value::Bool(v) => out.push((*v).into()),
            Value::String(v) => string(v, out),
            Value::Array(v) => {
                out.extend(v.kind.to_le_bytes());
                out.extend(v.len.to_le_bytes());
                out.extend(&v.bytes);
            }
            Value::U64(v) => out.extend(v.to_le_bytes()),
            Value::I64(v) => out.extend(v.to_le_bytes()),
            Value::F64(v) => out.extend(v.to_le_bytes()),
        }
    }

    /// The value as an unsigned integer, if it is a non-negative one.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            _ => self.as_i64().and_then(|v| u64::try_from(v).ok()),
        }
    }

    /// The value as a signed integer.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Value::I8(v) => Some(v.into()),
            Value::I16(v) => Some(v.into()),
            Value::I32(v) => Some(v.into()),
            Value::I64(v) => Some(v),
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => i64::try_from(v).ok(),
            _ => None,
        }
    }

    /// The value as a number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            Value::U64(v) => Some(v as f64),
            _ => self.as_i64().map(|v| v as f64),
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// The value as a string, if it is one and UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(v) => std::str::from_utf8(v).ok(),
            _ => None,
        }
    }

    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Value::Array(v) => Some(v),
            _ => None,
        }
    }
}

/// Appends a string as GGUF has it.
pub(super) fn string(text: &[u8], out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

impl From<&str> for Value {
    fn from(v: &str) -> Self {
        Value::String(v.into())
    }
}

impl From<&String> for Value {
    fn from(v: &String) -> Self {
        v.as_str().into()
    }
}

impl From<String> for Value {
    fn from(v: String) -> Self {
        Value::String(v.into())
    }
}

macro_rules! from {
    ($($ty:ty, $variant:ident, $kind:literal;)*) => {$(
        impl From<$ty> for Value {
            fn from(v: $ty) -> Self {
                Value::$variant(v)
            }
        }

        impl From<&[$ty]> for Array {
            fn from(values: &[$ty]) -> Self {
                let mut bytes = Vec::with_capacity(values.len() * size_of::<$ty>());
                values.iter().for_each(|v| Value::from(*v).encode(&mut bytes));
                Array { kind: $kind, len: values.len() as u64, bytes }
            }
        }
    )*};
}

from! {
    u8, U8, 0;
    i8, I8, 1;
    u16, U16, 2;
    i16, I16, 3;
    u32, U32, 4;
    i32, I32, 5;
    f32, F32, 6;
    bool, Bool, 7;
    u64, U64, 10;
    i64, I64, 11;
    f64, F64, 12;
}

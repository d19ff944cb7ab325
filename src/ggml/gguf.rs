//! The header of a GGUF file: metadata and tensor list, laid out by ggml itself.
//!
//! The tensor data is not held here: write [`Gguf::meta`], then each tensor's bytes in the order of
//! [`Gguf::add_tensor`], each padded to [`Gguf::alignment`].

use super::{GgmlError, GgmlType, sys};
use std::ffi::{CString, c_char};
use std::io::{self, Write};
use std::ptr::NonNull;

/// A GGUF header under construction.
pub struct Gguf {
    context: NonNull<sys::gguf_context>,
}

// SAFETY: the context is plain memory owned by this value; ggml keeps no thread affinity, and `&Gguf`
// only reads it.
unsafe impl Send for Gguf {}
unsafe impl Sync for Gguf {}

impl Drop for Gguf {
    fn drop(&mut self) {
        // SAFETY: made by gguf_init_empty, freed once.
        unsafe { sys::gguf_free(self.context.as_ptr()) }
    }
}

impl Default for Gguf {
    fn default() -> Self {
        Self::new()
    }
}

macro_rules! setters {
    ($($(#[$doc:meta])* $set:ident, $arr:ident, $rust:ty, $c_set:ident, $c_type:ident;)*) => {$(
        $(#[$doc])*
        pub fn $set(&mut self, key: &str, value: $rust) -> Result<&mut Self, GgmlError> {
            let key = c_key(key)?;
            // SAFETY: a live context, a NUL-terminated key that ggml copies.
            unsafe { sys::$c_set(self.context.as_ptr(), key.as_ptr(), value) };
            Ok(self)
        }

        /// The same for an array of values.
        pub fn $arr(&mut self, key: &str, values: &[$rust]) -> Result<&mut Self, GgmlError> {
            let key = c_key(key)?;
            // SAFETY: ggml copies `values.len()` elements of that type; bool is one byte in both.
            unsafe {
                sys::gguf_set_arr_data(
                    self.context.as_ptr(),
                    key.as_ptr(),
                    sys::$c_type,
                    values.as_ptr().cast(),
                    values.len(),
                );
            }
            Ok(self)
        }
    )*};
}

impl Gguf {
    /// An empty header.
    pub fn new() -> Self {
        // SAFETY: no preconditions.
        let context = unsafe { sys::gguf_init_empty() };
        // invariant: gguf_init_empty is a C++ `new`, which throws (aborts) rather than return null.
        Self { context: NonNull::new(context).expect("ggml returned no GGUF context") }
    }

    setters! {
        /// Sets a `u8`; a key that exists is replaced (so for every setter).
        set_u8, set_u8_array, u8, gguf_set_val_u8, GGUF_TYPE_UINT8;
        /// Sets an `i8`.
        set_i8, set_i8_array, i8, gguf_set_val_i8, GGUF_TYPE_INT8;
        /// Sets a `u16`.
        set_u16, set_u16_array, u16, gguf_set_val_u16, GGUF_TYPE_UINT16;
        /// Sets an `i16`.
        set_i16, set_i16_array, i16, gguf_set_val_i16, GGUF_TYPE_INT16;
        /// Sets a `u32`.
        set_u32, set_u32_array, u32, gguf_set_val_u32, GGUF_TYPE_UINT32;
        /// Sets an `i32`.
        set_i32, set_i32_array, i32, gguf_set_val_i32, GGUF_TYPE_INT32;
        /// Sets a `u64`.
        set_u64, set_u64_array, u64, gguf_set_val_u64, GGUF_TYPE_UINT64;
        /// Sets an `i64`.
        set_i64, set_i64_array, i64, gguf_set_val_i64, GGUF_TYPE_INT64;
        /// Sets an `f32`.
        set_f32, set_f32_array, f32, gguf_set_val_f32, GGUF_TYPE_FLOAT32;
        /// Sets an `f64`.
        set_f64, set_f64_array, f64, gguf_set_val_f64, GGUF_TYPE_FLOAT64;
        /// Sets a `bool`.
        set_bool, set_bool_array, bool, gguf_set_val_bool, GGUF_TYPE_BOOL;
    }

    /// Sets a string. ggml's interface takes C strings, so a NUL inside is an error.
    pub fn set_str(&mut self, key: &str, value: &str) -> Result<&mut Self, GgmlError> {
        let (c_key, value) = (c_key(key)?, c_value(key, value)?);
        // SAFETY: a live context and NUL-terminated strings that ggml copies.
        unsafe { sys::gguf_set_val_str(self.context.as_ptr(), c_key.as_ptr(), value.as_ptr()) };
        Ok(self)
    }

    /// Sets an array of strings.
    pub fn set_str_array<S: AsRef<str>>(&mut self, key: &str, values: &[S]) -> Result<&mut Self, GgmlError> {
        let strings = values.iter().map(|v| c_value(key, v.as_ref())).collect::<Result<Vec<_>, _>>()?;
        let mut pointers: Vec<*const c_char> = strings.iter().map(|s| s.as_ptr()).collect();
        let key = c_key(key)?;
        // SAFETY: `pointers` holds that many NUL-terminated strings, alive until the end of the call.
        unsafe {
            sys::gguf_set_arr_str(self.context.as_ptr(), key.as_ptr(), pointers.as_mut_ptr(), pointers.len());
        }
        Ok(self)
    }

    /// Lists a tensor. `shape` is in ggml's order: the row length comes first.
    pub fn add_tensor(&mut self, name: &str, ty: GgmlType, shape: &[usize]) -> Result<&mut Self, GgmlError> {
        let fail = |problem: String| GgmlError::Gguf { what: "tensor", name: name.into(), problem };
        if name.is_empty() || name.len() >= sys::GGML_MAX_NAME as usize {
            return Err(fail(format!("names have 1 to {} bytes", sys::GGML_MAX_NAME - 1)));
        }
        if shape.is_empty() || shape.len() > sys::GGML_MAX_DIMS as usize {
            return Err(fail(format!("shape {shape:?}: 1 to {} dimensions", sys::GGML_MAX_DIMS)));
        }
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if elements.is_none_or(|n| n == 0 || n > i64::MAX as usize / 8) {
            return Err(fail(format!("shape {shape:?}: zero or too many elements")));
        }
        ty.row_size(shape[0]).map_err(|e| fail(e.to_string()))?;
        let c_name = CString::new(name).map_err(|_| fail("NUL inside".into()))?;
        // SAFETY: a live context.
        if unsafe { sys::gguf_find_tensor(self.context.as_ptr(), c_name.as_ptr()) } >= 0 {
            return Err(fail("listed twice".into()));
        }
        let dims: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
        // SAFETY: a ggml context with room for one tensor without data; the tensor's shape was checked
        // above as ggml asserts it; gguf_add_tensor copies the description before the context is freed.
        unsafe {
            let params = sys::ggml_init_params {
                mem_size: sys::ggml_tensor_overhead(),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            };
            let context = sys::ggml_init(params);
            let tensor = sys::ggml_new_tensor(context, ty.id(), dims.len() as i32, dims.as_ptr());
            sys::ggml_set_name(tensor, c_name.as_ptr());
            sys::gguf_add_tensor(self.context.as_ptr(), tensor);
            sys::ggml_free(context);
        }
        Ok(self)
    }

    /// Offset of a tensor's data from [`Gguf::data_offset`], in bytes.
    pub fn tensor_offset(&self, name: &str) -> Option<u64> {
        let name = CString::new(name).ok()?;
        // SAFETY: a live context; the id is only used when found.
        unsafe {
            let id = sys::gguf_find_tensor(self.context.as_ptr(), name.as_ptr());
            (id >= 0).then(|| sys::gguf_get_tensor_offset(self.context.as_ptr(), id) as u64)
        }
    }

    /// Multiple at which every tensor's data begins, in bytes.
    pub fn alignment(&self) -> usize {
        // SAFETY: a live context.
        unsafe { sys::gguf_get_alignment(self.context.as_ptr()) }
    }

    /// Where the tensor data begins in the file: the length of [`Gguf::meta`].
    pub fn data_offset(&self) -> u64 {
        // SAFETY: a live context.
        unsafe { sys::gguf_get_meta_size(self.context.as_ptr()) as u64 }
    }

    /// The bytes of the header, padded to where the tensor data begins.
    pub fn meta(&self) -> Vec<u8> {
        // SAFETY: gguf_get_meta_data fills exactly gguf_get_meta_size bytes.
        unsafe {
            let mut meta = vec![0u8; sys::gguf_get_meta_size(self.context.as_ptr())];
            sys::gguf_get_meta_data(self.context.as_ptr(), meta.as_mut_ptr().cast());
            meta
        }
    }

    /// Writes [`Gguf::meta`].
    pub fn write_meta(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&self.meta())
    }
}

fn c_key(key: &str) -> Result<CString, GgmlError> {
    let fail = |problem: &str| GgmlError::Gguf { what: "key", name: key.into(), problem: problem.into() };
    // Not a value: ggml reads this key as the file's layout and aborts on other types and sizes.
    if key == "general.alignment" {
        return Err(fail("the alignment is fixed"));
    }
    match CString::new(key) {
        Ok(key) if !key.is_empty() => Ok(key),
        Ok(_) => Err(fail("empty")),
        Err(_) => Err(fail("NUL inside")),
    }
}

fn c_value(key: &str, value: &str) -> Result<CString, GgmlError> {
    CString::new(value).map_err(|_| GgmlError::Gguf {
        what: "value of",
        name: key.into(),
        problem: format!("{value:?} has a NUL inside"),
    })
}

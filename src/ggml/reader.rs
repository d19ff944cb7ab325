//! Reads the header of a GGUF file (metadata and tensor list) through ggml.

use super::{GgmlError, GgmlType, sys};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Value {
    U64(u64),
    I64(i64),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Vec<Value>),
}

impl Value {
    /// The value as an unsigned integer, if it is a non-negative one.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::U64(v) => Some(*v),
            Value::I64(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// The value as a number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::U64(v) => Some(*v as f64),
            Value::I64(v) => Some(*v as f64),
            Value::F64(v) => Some(*v),
            _ => None,
        }
    }

    /// The value as a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(v) => Some(v),
            _ => None,
        }
    }

    /// The elements, if the value is an array.
    pub fn as_array(&self) -> Option<&[Value]> {
        match self {
            Value::Array(v) => Some(v),
            _ => None,
        }
    }
}

/// One entry of the tensor list.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    pub name: String,
    /// ggml's type id; [`TensorInfo::ty`] names it.
    pub type_id: u32,
    /// In ggml's order: the row length comes first; trailing ones are left out.
    pub shape: Vec<usize>,
    /// Where the data begins, in bytes from the start of the file.
    pub offset: u64,
    /// Bytes of data.
    pub size: u64,
}

impl TensorInfo {
    /// The type, if this crate names it.
    pub fn ty(&self) -> Option<GgmlType> {
        GgmlType::from_id(self.type_id)
    }

    /// Number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The header of a GGUF file.
#[derive(Debug, Clone)]
pub struct GgufFile {
    pub path: PathBuf,
    pub version: u32,
    pub metadata: BTreeMap<String, Value>,
    /// In file order.
    pub tensors: Vec<TensorInfo>,
    /// Where the tensor data begins, in bytes.
    pub data_offset: u64,
}

impl GgufFile {
    /// Reads the header; the tensor data is not touched.
    pub fn open(path: &Path) -> Result<Self, GgmlError> {
        let fail = |problem: String| GgmlError::Open { path: path.display().to_string(), problem };
        let length = std::fs::metadata(path).map_err(|e| fail(e.to_string()))?.len();
        let c_path =
            path.to_str().and_then(|p| CString::new(p).ok()).ok_or_else(|| fail("the path is not UTF-8".into()))?;
        let (context, log) = with_log(|| {
            let params = sys::gguf_init_params { no_alloc: true, ctx: std::ptr::null_mut() };
            // SAFETY: a NUL-terminated path; returns null on any error.
            unsafe { sys::gguf_init_from_file(c_path.as_ptr(), params) }
        });
        if context.is_null() {
            return Err(fail(if log.is_empty() { "ggml refuses it".into() } else { log }));
        }
        // SAFETY: a live context that nobody else has.
        let file = unsafe { read(context, path) };
        // SAFETY: as above; freed once.
        unsafe { sys::gguf_free(context) };
        for tensor in &file.tensors {
            if tensor.offset.checked_add(tensor.size).is_none_or(|end| end > length) {
                return Err(fail(format!("tensor {:?} ends behind the end of the file", tensor.name)));
            }
        }
        Ok(file)
    }

    /// The tensor named `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

/// SAFETY: `context` has to be a live GGUF context.
unsafe fn read(context: *const sys::gguf_context, path: &Path) -> GgufFile {
    // SAFETY: every id below is within the counts that ggml reports, and each value is read with the
    // getter of its own type.
    unsafe {
        let metadata = (0..sys::gguf_get_n_kv(context))
            .map(|id| (string(sys::gguf_get_key(context, id)), value(context, id)))
            .collect();
        let data_offset = sys::gguf_get_data_offset(context) as u64;
        let tensors = (0..sys::gguf_get_n_tensors(context))
            .map(|id| {
                let ne = sys::gguf_get_tensor_ne(context, id);
                let ne = std::slice::from_raw_parts(ne, sys::GGML_MAX_DIMS as usize);
                let dims = ne.iter().rposition(|&d| d != 1).map_or(1, |last| last + 1);
                TensorInfo {
                    name: string(sys::gguf_get_tensor_name(context, id)),
                    type_id: sys::gguf_get_tensor_type(context, id) as u32,
                    shape: ne[..dims].iter().map(|&d| d as usize).collect(),
                    offset: data_offset + sys::gguf_get_tensor_offset(context, id) as u64,
                    size: sys::gguf_get_tensor_size(context, id) as u64,
                }
            })
            .collect();
        let version = sys::gguf_get_version(context);
        GgufFile { path: path.to_path_buf(), version, metadata, tensors, data_offset }
    }
}

/// SAFETY: `id` has to be a key of the live `context`.
unsafe fn value(context: *const sys::gguf_context, id: i64) -> Value {
    // SAFETY: each getter is called for the type that ggml reports; scalars are arrays of one element.
    unsafe {
        match sys::gguf_get_kv_type(context, id) {
            sys::GGUF_TYPE_ARRAY => {
                let n = sys::gguf_get_arr_n(context, id);
                let ty = sys::gguf_get_arr_type(context, id);
                if ty == sys::GGUF_TYPE_STRING {
                    let text = |i| Value::String(string(sys::gguf_get_arr_str(context, id, i)));
                    return Value::Array((0..n).map(text).collect());
                }
                if n == 0 {
                    return Value::Array(Vec::new());
                }
                let data = sys::gguf_get_arr_data(context, id);
                Value::Array((0..n).map(|i| number(ty, data, i)).collect())
            }
            sys::GGUF_TYPE_STRING => Value::String(string(sys::gguf_get_val_str(context, id))),
            ty => number(ty, sys::gguf_get_val_data(context, id), 0),
        }
    }
}

/// SAFETY: `data` has to hold more than `i` elements of type `ty`.
unsafe fn number(ty: sys::gguf_type, data: *const c_void, i: usize) -> Value {
    macro_rules! at {
        ($t:ty) => {
            // SAFETY: in bounds by the caller's promise; alignment is not assumed.
            unsafe { data.cast::<$t>().add(i).read_unaligned() }
        };
    }
    match ty {
        sys::GGUF_TYPE_UINT8 => Value::U64(at!(u8).into()),
        sys::GGUF_TYPE_INT8 => Value::I64(at!(i8).into()),
        sys::GGUF_TYPE_UINT16 => Value::U64(at!(u16).into()),
        sys::GGUF_TYPE_INT16 => Value::I64(at!(i16).into()),
        sys::GGUF_TYPE_UINT32 => Value::U64(at!(u32).into()),
        sys::GGUF_TYPE_INT32 => Value::I64(at!(i32).into()),
        sys::GGUF_TYPE_FLOAT32 => Value::F64(at!(f32).into()),
        sys::GGUF_TYPE_BOOL => Value::Bool(at!(u8) != 0),
        sys::GGUF_TYPE_UINT64 => Value::U64(at!(u64)),
        sys::GGUF_TYPE_INT64 => Value::I64(at!(i64)),
        sys::GGUF_TYPE_FLOAT64 => Value::F64(at!(f64)),
        // ggml accepts no other types when it reads a file.
        _ => Value::Array(Vec::new()),
    }
}

/// SAFETY: `text` has to be a NUL-terminated string.
unsafe fn string(text: *const c_char) -> String {
    // SAFETY: by the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Runs `f` with ggml's log captured instead of printed.
fn with_log<T>(f: impl FnOnce() -> T) -> (T, String) {
    // ggml has one log callback per process.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    static LOG: Mutex<String> = Mutex::new(String::new());

    unsafe extern "C" fn append(_: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
        if let Ok(mut log) = LOG.lock() {
            // SAFETY: ggml passes a NUL-terminated string.
            log.push_str(&unsafe { string(text) });
        }
    }

    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // SAFETY: the callback is a plain function that stays valid.
    unsafe { sys::ggml_log_set(Some(append), std::ptr::null_mut()) };
    let result = f();
    // SAFETY: null restores ggml's own logger.
    unsafe { sys::ggml_log_set(None, std::ptr::null_mut()) };
    let text = LOG.lock().map(|mut log| std::mem::take(&mut *log)).unwrap_or_default();
    (result, text.trim().replace('\n', "; "))
}

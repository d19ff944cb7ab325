//! The storage types of tensors.

use super::{GgmlError, sys};
use std::ffi::CStr;

macro_rules! types {
    ($($(#[$doc:meta])* $variant:ident = $id:ident, $name:literal;)*) => {
        /// A storage type that ggml knows, by its id in GGUF files.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        #[allow(non_camel_case_types)]
        #[repr(u32)]
        pub enum GgmlType { $($(#[$doc])* $variant = sys::$id as u32,)* }

        impl GgmlType {
            /// Every type.
            pub const ALL: &'static [GgmlType] = &[$(GgmlType::$variant),*];

            /// The name, in lower case, as options spell it (`q3_k`).
            pub fn name(self) -> &'static str {
                match self { $(GgmlType::$variant => $name,)* }
            }
        }
    };
}

types! {
    F32 = GGML_TYPE_F32, "f32";
    F16 = GGML_TYPE_F16, "f16";
    BF16 = GGML_TYPE_BF16, "bf16";
    F64 = GGML_TYPE_F64, "f64";
    I8 = GGML_TYPE_I8, "i8";
    I16 = GGML_TYPE_I16, "i16";
    I32 = GGML_TYPE_I32, "i32";
    I64 = GGML_TYPE_I64, "i64";
    Q4_0 = GGML_TYPE_Q4_0, "q4_0";
    Q4_1 = GGML_TYPE_Q4_1, "q4_1";
    Q5_0 = GGML_TYPE_Q5_0, "q5_0";
    Q5_1 = GGML_TYPE_Q5_1, "q5_1";
    Q8_0 = GGML_TYPE_Q8_0, "q8_0";
    Q2_K = GGML_TYPE_Q2_K, "q2_k";
    Q3_K = GGML_TYPE_Q3_K, "q3_k";
    Q4_K = GGML_TYPE_Q4_K, "q4_k";
    Q5_K = GGML_TYPE_Q5_K, "q5_k";
    Q6_K = GGML_TYPE_Q6_K, "q6_k";
    IQ1_S = GGML_TYPE_IQ1_S, "iq1_s";
    IQ1_M = GGML_TYPE_IQ1_M, "iq1_m";
    IQ2_XXS = GGML_TYPE_IQ2_XXS, "iq2_xxs";
    IQ2_XS = GGML_TYPE_IQ2_XS, "iq2_xs";
    IQ2_S = GGML_TYPE_IQ2_S, "iq2_s";
    IQ3_XXS = GGML_TYPE_IQ3_XXS, "iq3_xxs";
    IQ3_S = GGML_TYPE_IQ3_S, "iq3_s";
    IQ4_NL = GGML_TYPE_IQ4_NL, "iq4_nl";
    IQ4_XS = GGML_TYPE_IQ4_XS, "iq4_xs";
    TQ1_0 = GGML_TYPE_TQ1_0, "tq1_0";
    TQ2_0 = GGML_TYPE_TQ2_0, "tq2_0";
    MXFP4 = GGML_TYPE_MXFP4, "mxfp4";
    /// 128 weights in 52 bytes: two halfs and 3-bit codes. Added by our patch.
    MBQ3 = GGML_TYPE_MBQ3, "mbq3";
}

impl GgmlType {
    /// ggml's id, as stored in GGUF files.
    pub fn id(self) -> sys::ggml_type {
        self as sys::ggml_type
    }

    /// The type with ggml's id `id`, if this crate names it.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|ty| *ty as u32 == id)
    }

    /// The type named `name`, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|ty| ty.name().eq_ignore_ascii_case(name))
    }

    /// ggml's own spelling of the name (`q3_K`).
    pub fn ggml_name(self) -> &'static str {
        // SAFETY: ggml returns a static C string for each of its types.
        unsafe { CStr::from_ptr(sys::ggml_type_name(self.id())) }.to_str().unwrap_or(self.name())
    }

    /// Weights in a block; a row's length has to be a multiple of it.
    pub fn block_size(self) -> usize {
        self.traits().blck_size as usize
    }

    /// Bytes of a block.
    pub fn type_size(self) -> usize {
        self.traits().type_size
    }

    /// Whether values share scales in blocks (not so for floats and integers).
    pub fn is_quantized(self) -> bool {
        self.traits().is_quantized
    }

    /// Bits that a weight takes on average.
    pub fn bits_per_weight(self) -> f64 {
        self.type_size() as f64 * 8.0 / self.block_size() as f64
    }

    /// Whether rows of `n_per_row` weights can be stored.
    pub fn fits(self, n_per_row: usize) -> bool {
        n_per_row.is_multiple_of(self.block_size())
    }

    /// Bytes of a row of `n_per_row` weights.
    pub fn row_size(self, n_per_row: usize) -> Result<usize, GgmlError> {
        if !self.fits(n_per_row) {
            let block = self.block_size();
            return Err(GgmlError::RowSize { ty: self, n_per_row, block });
        }
        Ok(n_per_row / self.block_size() * self.type_size())
    }

    /// Whether `quantize_rows` can make it.
    pub(super) fn is_writable(self) -> bool {
        use GgmlType::*;
        self.is_quantized() || matches!(self, F32 | F16 | BF16)
    }

    /// The number of blocks in `data`.
    pub(super) fn blocks_in(self, data: &[u8]) -> Result<usize, GgmlError> {
        let block = self.type_size();
        if !data.len().is_multiple_of(block) {
            return Err(GgmlError::ByteCount { ty: self, len: data.len(), block });
        }
        Ok(data.len() / block)
    }

    pub(super) fn traits(self) -> &'static sys::ggml_type_traits {
        // SAFETY: a pointer into ggml's constant table, for an id within it.
        unsafe { &*sys::ggml_get_type_traits(self.id()) }
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for GgmlType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::from_name(name).ok_or_else(|| format!("unknown tensor type {name:?}"))
    }
}

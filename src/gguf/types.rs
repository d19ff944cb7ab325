//! What `--type` may be: one storage type for every linear of the decoder, or one of llama-quantize's mixes.
use crate::ggml::GgmlType;
use std::fmt;
use std::str::FromStr;

/// The kinds of tensor that a type is chosen for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Embedding,
    /// The output head, when it is not the embedding.
    Output,
    /// A linear of decoder block `layer`.
    Linear(LinearKind, usize),
}

/// The linears of a decoder block that the mixes tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearKind {
    AttentionV,
    AttentionOutput,
    FfnDown,
    /// q, k, gate, up.
    Other,
}

/// The language model's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// Every linear of the decoder has this type.
    Plain(GgmlType),
    /// Q4_K with Q6_K in part of the layers.
    Q4KM,
    /// Q3_K with Q4_K and Q5_K in the tensors that suffer most.
    Q3KM,
    /// Q3_K throughout; the output (or tied embedding) in Q6_K.
    Q3KS,
}

/// Types that every linear may have, with llama.cpp's file type id and its name in file names.
const PLAIN: [(GgmlType, u32, &str); 14] = [
    (GgmlType::MBQ3, 192, "MBQ3"),
    (GgmlType::F32, 0, "F32"),
    (GgmlType::F16, 1, "F16"),
    (GgmlType::BF16, 32, "BF16"),
    (GgmlType::Q8_0, 7, "Q8_0"),
    (GgmlType::Q6_K, 18, "Q6_K"),
    (GgmlType::Q5_K, 16, "Q5_K"),
    (GgmlType::Q4_K, 14, "Q4_K"),
    (GgmlType::Q4_0, 2, "Q4_0"),
    (GgmlType::Q3_K, 11, "Q3_K"),
    (GgmlType::Q2_K, 21, "Q2_K"),
    (GgmlType::IQ4_XS, 30, "IQ4_XS"),
    (GgmlType::IQ3_S, 26, "IQ3_S"),
    (GgmlType::IQ3_XXS, 23, "IQ3_XXS"),
];
const MIXES: [(FileType, u32, &str); 3] =
    [(FileType::Q4KM, 15, "Q4_K_M"), (FileType::Q3KM, 12, "Q3_K_M"), (FileType::Q3KS, 11, "Q3_K_S")];

impl FileType {
    /// Every choice, in the order in which messages list them.
    pub fn all() -> impl Iterator<Item = FileType> {
        PLAIN.iter().map(|p| FileType::Plain(p.0)).chain(MIXES.iter().map(|m| m.0))
    }

    fn row(self) -> (u32, &'static str) {
        let plain = PLAIN.iter().map(|&(t, id, name)| (FileType::Plain(t), id, name));
        // Types outside the list cannot be parsed; a library caller that makes one gets ggml's own name.
        plain.chain(MIXES).find(|r| r.0 == self).map_or((1024, "custom"), |(_, id, name)| (id, name))
    }

    /// llama.cpp's `general.file_type`.
    pub fn id(self) -> u32 {
        self.row().0
    }

    /// The name as file names carry it (`Q3_K_M`).
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The type that `role` asks for, before its rows are known to fit. `layers` is the number of decoder blocks,
    /// `gqa` the query heads per key/value head, `cols` the row length, `tied` whether the output head is the
    /// embedding.
    ///
    /// The mixes follow llama.cpp's `llama_tensor_get_type_impl`, so that a file equals what llama-quantize makes
    /// of the f16 file. A plain quantised type has the same embedding and output whatever it is; plain f32, f16 and
    /// bf16 keep them too, for such a file is asked for to be (nearly) lossless.
    pub fn tensor_type(self, role: Role, layers: usize, cols: usize, tied: bool, large: bool) -> GgmlType {
        use GgmlType::*;
        let high = |fits_into: GgmlType| if fits_into.fits(cols) { Q6_K } else { Q8_0 };
        let (base, is_output) = match self {
            FileType::Plain(t) => {
                return match role {
                    Role::Linear(..) => t,
                    _ if matches!(t, F32 | F16 | BF16) => t,
                    _ => high(Q6_K),
                };
            }
            FileType::Q4KM => (Q4_K, role == Role::Output || tied),
            FileType::Q3KM | FileType::Q3KS => (Q3_K, role == Role::Output || tied),
        };
        let Role::Linear(linear, layer) = role else {
            return if is_output { high(base) } else { base };
        };
        let more_bits = layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
        let mixed = match (self, linear) {
            (FileType::Q4KM, LinearKind::AttentionV | LinearKind::FfnDown) if more_bits => Q6_K,
            (FileType::Q3KM, LinearKind::AttentionV) => {
                if layer < 2 {
                    Q5_K
                } else {
                    Q4_K
                }
            }
            (FileType::Q3KM, LinearKind::FfnDown) => {
                if layer < layers / 16 {
                    Q5_K
                } else {
                    Q4_K
                }
            }
            (FileType::Q3KM, LinearKind::AttentionOutput) => Q4_K,
            _ => base,
        };
        // llama.cpp calls 80 layers "70B", where v is an eighth of q and cheap to keep.
        if large && linear == LinearKind::AttentionV && matches!(mixed, Q3_K | Q4_K) { Q5_K } else { mixed }
    }
}

impl fmt::Display for FileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name().to_lowercase())
    }
}

impl FromStr for FileType {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        FileType::all().find(|t| t.name().eq_ignore_ascii_case(s)).ok_or_else(|| {
            format!("unknown type; one of {}", FileType::all().map(|t| t.to_string()).collect::<Vec<_>>().join(", "))
        })
    }
}

/// The type that rows of `cols` values get when `wanted` was asked for: `wanted` where its blocks fit, else the
/// nearest type of smaller blocks (the same table as llama-quantize), else f16.
pub fn fitting(wanted: GgmlType, cols: usize) -> GgmlType {
    use GgmlType::*;
    if wanted.fits(cols) {
        return wanted;
    }
    let smaller = match wanted {
        IQ3_XXS | IQ3_S | IQ4_XS => IQ4_NL,
        MBQ3 | Q2_K | Q3_K => Q4_0,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        _ => F16,
    };
    if smaller.fits(cols) { smaller } else { F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for t in FileType::all() {
            assert_eq!(t.to_string().parse::<FileType>(), Ok(t));
        }
        assert_eq!("Q3_K_M".parse::<FileType>(), Ok(FileType::Q3KM));
        assert!("q3".parse::<FileType>().unwrap_err().contains("q3_k_s"));
    }

    #[test]
    fn rows_that_do_not_fit_fall_back() {
        // 896 = OneVision-0.5B's width: 7 blocks of 128, no whole number of 256.
        assert_eq!(fitting(GgmlType::MBQ3, 896), GgmlType::MBQ3);
        assert_eq!(fitting(GgmlType::Q3_K, 896), GgmlType::Q4_0);
        assert_eq!(fitting(GgmlType::Q6_K, 896), GgmlType::Q8_0);
        assert_eq!(fitting(GgmlType::IQ3_S, 576), GgmlType::IQ4_NL);
        assert_eq!(fitting(GgmlType::MBQ3, 40), GgmlType::F16);
        assert_eq!(fitting(GgmlType::Q8_0, 40), GgmlType::F16);
    }

    /// Spot values of llama-quantize's choice for 12 layers; tests/convert.rs compares whole files.
    #[test]
    fn mixes() {
        let t = |f: FileType, l, i| f.tensor_type(Role::Linear(l, i), 12, 768, true, false);
        assert_eq!(t(FileType::Q4KM, LinearKind::FfnDown, 0), GgmlType::Q6_K);
        assert_eq!(t(FileType::Q4KM, LinearKind::FfnDown, 2), GgmlType::Q4_K);
        assert_eq!(t(FileType::Q4KM, LinearKind::AttentionV, 3), GgmlType::Q6_K);
        assert_eq!(t(FileType::Q3KM, LinearKind::AttentionV, 1), GgmlType::Q5_K);
        assert_eq!(t(FileType::Q3KM, LinearKind::AttentionV, 2), GgmlType::Q4_K);
        assert_eq!(t(FileType::Q3KS, LinearKind::AttentionV, 0), GgmlType::Q3_K);
        assert_eq!(t(FileType::Plain(GgmlType::Q3_K), LinearKind::FfnDown, 0), GgmlType::Q3_K);
    }
}

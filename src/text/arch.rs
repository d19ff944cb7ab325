//! What differs between text models, as data: a row for each value of GGUF's `general.architecture`. The facts are those
//! of llama.cpp's `src/models/*.cpp` and of its converter, which decides how the tensors lie.
//!
//! The norms' gains are the stored ones (Gemma's `1 + w` is added by the converter).
use super::LinearName;

/// Which two values of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// i and i + d/2 (ggml's NEOX), as transformers has them.
    Halves,
    /// 2i and 2i + 1 (ggml's NORM): the converter has reordered the rows of q and k.
    Neighbours,
}

/// Which of a token's positions (time, height, width, another) a pair turns by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sections {
    /// There is only one.
    None,
    /// The first pairs by time, the next by height, then by width (M-RoPE).
    Contiguous,
    /// Time, height and width in turn, time again once a section is used up (interleaved M-RoPE).
    Interleaved,
}

/// The MLP's `f` in `down(f(gate) * up)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// GELU by its tanh form.
    GeluTanh,
}

/// Which blocks see only the last `attention.sliding_window` tokens, where the file has that key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sliding {
    /// The key is refused: neither llama.cpp nor GGUF knows which blocks it would be about.
    Refused,
    /// All (Mistral; llama.cpp itself leaves the window out of this architecture).
    All,
    /// All but every sixth, unless `attention.sliding_window_pattern` says otherwise. These blocks have a rotary base of
    /// their own, `rope.freq_base_swa`, and no scaling.
    ButSixth,
}

/// A row of the table.
#[derive(Debug, PartialEq, Eq)]
pub struct TextArch {
    /// `general.architecture`, and the prefix of the metadata keys.
    pub name: &'static str,
    /// Linears that always have a bias.
    pub biased: &'static [LinearName],
    /// Linears that may have one.
    pub may_be_biased: &'static [LinearName],
    /// RMS norms over each head's q and k, before they turn.
    pub qk_norms: bool,
    /// RMS norms between the attention, or the MLP, and the stream: `h = x + norm(attn(norm x))`.
    pub post_norms: bool,
    pub activation: Activation,
    pub pairs: Pairs,
    pub sections: Sections,
    pub sliding: Sliding,
    /// Features are added to a picture's tokens behind the first `n_deepstack_layers` blocks.
    pub deepstack: bool,
    /// Whoever makes the embeddings multiplies tokens' rows by sqrt(hidden), a picture's not.
    pub scaled_embedding: bool,
}

const QKV: &[LinearName] = &[LinearName::Q, LinearName::K, LinearName::V];

/// Qwen2's, from which the others differ.
const QWEN2: TextArch = TextArch {
    name: "qwen2",
    biased: QKV,
    may_be_biased: &[],
    qk_norms: false,
    post_norms: false,
    activation: Activation::Silu,
    pairs: Pairs::Halves,
    sections: Sections::None,
    sliding: Sliding::Refused,
    deepstack: false,
    scaled_embedding: false,
};

/// Every supported architecture.
pub static ARCHITECTURES: [TextArch; 7] = [
    QWEN2,
    TextArch { name: "qwen2vl", sections: Sections::Contiguous, ..QWEN2 },
    TextArch { name: "qwen3", biased: &[], may_be_biased: QKV, qk_norms: true, ..QWEN2 },
    TextArch {
        name: "qwen3vl",
        biased: &[],
        may_be_biased: QKV,
        qk_norms: true,
        sections: Sections::Interleaved,
        deepstack: true,
        ..QWEN2
    },
    // Mistral too.
    TextArch {
        name: "llama",
        biased: &[],
        may_be_biased: &LinearName::ALL,
        pairs: Pairs::Neighbours,
        sliding: Sliding::All,
        ..QWEN2
    },
    // The converter has taken wqkv apart.
    TextArch { name: "internlm2", biased: &[], may_be_biased: QKV, pairs: Pairs::Neighbours, ..QWEN2 },
    TextArch {
        name: "gemma3",
        biased: &[],
        may_be_biased: QKV,
        qk_norms: true,
        post_norms: true,
        activation: Activation::GeluTanh,
        sliding: Sliding::ButSixth,
        scaled_embedding: true,
        ..QWEN2
    },
];

impl TextArch {
    /// The row of this name.
    pub fn named(name: &str) -> Option<&'static TextArch> {
        ARCHITECTURES.iter().find(|arch| arch.name == name)
    }

    /// Whether the residual stream can be rotated: what a norm behind a part multiplies channel by channel can move
    /// neither into the linear before it nor out of the stream.
    pub fn rotates(&self) -> bool {
        !self.post_norms
    }
}

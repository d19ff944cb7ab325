//! Storage types taken apart so that codes can be chosen one column after the other: how a block's levels follow from
//! its weights, and how levels and codes become bytes.
//!
//! A code stands for the value `d*x + m`, x the code's place in the type's codebook. In simple types (`simple.rs`) d and
//! m are what the file holds. In others a block has sub-blocks (`sub_blocks.rs`), whose d and m are whole multiples of
//! the block's; some of them have codes of four weights together (`grids.rs`).
mod grids;
mod lanes;
mod pack;
mod simple;
mod sub_blocks;

pub use grids::{Grid, Metric, Quad};
pub use lanes::{Codebook, Even, LANES, Lanes, Uneven};
pub use simple::Simple;
pub(crate) use simple::even;
pub use sub_blocks::Candidate;

use crate::ggml::GgmlType;

/// A type whose codes can be chosen with feedback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Simple(Simple),
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Iq3S,
    Iq3Xxs,
}

/// The levels of codes that share them: of a block in simple types, of a sub-block in others. Both numbers are exactly
/// what ggml computes: halfs, or whole multiples of one.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Levels {
    /// Distance of two levels; may be negative.
    pub d: f32,
    /// Value of code 0, in types without sub-blocks or with a minimum; else 0.
    pub m: f32,
}

impl Levels {
    /// The value at `x` of the codebook; in simple types x is the code.
    #[inline(always)]
    pub fn value(self, x: impl Into<f32>) -> f32 {
        self.d * x.into() + self.m
    }
}

/// The halfs that the file holds for a block.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Halfs {
    pub d: f32,
    /// m itself in simple types; what minima are multiples of, negative, in types with sub-blocks.
    pub m: f32,
}

/// A sub-block's whole multiples of its block's halfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Multiples {
    pub d: i8,
    pub m: u8,
}

/// How a block's levels are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// Of simple types by the whole range of the weights (the paper's rule for MBQ3, ggml's for the others); of others
    /// the least weighted squared error over clipped ranges, each improved by least squares, as ggml has it.
    Plain,
    /// The least weighted squared error for simple types, too; of others the sub-blocks' multiples that leave the
    /// feedback with the least error.
    Search,
}

impl Format {
    /// The type `ty`, if it is one of these.
    pub fn of(ty: GgmlType) -> Option<Self> {
        Self::all().find(|format| format.ty() == ty)
    }

    /// Every format.
    pub fn all() -> impl Iterator<Item = Format> {
        use Format::*;
        simple::Simple::ALL.into_iter().map(Format::Simple).chain([Q2K, Q3K, Q4K, Q5K, Q6K, Iq4Nl, Iq4Xs, Iq3S, Iq3Xxs])
    }

    pub fn ty(self) -> GgmlType {
        match self {
            Format::Simple(simple) => simple.ty(),
            Format::Q2K => GgmlType::Q2_K,
            Format::Q3K => GgmlType::Q3_K,
            Format::Q4K => GgmlType::Q4_K,
            Format::Q5K => GgmlType::Q5_K,
            Format::Q6K => GgmlType::Q6_K,
            Format::Iq4Nl => GgmlType::IQ4_NL,
            Format::Iq4Xs => GgmlType::IQ4_XS,
            Format::Iq3S => GgmlType::IQ3_S,
            Format::Iq3Xxs => GgmlType::IQ3_XXS,
        }
    }

    /// Weights in a block.
    pub fn group(self) -> usize {
        match self {
            Format::Simple(simple) => simple.group(),
            Format::Iq4Nl => 32,
            _ => 256,
        }
    }

    /// Weights that share their levels.
    pub fn sub_group(self) -> usize {
        match self {
            Format::Q2K | Format::Q3K | Format::Q6K => 16,
            Format::Q4K | Format::Q5K | Format::Iq4Xs | Format::Iq3S | Format::Iq3Xxs => 32,
            _ => self.group(),
        }
    }

    /// What `code` stands for in the codebook.
    #[inline(always)]
    pub fn place(self, code: u8) -> f32 {
        match self {
            Format::Q3K => f32::from(code) - 4.0,
            Format::Q6K => f32::from(code) - 32.0,
            Format::Iq4Nl | Format::Iq4Xs => lanes::UNEVEN[usize::from(code & 15)],
            Format::Iq3S | Format::Iq3Xxs => Grid::of(self).map_or(0.0, |grid| grid.place(code)),
            _ => f32::from(code),
        }
    }

    /// The levels of codes with these numbers.
    ///
    /// Exactly ggml's: a half has 11 significant bits, times a multiple and times a place they are 24 at most.
    #[inline(always)]
    pub fn levels(self, halfs: Halfs, multiples: Multiples) -> Levels {
        if let Format::Simple(_) = self {
            return Levels { d: halfs.d, m: halfs.m };
        }
        Levels { d: halfs.d * f32::from(multiples.d), m: halfs.m * f32::from(multiples.m) }
    }
}

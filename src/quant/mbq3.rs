//! The MBQ3 block and its round-to-nearest quantiser.
//!
//! 128 weights of a row, `w = d*code + m` with codes of 3 bits, in 52 bytes: `d` and `m` as fp16, then twelve
//! 32-bit words, all little-endian. `docs/format.md` defines the order of the bits; ggml's `ggml-mbq3.c` is the
//! same in C, and tests hold the two together bit for bit.
//!
//! The quantiser is the one of the MBQ authors' code (`pseudo_quantize_tensor` with a zero point): codes come from
//! the step in f32, and only then are `d` and `m` rounded to fp16.
use half::f16;

/// Weights in a block.
pub const GROUP: usize = 128;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 52;

const CHUNKS: usize = GROUP / 32;
const TOP: f32 = 7.0;

#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum Mbq3Error {
    #[error("{len} weights do not make whole MBQ3 blocks: a row needs a multiple of {GROUP}; store it in another type")]
    Length { len: usize },
    #[error("weight {index} is {value}: MBQ3 stores finite weights only; check the checkpoint")]
    NotFinite { index: usize, value: f32 },
    #[error("weights {start}..{} span {range}: too wide for an fp16 step; check the checkpoint", start + GROUP)]
    TooWide { start: usize, range: f32 },
    #[error(
        "{len} bytes do not make whole MBQ3 blocks of {BLOCK_BYTES} bytes; the tensor is cut off or of another type"
    )]
    Bytes { len: usize },
}

/// How a group's weights meet its eight levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Grid {
    /// The paper's: levels are `step * (code - zero)` with an integer zero in 0..=7. A group whose weights all
    /// lie far on one side of zero collapses onto its outermost level.
    #[default]
    Paper,
    /// The paper's, except that a group without a weight of each sign (or zero) takes its minimum as `m`.
    Mended,
    /// Every group takes its minimum as `m`. No weight is clipped, but a weight of zero rarely stays zero.
    Free,
}

/// A group's codes and the f32 values its `d` and `m` come from.
#[derive(Debug, Clone, PartialEq)]
pub struct Mbq3Group {
    /// Distance of two levels, in f32; codes are chosen with it.
    pub step: f32,
    /// Value of code 0, to be rounded to fp16.
    pub base: Base,
    pub codes: [u8; GROUP],
}

/// Where a group's levels begin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Base {
    /// `-zero` steps of the *rounded* step, so that code `zero` means 0 to within half an ulp of `m`.
    Zero(u8),
    /// A value of its own.
    Value(f32),
}

/// A block taken apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mbq3Block {
    pub d: f16,
    pub m: f16,
    /// Each in 0..=7, in the order of the weights.
    pub codes: [u8; GROUP],
}

impl Mbq3Group {
    /// Rounds `weights` to the nearest level of `grid`, halves to even. `weights` must be finite.
    pub fn nearest(weights: &[f32; GROUP], grid: Grid) -> Self {
        let low = weights.iter().copied().fold(weights[0], f32::min);
        let high = weights.iter().copied().fold(weights[0], f32::max);
        let step = (high - low).max(1e-5) / TOP;
        let free = match grid {
            Grid::Paper => false,
            Grid::Mended => low > 0.0 || high < 0.0,
            Grid::Free => true,
        };
        let mut codes = [0; GROUP];
        let base = if free {
            for (code, w) in codes.iter_mut().zip(weights) {
                *code = to_code(((w - low) / step).round_ties_even());
            }
            Base::Value(low)
        } else {
            let zero = to_code(-(low / step).round_ties_even());
            for (code, w) in codes.iter_mut().zip(weights) {
                *code = to_code((w / step).round_ties_even() + f32::from(zero));
            }
            Base::Zero(zero)
        };
        Self { step, base, codes }
    }

    /// Rounds step and base to fp16. The values may be infinite if the weights were too large.
    pub fn block(&self) -> Mbq3Block {
        let d = f16::from_f32(self.step);
        let m = match self.base {
            // 0 - x, not -x: a zero of 0 gives +0, as in C
            Base::Zero(zero) => f16::from_f32(0.0 - d.to_f32() * f32::from(zero)),
            Base::Value(value) => f16::from_f32(value),
        };
        Mbq3Block { d, m, codes: self.codes }
    }
}

fn to_code(level: f32) -> u8 {
    level.clamp(0.0, TOP) as u8
}

impl Mbq3Block {
    /// The weights the block stands for: `d*code + m` in f32.
    pub fn values(&self) -> [f32; GROUP] {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        self.codes.map(|code| d * f32::from(code) + m)
    }

    /// The block as a file stores it.
    pub fn pack(&self) -> [u8; BLOCK_BYTES] {
        let mut bytes = [0; BLOCK_BYTES];
        bytes[..2].copy_from_slice(&self.d.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.m.to_le_bytes());
        // Byte l of word A, B or C of chunk t; element 32t + 4w + l is lane l of word w.
        for t in 0..CHUNKS {
            for l in 0..4 {
                let c = |w: usize| self.codes[32 * t + 4 * w + l] & 7;
                let words = [
                    c(0) | c(1) << 3 | (c(6) & 3) << 6,
                    c(2) | c(3) << 3 | (c(7) & 3) << 6,
                    c(4) | c(5) << 3 | (c(6) >> 2) << 6 | (c(7) >> 2) << 7,
                ];
                for (which, byte) in words.into_iter().enumerate() {
                    bytes[4 + 16 * which + 4 * t + l] = byte;
                }
            }
        }
        bytes
    }

    /// The inverse of [`Mbq3Block::pack`].
    pub fn unpack(bytes: &[u8; BLOCK_BYTES]) -> Self {
        let mut codes = [0; GROUP];
        for t in 0..CHUNKS {
            for l in 0..4 {
                let [a, b, c] = [0, 1, 2].map(|which| bytes[4 + 16 * which + 4 * t + l]);
                let lanes = [
                    a & 7,
                    a >> 3 & 7,
                    b & 7,
                    b >> 3 & 7,
                    c & 7,
                    c >> 3 & 7,
                    a >> 6 | (c >> 6 & 1) << 2,
                    b >> 6 | (c >> 7) << 2,
                ];
                for (w, code) in lanes.into_iter().enumerate() {
                    codes[32 * t + 4 * w + l] = code;
                }
            }
        }
        Self { d: f16::from_le_bytes([bytes[0], bytes[1]]), m: f16::from_le_bytes([bytes[2], bytes[3]]), codes }
    }
}

/// Quantises rows of weights, one after the other, to MBQ3 bytes. Rows must be multiples of [`GROUP`] long.
///
/// # Errors
/// Weights that do not fill whole blocks, are NaN or infinite, or lie too far apart for fp16.
pub fn quantize(weights: &[f32], grid: Grid) -> Result<Vec<u8>, Mbq3Error> {
    let (groups, rest) = weights.as_chunks::<GROUP>();
    if !rest.is_empty() {
        return Err(Mbq3Error::Length { len: weights.len() });
    }
    let mut bytes = Vec::with_capacity(groups.len() * BLOCK_BYTES);
    for (n, group) in groups.iter().enumerate() {
        if let Some(at) = group.iter().position(|w| !w.is_finite()) {
            return Err(Mbq3Error::NotFinite { index: n * GROUP + at, value: group[at] });
        }
        let quantized = Mbq3Group::nearest(group, grid);
        let block = quantized.block();
        if !block.d.is_finite() || !block.m.is_finite() {
            return Err(Mbq3Error::TooWide { start: n * GROUP, range: quantized.step * TOP });
        }
        bytes.extend(block.pack());
    }
    Ok(bytes)
}

/// The weights MBQ3 bytes stand for.
///
/// # Errors
/// The bytes are not whole blocks.
pub fn dequantize(bytes: &[u8]) -> Result<Vec<f32>, Mbq3Error> {
    let (blocks, rest) = bytes.as_chunks::<BLOCK_BYTES>();
    if !rest.is_empty() {
        return Err(Mbq3Error::Bytes { len: bytes.len() });
    }
    Ok(blocks.iter().flat_map(|block| Mbq3Block::unpack(block).values()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Rng;

    #[test]
    fn codes_survive_packing() {
        let mut random = Rng::new(1);
        for _ in 0..1000 {
            let block = Mbq3Block {
                d: f16::from_bits(random.next_u64() as u16 & 0x7bff),
                m: f16::from_bits(random.next_u64() as u16 & 0x7bff),
                codes: std::array::from_fn(|_| (random.next_u64() & 7) as u8),
            };
            assert_eq!(Mbq3Block::unpack(&block.pack()), block);
        }
    }

    #[test]
    fn every_bit_of_a_block_means_something() {
        let mut random = Rng::new(2);
        for _ in 0..100 {
            let bytes: [u8; BLOCK_BYTES] = std::array::from_fn(|_| random.next_u64() as u8);
            assert_eq!(Mbq3Block::unpack(&bytes).pack(), bytes);
        }
    }

    /// The words of chunk 1 written out by hand from docs/format.md, not through `pack`.
    #[test]
    fn bits_lie_where_the_format_says() {
        let mut codes = [0; GROUP];
        // element 32t + 4w + l with t = 1, l = 2: codes 1..=7, 5 in words 0..8
        for (w, code) in [1, 2, 3, 4, 5, 6, 7, 5].into_iter().enumerate() {
            codes[32 + 4 * w + 2] = code;
        }
        let bytes = Mbq3Block { d: f16::ONE, m: f16::ZERO, codes }.pack();
        let word = |n: usize| u32::from_le_bytes(bytes[4 + 4 * n..8 + 4 * n].try_into().unwrap());
        assert_eq!(word(1), 0b1101_0001 << 16); // c6 & 3, c1, c0
        assert_eq!(word(5), 0b0110_0011 << 16); // c7 & 3, c3, c2
        assert_eq!(word(9), 0b1111_0101 << 16); // c7 >> 2, c6 >> 2, c5, c4
        assert!((0..12).filter(|n| ![1, 5, 9].contains(n)).all(|n| word(n) == 0));
    }

    #[test]
    fn codes_come_from_the_unrounded_step() {
        // range 1.0007: its step rounds to another fp16, and w/step lies between the two roundings for this weight
        let mut weights = [0.0; GROUP];
        let step = 1.0007f32 / 7.0;
        let rounded = f16::from_f32(step).to_f32();
        assert_ne!(step, rounded);
        let between = (step + rounded) / 2.0 * 2.5;
        (weights[0], weights[1], weights[2]) = (-0.5, 0.5007, between);
        let group = Mbq3Group::nearest(&weights, Grid::Paper);
        let Base::Zero(zero) = group.base else { panic!("the paper's grid has a zero") };
        let from = |step: f32| (between / step).round_ties_even() as u8 + zero;
        assert_ne!(from(step), from(rounded), "the weight does not tell the two apart");
        assert_eq!(group.codes[2], from(step));
    }

    #[test]
    fn halves_go_to_even() {
        let mut weights = [0.0; GROUP];
        // step 1, zero 4: levels -4..=3
        (weights[0], weights[1]) = (-4.0, 3.0);
        for (n, w) in [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5].into_iter().enumerate() {
            weights[2 + n] = w;
        }
        let group = Mbq3Group::nearest(&weights, Grid::Paper);
        assert_eq!((group.step, group.base), (1.0, Base::Zero(4)));
        assert_eq!(group.codes[2..8], [2, 2, 4, 4, 6, 6]);
    }

    /// Values differ from the paper's f32 ones by half an ulp of `d` times the distance from zero, and half of `m`.
    #[test]
    fn values_are_within_half_an_ulp_of_d_and_m() {
        let half_ulp = |v: f16| {
            let up = f16::from_bits(v.to_bits() + 1).to_f32();
            f64::from((up - v.to_f32()).abs()) / 2.0
        };
        let mut random = Rng::new(3);
        for n in 0..2000 {
            let scale = 10f32.powi(n % 9 - 6);
            let shift = random.uniform();
            let weights: [f32; GROUP] = std::array::from_fn(|_| scale * (random.uniform() + shift));
            let group = Mbq3Group::nearest(&weights, Grid::Paper);
            let Base::Zero(zero) = group.base else { panic!("the paper's grid has a zero") };
            let block = group.block();
            for (code, value) in group.codes.iter().zip(block.values()) {
                let offset = f64::from(*code) - f64::from(zero);
                let exact = f64::from(group.step) * offset;
                let bound = half_ulp(block.d) * offset.abs() + half_ulp(block.m);
                // the f32 sum d*code + m rounds once more: 2^-24 of the value
                let bound = bound * (1.0 + 1e-6) + exact.abs() * 1e-7;
                assert!((f64::from(value) - exact).abs() <= bound, "{value} {exact} {bound}");
            }
        }
    }

    #[test]
    fn groups_that_exclude_zero_collapse_unless_m_is_free() {
        let weights: [f32; GROUP] = std::array::from_fn(|n| 0.3 + 0.2 * n as f32 / 127.0);
        let worst = |grid| {
            let values = Mbq3Group::nearest(&weights, grid).block().values();
            weights.iter().zip(values).map(|(w, v)| (w - v).abs()).fold(0.0, f32::max)
        };
        // the paper's grid: all weights become 7 steps = 0.2
        let paper = Mbq3Group::nearest(&weights, Grid::Paper).block().values();
        assert!(paper.iter().all(|v| (v - 0.2).abs() < 1e-3));
        assert!(worst(Grid::Paper) > 0.29);
        // half a step, and a little for fp16
        for grid in [Grid::Mended, Grid::Free] {
            assert!(worst(grid) < 0.2 / 7.0 * 0.5 + 5e-4, "{grid:?}");
        }
        // a group with both signs is not touched by mending
        let both: [f32; GROUP] = std::array::from_fn(|n| n as f32 / 127.0 - 0.3);
        assert_eq!(Mbq3Group::nearest(&both, Grid::Mended), Mbq3Group::nearest(&both, Grid::Paper));
    }

    #[test]
    fn what_cannot_be_stored_is_an_error() {
        assert_eq!(quantize(&[0.0; 100], Grid::Paper), Err(Mbq3Error::Length { len: 100 }));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut weights = [0.0; 2 * GROUP];
            weights[130] = bad;
            let Err(Mbq3Error::NotFinite { index: 130, value }) = quantize(&weights, Grid::Paper) else {
                panic!("{bad} was accepted")
            };
            assert_eq!(value.to_bits(), bad.to_bits());
        }
        let mut weights = [0.0; GROUP];
        (weights[0], weights[1]) = (-3e38, 3e38);
        assert!(matches!(quantize(&weights, Grid::Paper), Err(Mbq3Error::TooWide { start: 0, .. })));
        assert_eq!(dequantize(&[0; 53]), Err(Mbq3Error::Bytes { len: 53 }));
    }

    #[test]
    fn a_constant_group_stays_near_its_value() {
        // the paper's floor of 1e-5 under the range: zeros stay zeros, tiny groups keep their sign
        assert!(Mbq3Group::nearest(&[0.0; GROUP], Grid::Paper).block().values().iter().all(|&v| v == 0.0));
        let values = Mbq3Group::nearest(&[0.5; GROUP], Grid::Free).block().values();
        assert!(values.iter().all(|&v| v == 0.5));
    }
}

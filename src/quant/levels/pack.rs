//! Blocks as bytes, ggml's layouts (ggml-common.h).
use super::{Format, Grid, Halfs, Multiples, Simple};
use crate::quant::mbq3::{GROUP, Mbq3Block};
use half::f16;

impl Format {
    /// Appends the bytes of a block: its halfs, the multiples of its sub-blocks, its codes.
    pub fn pack(self, halfs: Halfs, multiples: &[Multiples], codes: &[u8], out: &mut Vec<u8>) {
        let head = |out: &mut Vec<u8>| {
            out.extend(half(halfs.d));
            // ggml subtracts minima.
            out.extend(half(0.0 - halfs.m));
        };
        match self {
            Format::Simple(simple) => simple.pack(halfs, codes, out),
            Format::Iq4Nl => {
                out.extend(half(halfs.d));
                nibbles(codes, 16, out);
            }
            Format::Q2K => {
                out.extend(multiples.iter().map(|s| s.d as u8 | s.m << 4));
                pairs(codes, out);
                head(out);
            }
            Format::Q3K => {
                out.extend(planes::<32>(codes, |code, plane| (code >> 2) << plane));
                pairs(codes, out);
                out.extend(six_bits(multiples));
                out.extend(half(halfs.d));
            }
            Format::Q4K | Format::Q5K => {
                head(out);
                out.extend(scales_and_minima(multiples));
                if self == Format::Q5K {
                    out.extend(planes::<32>(codes, |code, plane| (code >> 4) << plane));
                }
                nibbles(codes, 32, out);
            }
            Format::Q6K => {
                nibbles(codes, 64, out);
                for part in codes.chunks(128) {
                    out.extend(planes::<32>(part, |code, plane| (code >> 4) << (2 * plane)));
                }
                out.extend(multiples.iter().map(|s| s.d as u8));
                out.extend(half(halfs.d));
            }
            Format::Iq4Xs => {
                out.extend(half(halfs.d));
                let bits = |(i, s): (usize, &Multiples)| ((s.d + 32) as u16 >> 4) << (2 * i);
                let high = multiples.iter().enumerate().map(bits).fold(0, |all, bits| all | bits);
                out.extend(high.to_le_bytes());
                out.extend(multiples.chunks(2).map(|s| (s[0].d + 32) as u8 & 15 | ((s[1].d + 32) as u8) << 4));
                nibbles(codes, 16, out);
            }
            Format::Iq3S | Format::Iq3Xxs => {
                out.extend(half(halfs.d));
                if let Some(grid) = Grid::of(self) {
                    points(grid, multiples, codes, out);
                }
            }
        }
    }
}

impl Simple {
    fn pack(self, halfs: Halfs, codes: &[u8], out: &mut Vec<u8>) {
        let (d, m) = (half(halfs.d), half(halfs.m));
        match self {
            Simple::Mbq3 => {
                let mut all = [0; GROUP];
                all.copy_from_slice(codes);
                let (d, m) = (f16::from_f32(halfs.d), f16::from_f32(halfs.m));
                out.extend(Mbq3Block { d, m, codes: all }.pack());
            }
            Simple::Q4_0 | Simple::Q4_1 => {
                out.extend(d);
                if self == Simple::Q4_1 {
                    out.extend(m);
                }
                nibbles(codes, 16, out);
            }
            Simple::Q5_0 | Simple::Q5_1 => {
                out.extend(d);
                if self == Simple::Q5_1 {
                    out.extend(m);
                }
                let high = codes.iter().rev().fold(0u32, |all, code| all << 1 | u32::from(code >> 4));
                out.extend(high.to_le_bytes());
                nibbles(codes, 16, out);
            }
            Simple::Q8_0 => {
                out.extend(d);
                out.extend(codes.iter().map(|c| c.wrapping_sub(128)));
            }
        }
    }
}

/// The bytes of a number that is a half already, so that nothing is lost.
fn half(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

/// What iq3_s and iq3_xxs have behind their d.
fn points(grid: &Grid, multiples: &[Multiples], codes: &[u8], out: &mut Vec<u8>) {
    let index: Vec<u16> = codes.chunks(4).map(|codes| grid.index(codes)).collect();
    out.extend(index.iter().map(|&index| index as u8));
    let minus = |codes: &[u8]| codes.iter().rev().fold(0u8, |all, code| all << 1 | code >> 3);
    let signs: Vec<u8> = codes.chunks(8).map(minus).collect();
    // Odd: 2 s + 1.
    let scale = |multiples: &Multiples| (multiples.d as u8) >> 1;
    if grid.even {
        // Seven signs of eight, the last follows from them.
        let seven = |signs: &[u8]| signs.iter().rev().fold(0u32, |all, signs| all << 7 | u32::from(signs & 127));
        let words = signs.chunks(4).zip(multiples).map(|(signs, m)| seven(signs) | u32::from(scale(m)) << 28);
        words.for_each(|word| out.extend(word.to_le_bytes()));
    } else {
        out.extend(index.chunks(8).map(|index| index.iter().rev().fold(0u8, |all, i| all << 1 | (i >> 8) as u8)));
        out.extend(signs);
        out.extend(multiples.chunks(2).map(|m| scale(&m[0]) | scale(&m[1]) << 4));
    }
}

/// Low four bits: a byte holds a code and the one `apart` further on.
fn nibbles(codes: &[u8], apart: usize, out: &mut Vec<u8>) {
    for part in codes.chunks(2 * apart) {
        let (low, high) = part.split_at(apart);
        out.extend(low.iter().zip(high).map(|(l, h)| l & 15 | h << 4));
    }
}

/// Low two bits: a byte holds four codes, each 32 further on.
fn pairs(codes: &[u8], out: &mut Vec<u8>) {
    for half in codes.chunks(128) {
        out.extend(planes::<32>(half, |code, plane| (code & 3) << (2 * plane)));
    }
}

/// N bytes: byte i has `bits` of codes i, i + N, i + 2N …, which are of planes 0, 1, 2 …
fn planes<const N: usize>(codes: &[u8], bits: impl Fn(u8, usize) -> u8) -> [u8; N] {
    let mut all = [0; N];
    for (plane, codes) in codes.chunks(N).enumerate() {
        all.iter_mut().zip(codes).for_each(|(byte, &code)| *byte |= bits(code, plane));
    }
    all
}

/// q3_k's scales, plus 32: low four bits of two to a byte, then high two bits of four.
fn six_bits(multiples: &[Multiples]) -> [u8; 12] {
    let mut all = [0; 12];
    for (i, s) in multiples.iter().enumerate() {
        let scale = (s.d + 32) as u8;
        all[i % 8] |= (scale & 15) << (4 * (i / 8));
        all[8 + i % 4] |= (scale >> 4) << (2 * (i / 4));
    }
    all
}

/// q4_k's and q5_k's scales and minima: six bits of the first four each, then low four bits of the others together,
/// whose high bits go above the first ones'.
fn scales_and_minima(multiples: &[Multiples]) -> [u8; 12] {
    let mut all = [0; 12];
    for (i, s) in multiples.iter().enumerate() {
        let (scale, min) = (s.d as u8, s.m);
        if i < 4 {
            all[i] |= scale;
            all[i + 4] |= min;
        } else {
            all[i + 4] = scale & 15 | min << 4;
            all[i - 4] |= (scale >> 4) << 6;
            all[i] |= (min >> 4) << 6;
        }
    }
    all
}

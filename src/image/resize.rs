//! Pillow's 8-bit resampling, bit for bit: a separable filter in fixed point, horizontal pass first,
//! each pass rounded to 8 bits. Follows `src/libImaging/Resample.c` of Pillow (precision 22 bits).
//! Pillow up to 12 always starts with the horizontal pass, and so do we; Pillow 13 starts with the vertical one where
//! that is cheaper, which moves single bytes by one level.
use super::Rgb;

/// The resampling filters of `PIL.Image.Resampling` that the supported families use, with their numbers in `preprocessor_config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// 2: triangle, radius 1.
    Bilinear,
    /// 3: cubic with a = -0.5, radius 2.
    Bicubic,
}

impl Filter {
    /// The filter with the number that `preprocessor_config.json` gives as `resample`.
    pub fn from_pil(resample: u64) -> Option<Self> {
        match resample {
            2 => Some(Filter::Bilinear),
            3 => Some(Filter::Bicubic),
            _ => None,
        }
    }

    fn radius(self) -> f64 {
        match self {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        match self {
            Filter::Bilinear if x.abs() < 1.0 => 1.0 - x.abs(),
            Filter::Bicubic => {
                let x = x.abs();
                if x < 1.0 {
                    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * A
                } else {
                    0.0
                }
            }
            _ => 0.0,
        }
    }
}

/// 8 bits of pixel and 2 of head room leave 22 bits of a 32-bit accumulator for the weights' fraction.
const FRACTION_BITS: u32 = 32 - 8 - 2;

/// The source pixels that one target pixel reads, and their fixed-point weights.
struct Tap {
    first: usize,
    weights: Vec<i32>,
}

fn taps(from: usize, to: usize, filter: Filter) -> Vec<Tap> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.radius() * stretch;
    (0..to)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale;
            // C's conversion to int truncates towards zero, and so does `as`.
            let first = ((centre - support + 0.5) as i64).max(0) as usize;
            let end = ((centre + support + 0.5) as i64).min(from as i64) as usize;
            let raw: Vec<f64> =
                (first..end).map(|x| filter.weight((x as f64 - centre + 0.5) * (1.0 / stretch))).collect();
            let sum: f64 = raw.iter().sum();
            let fixed = |w: f64| {
                let w = if sum != 0.0 { w / sum } else { w } * f64::from(1u32 << FRACTION_BITS);
                (if w < 0.0 { w - 0.5 } else { w + 0.5 }) as i32
            };
            Tap { first, weights: raw.into_iter().map(fixed).collect() }
        })
        .collect()
}

/// Weighted sum of the bytes `data[start + k * step]`, rounded and clamped to 8 bits.
fn blend(data: &[u8], start: usize, step: usize, weights: &[i32]) -> u8 {
    let half = 1i32 << (FRACTION_BITS - 1);
    let sum =
        weights.iter().enumerate().fold(half, |acc, (k, w)| acc.wrapping_add(i32::from(data[start + k * step]) * w));
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}

/// Resizes to `width` x `height` exactly as `PIL.Image.resize((width, height), filter)` does on an RGB picture.
/// Sides must not be 0.
pub fn resize(image: &Rgb, width: usize, height: usize, filter: Filter) -> Rgb {
    let mut wide = Rgb::black(width, image.height);
    if width == image.width {
        wide.data.copy_from_slice(&image.data);
    } else {
        let taps = taps(image.width, width, filter);
        for y in 0..image.height {
            for (x, tap) in taps.iter().enumerate() {
                for c in 0..3 {
                    wide.data[(y * width + x) * 3 + c] =
                        blend(&image.data, (y * image.width + tap.first) * 3 + c, 3, &tap.weights);
                }
            }
        }
    }
    if height == image.height {
        return wide;
    }
    let mut out = Rgb::black(width, height);
    for (y, tap) in taps(image.height, height, filter).iter().enumerate() {
        for x in 0..width * 3 {
            out.data[y * width * 3 + x] = blend(&wide.data, tap.first * width * 3 + x, width * 3, &tap.weights);
        }
    }
    out
}

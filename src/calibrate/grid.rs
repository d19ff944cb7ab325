//! Fake quantisers: weights and activations rounded to what the output type will hold, and back to f32.
use crate::ggml::{self, GgmlType};
use crate::gguf::{FileType, LinearKind, Role, fitting};
use crate::quant::levels::even;
use crate::quant::mbq3;
use crate::text::TextConfig;
use crate::text::ops::with_cpu;
use candle_core::{D, DType, Result, Tensor, bail};
use rayon::prelude::*;

/// Rounds a weight matrix `[out, in]` to the values its quantised form stands for.
pub trait WeightGrid: Sync {
    /// # Errors
    /// The row length does not fit, or the arithmetic fails.
    fn round_trip(&self, weight: &Tensor) -> Result<Tensor>;
    /// For the record.
    fn name(&self) -> String;
}

/// The stored types' own rounding of a decoder linear.
pub(super) fn stored(file: FileType, config: &TextConfig) -> Box<dyn WeightGrid> {
    let ty = file.tensor_type(Role::Linear(LinearKind::Other, 0), 1, 256, false, false);
    // Rows of other lengths are stored in a fallback type, which only ggml's own round trip knows.
    let rows = [config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size];
    let fits_mbq3 = rows.iter().all(|r| r % 128 == 0);
    match ty {
        GgmlType::MBQ3 if fits_mbq3 => Box::new(Mbq3),
        // The i-quants' own search takes minutes per block: a plain grid of equal bits stands for them.
        GgmlType::IQ3_S | GgmlType::IQ3_XXS => Box::new(Asymmetric { bits: 3, group: 32 }),
        GgmlType::IQ4_XS => Box::new(Asymmetric { bits: 4, group: 32 }),
        _ => Box::new(Stored {
            name: ty.to_string(),
            rows: move |rows: &mut [f32], cols: usize| {
                let ty = fitting(ty, cols);
                let bytes = ggml::quantize_rows(ty, rows, cols, None).map_err(|e| e.to_string())?;
                rows.copy_from_slice(&ggml::dequantize(ty, &bytes).map_err(|e| e.to_string())?);
                Ok(())
            },
        }),
    }
}

/// The paper's weight-only grid: asymmetric per `group` inputs, `bits` bits, with an integer zero point
/// (`pseudo_quantize_tensor` with `zero_point`).
#[derive(Debug, Clone, Copy)]
pub struct Asymmetric {
    pub bits: u32,
    pub group: usize,
}

impl WeightGrid for Asymmetric {
    fn round_trip(&self, weight: &Tensor) -> Result<Tensor> {
        let top = ((1u32 << self.bits) - 1) as f32;
        if !weight.device().is_cpu() {
            return on_device(weight, self.group, |w| asymmetric_rows(w, top.into()));
        }
        by_group(weight, self.group, |w| {
            let (low, high) = bounds(w);
            let step = (high - low).max(1e-5) / top;
            let zero = (-even(low / step)).clamp(0.0, top);
            w.iter_mut().for_each(|v| *v = ((even(*v / step) + zero).clamp(0.0, top) - zero) * step);
        })
    }
    fn name(&self) -> String {
        format!("asymmetric {} bit, groups of {}", self.bits, self.group)
    }
}

/// MBQ3's round trip (`quant::mbq3`, the paper's grid): as [`Asymmetric`] with 3 bits in groups of 128, but that step
/// and minimum are then stored in fp16. Written for speed: a search rounds every weight about 20 times.
#[derive(Debug, Clone, Copy)]
pub struct Mbq3;

impl WeightGrid for Mbq3 {
    fn round_trip(&self, weight: &Tensor) -> Result<Tensor> {
        if !weight.device().is_cpu() {
            return on_device(weight, mbq3::GROUP, mbq3_rows);
        }
        by_group(weight, mbq3::GROUP, |w| {
            let (low, high) = bounds(w);
            let step = (high - low).max(1e-5) / 7.0;
            let zero = (-even(low / step)).clamp(0.0, 7.0);
            let d = half::f16::from_f32(step).to_f32();
            let m = half::f16::from_f32(0.0 - d * zero).to_f32();
            w.iter_mut().for_each(|v| *v = d * (even(*v / step) + zero).clamp(0.0, 7.0) + m);
        })
    }
    fn name(&self) -> String {
        "mbq3".into()
    }
}

/// On an accelerator: `f` of the matrix with a group in each row.
fn on_device(x: &Tensor, group: usize, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let cols = x.dim(D::Minus1)?;
    if group == 0 || cols % group != 0 {
        bail!("groups of {group} do not divide rows of {cols} weights");
    }
    f(&x.contiguous()?.reshape((x.elem_count() / group, group))?)?.reshape(x.shape())
}

/// Step, zero point and codes of groups of an asymmetric grid, on an accelerator.
fn asymmetric(w: &Tensor, top: f64) -> Result<(Tensor, Tensor, Tensor)> {
    let (low, high) = (w.min_keepdim(D::Minus1)?, w.max_keepdim(D::Minus1)?);
    let step = over((high - &low)?.maximum(1e-5)?, top)?;
    let zero = nearest((low / &step)?)?.neg()?.clamp(0.0, top)?;
    let codes = nearest(w.broadcast_div(&step)?)?.broadcast_add(&zero)?.clamp(0.0, top)?;
    Ok((step, zero, codes))
}

fn asymmetric_rows(w: &Tensor, top: f64) -> Result<Tensor> {
    let (step, zero, codes) = asymmetric(w, top)?;
    codes.broadcast_sub(&zero)?.broadcast_mul(&step)
}

fn mbq3_rows(w: &Tensor) -> Result<Tensor> {
    let (step, zero, codes) = asymmetric(w, 7.0)?;
    let half = |t: Tensor| t.to_dtype(DType::F16)?.to_dtype(DType::F32);
    let d = half(step)?;
    let m = half((&d * &zero)?.neg()?)?;
    codes.broadcast_mul(&d)?.broadcast_add(&m)
}

fn q8_0_rows(x: &Tensor) -> Result<Tensor> {
    let d = over(x.abs()?.max_keepdim(D::Minus1)?, 127.0)?;
    let stored = d.to_dtype(DType::F16)?.to_dtype(DType::F32)?;
    // Blocks of nothing but zeros: any step will do.
    let inverse = d.maximum(f64::from(f32::MIN_POSITIVE))?.recip()?;
    x.broadcast_mul(&inverse)?.round()?.broadcast_mul(&stored)
}

/// x / by; candle's own operator multiplies by 1 / by.
fn over(x: Tensor, by: f64) -> Result<Tensor> {
    x.broadcast_div(&Tensor::new(by as f32, x.device())?)
}

/// [`even`], on an accelerator.
fn nearest(x: Tensor) -> Result<Tensor> {
    const SHIFT: f64 = 12_582_912.0;
    x.affine(1.0, SHIFT)?.affine(1.0, -SHIFT)
}

/// Least and largest, eight at a time. A NaN may pass unseen: weights are checked when they are read.
fn bounds(w: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([w[0]; 8], [w[0]; 8]);
    for part in w.chunks(8) {
        for ((l, h), &v) in low.iter_mut().zip(&mut high).zip(part) {
            *l = if v < *l { v } else { *l };
            *h = if v > *h { v } else { *h };
        }
    }
    (low.into_iter().fold(w[0], f32::min), high.into_iter().fold(w[0], f32::max))
}

/// The paper's W4A8 weight grid: symmetric, one step per output channel.
#[derive(Debug, Clone, Copy)]
pub struct PerChannel {
    pub bits: u32,
}

impl WeightGrid for PerChannel {
    fn round_trip(&self, weight: &Tensor) -> Result<Tensor> {
        let top = ((1u32 << (self.bits - 1)) - 1) as f32;
        if !weight.device().is_cpu() {
            return on_device(weight, weight.dim(D::Minus1)?, |w| symmetric_rows(w, top.into()));
        }
        by_group(weight, weight.dim(D::Minus1)?, |w| symmetric(w, top))
    }
    fn name(&self) -> String {
        format!("symmetric {} bit per output channel", self.bits)
    }
}

/// A stored type's own round trip: quantise, dequantise.
pub struct Stored<F> {
    pub name: String,
    /// Rounds whole rows of `cols` weights in place, or says why not.
    pub rows: F,
}

impl<F: Fn(&mut [f32], usize) -> std::result::Result<(), String> + Sync> WeightGrid for Stored<F> {
    fn round_trip(&self, weight: &Tensor) -> Result<Tensor> {
        let (out, cols) = weight.dims2()?;
        let mut data: Vec<f32> = weight.flatten_all()?.to_vec1()?;
        let rows = (out / 64).max(1);
        let faults: Vec<String> =
            data.par_chunks_mut(rows * cols).filter_map(|part| (self.rows)(part, cols).err()).collect();
        match faults.into_iter().next() {
            Some(fault) => bail!("{fault}"),
            None => Tensor::from_vec(data, (out, cols), weight.device()),
        }
    }
    fn name(&self) -> String {
        self.name.clone()
    }
}

/// What happens to the activations that enter a linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    Float,
    /// The paper's: symmetric int8, one step per token.
    PerToken,
    /// ggml's int8 path: symmetric int8 per block of 32 channels, the step in fp16 (q8_0).
    Blocks,
}

impl Activations {
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Activations::Float => Ok(x.clone()),
            Activations::PerToken if !x.device().is_cpu() => {
                on_device(x, x.dim(D::Minus1)?, |x| symmetric_rows(x, 127.0))
            }
            Activations::Blocks if !x.device().is_cpu() => on_device(x, 32, q8_0_rows),
            Activations::PerToken => by_group(x, x.dim(D::Minus1)?, |v| symmetric(v, 127.0)),
            Activations::Blocks => by_group(x, 32, |v| {
                let max = v.iter().fold(0f32, |m, v| m.max(v.abs()));
                let d = max / 127.0;
                let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
                let stored = half::f16::from_f32(d).to_f32();
                // ggml rounds halves away from zero here.
                v.iter_mut().for_each(|v| *v = (*v * inverse).round() * stored);
            }),
        }
    }
}

/// [`symmetric`] of each row, on an accelerator.
fn symmetric_rows(x: &Tensor, top: f64) -> Result<Tensor> {
    let step = over(x.abs()?.max_keepdim(D::Minus1)?.maximum(1e-5)?, top)?;
    nearest(x.broadcast_div(&step)?)?.clamp(-top, top)?.broadcast_mul(&step)
}

fn symmetric(v: &mut [f32], top: f32) {
    let step = v.iter().fold(0f32, |m, v| m.max(v.abs())).max(1e-5) / top;
    v.iter_mut().for_each(|v| *v = even(*v / step).clamp(-top, top) * step);
}

/// Applies `f` to every `group` neighbours of the last dimension.
fn by_group(x: &Tensor, group: usize, f: impl Fn(&mut [f32]) + Sync) -> Result<Tensor> {
    let cols = x.dim(D::Minus1)?;
    if group == 0 || cols % group != 0 {
        bail!("groups of {group} do not divide rows of {cols} weights");
    }
    let mut data: Vec<f32> =
        if x.device().is_cpu() { with_cpu(x, <[f32]>::to_vec)? } else { x.flatten_all()?.to_vec1()? };
    data.par_chunks_mut(cols).with_min_len(8).for_each(|row| row.chunks_mut(group).for_each(&f));
    Tensor::from_vec(data, x.shape(), x.device())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fast round trip gives the bits that the file will give, at ordinary weights, at groups far from zero, at
    /// constant ones and at ties.
    #[test]
    fn mbq3_is_what_the_file_holds() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 0.1
        };
        let mut data: Vec<f32> = (0..256 * mbq3::GROUP).map(|_| random()).collect();
        for (i, group) in data.chunks_mut(mbq3::GROUP).enumerate() {
            match i % 8 {
                0 => group.iter_mut().for_each(|v| *v += 0.4),
                1 => group.fill(100.0),
                2 => group.fill(0.0),
                3 => group.iter_mut().enumerate().for_each(|(j, v)| *v = (j % 15) as f32 * 0.5 - 1.0),
                4 => group.iter_mut().for_each(|v| *v *= 1e-6),
                _ => (),
            }
        }
        let want = mbq3::dequantize(&mbq3::quantize(&data, mbq3::Grid::Paper).unwrap()).unwrap();
        let weight = Tensor::from_vec(data, (128, 256), &candle_core::Device::Cpu).unwrap();
        let got: Vec<f32> = Mbq3.round_trip(&weight).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let different = got.iter().zip(&want).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        assert_eq!(different, 0);
    }
    /// What runs on accelerators, run on the CPU: the same values (0 and -0 alike).
    #[test]
    fn tensor_forms_are_the_same_grids() {
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let mut data: Vec<f32> = (0..64 * 256).map(|i| random() * (1.0 + (i / 256) as f32 * 0.1)).collect();
        data[..128].fill(0.0);
        data[128..256].fill(3.0);
        data[256..512].iter_mut().for_each(|v| *v += 5.0);
        data[512..640].iter_mut().enumerate().for_each(|(i, v)| *v = (i % 15) as f32 * 0.5 - 1.0);
        let x = Tensor::from_vec(data, (64, 256), &candle_core::Device::Cpu).unwrap();
        let same = |slices: Result<Tensor>, tensors: Result<Tensor>, what: &str| {
            let of = |t: Result<Tensor>| t.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (a, b) = (of(slices), of(tensors));
            let different = a.iter().zip(&b).filter(|(a, b)| a != b).count();
            assert_eq!((a.len(), different), (b.len(), 0), "{what}");
        };
        let asymmetric = Asymmetric { bits: 4, group: 64 };
        same(Mbq3.round_trip(&x), on_device(&x, 128, mbq3_rows), "mbq3");
        same(asymmetric.round_trip(&x), on_device(&x, 64, |w| asymmetric_rows(w, 15.0)), "asymmetric");
        let channels = PerChannel { bits: 4 };
        same(channels.round_trip(&x), on_device(&x, 256, |w| symmetric_rows(w, 7.0)), "per channel");
        same(Activations::PerToken.apply(&x), on_device(&x, 256, |w| symmetric_rows(w, 127.0)), "per token");
        same(Activations::Blocks.apply(&x), on_device(&x, 32, q8_0_rows), "int8 blocks");
    }

    #[test]
    fn groups_that_do_not_divide_are_refused() {
        let x = Tensor::zeros((2, 320), DType::F32, &candle_core::Device::Cpu).unwrap();
        for (group, given) in [(96, Asymmetric { bits: 3, group: 96 }), (0, Asymmetric { bits: 3, group: 0 })] {
            let error = given.round_trip(&x).unwrap_err().to_string();
            assert!(error.contains(&format!("groups of {group} do not divide rows of 320")), "{error}");
            assert!(on_device(&x, group, mbq3_rows).is_err());
        }
        assert!(Mbq3.round_trip(&x).is_err());
    }
}

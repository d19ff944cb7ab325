//! The vision towers, SigLIP's and CLIP's: pre-norm ViT blocks over square tiles, read after `used_layers` blocks
//! without the final norm.
use super::config::{VisionArch, VisionConfig};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::text::Linear;
use crate::text::ops::{add_to, gelu_tanh, layer_norm, softmax};
use candle_core::{Device, Result, Tensor};

const ROOT: &str = "vision_tower.vision_model";

struct Norm {
    weight: Tensor,
    bias: Tensor,
}

struct Layer {
    norm1: Norm,
    norm2: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    fc1: Linear,
    fc2: Linear,
}

/// A tower with its weights in f32.
pub struct Tower {
    config: VisionConfig,
    patch: Linear,
    position: Tensor,
    /// CLIP's class token and the norm after the embeddings.
    class: Option<(Tensor, Norm)>,
    layers: Vec<Layer>,
}

/// Reads tensors of a checkpoint to a device, shapes checked.
pub(super) struct Reader<'a> {
    pub checkpoint: &'a Checkpoint,
    pub device: &'a Device,
}

impl Reader<'_> {
    pub fn tensor(&self, name: &str, shape: &[usize]) -> std::result::Result<Tensor, Error> {
        Ok(Tensor::from_vec(self.checkpoint.f32(name, shape)?, shape, self.device)?)
    }

    pub fn linear(&self, name: &str, out: usize, inp: usize, bias: bool) -> std::result::Result<Linear, Error> {
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[out])).transpose()?;
        Ok(Linear { weight: self.tensor(&format!("{name}.weight"), &[out, inp])?, bias })
    }

    fn norm(&self, name: &str, width: usize) -> std::result::Result<Norm, Error> {
        Ok(Norm {
            weight: self.tensor(&format!("{name}.weight"), &[width])?,
            bias: self.tensor(&format!("{name}.bias"), &[width])?,
        })
    }
}

impl Tower {
    /// # Errors
    /// A tensor is missing, has another shape, or is not finite.
    pub fn load(checkpoint: &Checkpoint, c: &VisionConfig, device: &Device) -> std::result::Result<Self, Error> {
        let r = Reader { checkpoint, device };
        let (width, inner, patches) = (c.hidden_size, c.intermediate_size, c.grid() * c.grid());
        let clip = c.arch == VisionArch::Clip;
        let embeddings = format!("{ROOT}.embeddings");
        let name = format!("{embeddings}.patch_embedding");
        let kernel = r.tensor(&format!("{name}.weight"), &[width, 3, c.patch_size, c.patch_size])?;
        let bias = if clip { None } else { Some(r.tensor(&format!("{name}.bias"), &[width])?) };
        let class = if clip {
            let class = r.tensor(&format!("{embeddings}.class_embedding"), &[width])?;
            Some((class, r.norm(&format!("{ROOT}.pre_layrnorm"), width)?))
        } else {
            None
        };
        let positions = patches + usize::from(clip);
        let layer = |i: usize| -> std::result::Result<Layer, Error> {
            let at = format!("{ROOT}.encoder.layers.{i}");
            let attention = |n: &str| r.linear(&format!("{at}.self_attn.{n}"), width, width, true);
            Ok(Layer {
                norm1: r.norm(&format!("{at}.layer_norm1"), width)?,
                norm2: r.norm(&format!("{at}.layer_norm2"), width)?,
                q: attention("q_proj")?,
                k: attention("k_proj")?,
                v: attention("v_proj")?,
                out: attention("out_proj")?,
                fc1: r.linear(&format!("{at}.mlp.fc1"), inner, width, true)?,
                fc2: r.linear(&format!("{at}.mlp.fc2"), width, inner, true)?,
            })
        };
        Ok(Tower {
            patch: Linear { weight: kernel.flatten_from(1)?, bias },
            position: r.tensor(&format!("{embeddings}.position_embedding.weight"), &[positions, width])?,
            class,
            layers: (0..c.used_layers).map(layer).collect::<std::result::Result<_, _>>()?,
            config: c.clone(),
        })
    }

    /// Features of tiles, `[tiles, 3, side, side]` normalised pixels to `[tiles, grid * grid, width]`.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (g, p, width) = (self.config.grid(), self.config.patch_size, self.config.hidden_size);
        let tiles = pixels.dim(0)?;
        // A convolution with stride = kernel: patches as rows, channels first within one.
        let cut = pixels.narrow(2, 0, g * p)?.narrow(3, 0, g * p)?.contiguous()?;
        let rows = cut.reshape(&[tiles, 3, g, p, g, p][..])?.permute(&[0, 2, 4, 1, 3, 5][..])?;
        let rows = rows.contiguous()?.reshape((tiles * g * g, 3 * p * p))?;
        let mut x = self.patch.forward(&rows)?.reshape((tiles, g * g, width))?;
        if let Some((class, _)) = &self.class {
            x = Tensor::cat(&[class.broadcast_as((tiles, 1, width))?.contiguous()?, x], 1)?;
        }
        x = x.broadcast_add(&self.position)?;
        let n = x.dim(1)?;
        let eps = self.config.layer_norm_eps;
        let norm = |x: &Tensor, n: &Norm| layer_norm(x, &n.weight, &n.bias, eps);
        x = x.reshape((tiles * n, width))?;
        if let Some((_, pre)) = &self.class {
            x = norm(&x, pre)?;
        }
        for layer in &self.layers {
            let a = norm(&x, &layer.norm1)?;
            let out = self.attend(&layer.q.forward(&a)?, &layer.k.forward(&a)?, &layer.v.forward(&a)?, tiles)?;
            x = add_to(layer.out.forward(&out)?, &x)?;
            let m = layer.fc1.forward(&norm(&x, &layer.norm2)?)?;
            let m = match self.config.arch {
                VisionArch::Siglip => gelu_tanh(m)?,
                // Quick GELU: x * sigmoid(1.702 x).
                VisionArch::Clip => (&m * ((&m * -1.702)?.exp()? + 1.0)?.recip()?)?,
            };
            x = add_to(layer.fc2.forward(&m)?, &x)?;
        }
        x.reshape((tiles, n, width))?.narrow(1, n - g * g, g * g)?.contiguous()
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, tiles: usize) -> Result<Tensor> {
        let (rows, width) = q.dims2()?;
        let (heads, n) = (self.config.num_heads, rows / tiles);
        let split = |t: &Tensor| {
            t.reshape((tiles, n, heads, width / heads))?.transpose(1, 2)?.contiguous()?.reshape((
                tiles * heads,
                n,
                width / heads,
            ))
        };
        let scale = 1.0 / ((width / heads) as f64).sqrt();
        let p = softmax((split(q)?.matmul(&split(k)?.t()?)? * scale)?)?;
        let out = p.matmul(&split(v)?)?.reshape((tiles, heads, n, width / heads))?;
        out.transpose(1, 2)?.contiguous()?.reshape((rows, width))
    }
}

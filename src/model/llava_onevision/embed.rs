//! Pictures and questions become the embeddings that enter the text model: tiles, tower, projector, any-res packing,
//! chat template. Follows transformers' processor and `pack_image_features`.
use super::LlavaOnevision;
use crate::Error;
use crate::calibrate::CalibrateError;
use crate::calibrate::batch::{Kind, Sample};
use crate::checkpoint::Checkpoint;
use crate::image::{Rgb, anyres};
use crate::model::decoder::Linear;
use crate::model::vision::{Reader, Tower};
use crate::prompt::{ChatTemplate, Message};
use candle_core::{Device, Tensor};
use std::path::Path;
use tokenizers::Tokenizer;

/// Tiles that pass through the tower at once.
const TILES: usize = 4;

/// Everything between a sample on disk and its embeddings.
pub struct Embedder<'a> {
    model: &'a LlavaOnevision,
    checkpoint: &'a Checkpoint,
    tower: Tower,
    linear1: Linear,
    linear2: Linear,
    newline: Tensor,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    eos: String,
    device: Device,
}

fn problem(path: &Path, problem: impl std::fmt::Display) -> Error {
    CalibrateError::File { path: path.into(), problem: problem.to_string() }.into()
}

impl<'a> Embedder<'a> {
    /// # Errors
    /// A tensor or a tokenizer file is missing or wrong, or there is no chat template.
    pub fn load(model: &'a LlavaOnevision, checkpoint: &'a Checkpoint, device: &Device) -> Result<Self, Error> {
        // First, as the weights take a while.
        let template = ChatTemplate::read(checkpoint.dir())?;
        let r = Reader { checkpoint, device };
        let (vision, hidden) = (model.vision.hidden_size, model.text.hidden_size);
        let bias = checkpoint.contains("multi_modal_projector.linear_1.bias");
        let path = checkpoint.dir().join("tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path).map_err(|e| problem(&path, e))?;
        let config = checkpoint.json("tokenizer_config.json")?;
        let token = |key: &str| {
            let v = &config[key];
            v.as_str().or(v["content"].as_str()).unwrap_or_default().to_string()
        };
        let eos = token("eos_token");
        if eos.is_empty() {
            return Err(problem(&checkpoint.dir().join("tokenizer_config.json"), "eos_token is missing"));
        }
        Ok(Embedder {
            tower: Tower::load(checkpoint, &model.vision, device)?,
            linear1: r.linear("multi_modal_projector.linear_1", hidden, vision, bias)?,
            linear2: r.linear("multi_modal_projector.linear_2", hidden, hidden, bias)?,
            newline: r.tensor("image_newline", &[hidden])?,
            template,
            model,
            checkpoint,
            tokenizer,
            eos,
            device: device.clone(),
        })
    }

    /// A picture's tokens in the order in which they enter the text model, `[n, hidden]` on the CPU: the overview,
    /// then the rows of the re-assembled grid, a newline behind each.
    ///
    /// # Errors
    /// Tensor arithmetic only.
    pub fn picture(&self, image: &Rgb) -> Result<Tensor, Error> {
        let p = &self.model.preprocessing;
        let side = self.model.vision.image_size;
        let Some(tiles) = anyres::tiles(image, &p.pinpoints, side, p.filter) else {
            return Err(problem(&self.checkpoint.dir().join("preprocessor_config.json"), "no image_grid_pinpoints"));
        };
        let mut features = Vec::new();
        for part in tiles.tiles.chunks(TILES) {
            let mut pixels = Vec::with_capacity(part.len() * 3 * side * side);
            for tile in part {
                for channel in 0..3 {
                    let (mean, std) = (p.mean[channel], p.std[channel]);
                    let values = tile.data.iter().skip(channel).step_by(3);
                    // numpy: uint8 times the factor, in double, then single precision.
                    pixels.extend(values.map(|&v| ((f64::from(v) * (1.0 / 255.0)) as f32 - mean) / std));
                }
            }
            let pixels = Tensor::from_vec(pixels, (part.len(), 3, side, side), &self.device)?;
            let seen = self.tower.forward(&pixels)?;
            let (n, patches, width) = seen.dims3()?;
            let inner = self.linear1.forward(&seen.reshape((n * patches, width))?)?.gelu_erf()?;
            features.push(self.linear2.forward(&inner)?);
        }
        let features = Tensor::cat(&features, 0)?;
        Ok(self.pack(&features, &tiles)?.to_device(&Device::Cpu)?)
    }

    /// `[tiles * g * g, hidden]` to the picture's tokens.
    fn pack(&self, features: &Tensor, tiles: &anyres::Tiles) -> candle_core::Result<Tensor> {
        let g = self.model.vision.grid();
        let hidden = self.model.text.hidden_size;
        let overview = features.narrow(0, 0, g * g)?;
        let (rows, cols) = (tiles.rows * g, tiles.cols * g);
        let grid = features.narrow(0, g * g, rows * cols)?;
        let grid = grid.reshape((tiles.rows, tiles.cols, g, g * hidden))?.transpose(1, 2)?;
        let grid = grid.contiguous()?.reshape((rows, cols, hidden))?;
        let (y, h, x, w) = anyres::unpadded(tiles.original, rows, cols);
        let grid = grid.narrow(0, y, h)?.narrow(1, x, w)?.contiguous()?;
        let (sh, sw) = anyres::shrunk(h, w, g, self.model.anyres_max);
        let grid = if (sh, sw) == (h, w) { grid } else { bilinear(&grid, sh, sw)? };
        let newline = self.newline.reshape((1, 1, hidden))?.broadcast_as((sh, 1, hidden))?.contiguous()?;
        let grid = Tensor::cat(&[grid, newline], 1)?.reshape((sh * (sw + 1), hidden))?;
        Tensor::cat(&[overview, grid], 0)
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        let encoding = self.tokenizer.encode(text, special);
        Ok(encoding.map_err(|e| problem(&self.checkpoint.dir().join("tokenizer.json"), e))?.get_ids().to_vec())
    }

    /// A calibration sample: prompt with the picture, answer, end of turn. `what` names it in messages.
    ///
    /// # Errors
    /// An empty answer, a prompt without exactly one place for the picture, more than `max_tokens` tokens.
    pub fn sample(
        &self,
        what: &Path,
        image: Option<&Rgb>,
        question: &str,
        answer: &str,
        max_tokens: usize,
    ) -> Result<Sample, Error> {
        let turn = Message::new("user", usize::from(image.is_some()), question);
        let prompt = self.template.prompt(&[turn]).map_err(|e| problem(self.checkpoint.dir(), e))?;
        // A template may have written the token with which the tokenizer would begin.
        let begun = !self.template.bos().is_empty() && prompt.starts_with(self.template.bos());
        let prompt = self.encode(&prompt, !begun)?;
        let mut reply = self.encode(answer.trim(), false)?;
        if reply.is_empty() {
            return Err(problem(what, "the answer is empty"));
        }
        reply.extend(self.tokenizer.token_to_id(&self.eos));
        let places: Vec<usize> =
            (0..prompt.len()).filter(|&i| prompt[i] as usize == self.model.image_token_id).collect();
        let pictures = usize::from(image.is_some());
        if places.len() != pictures {
            let why = format!("the prompt has {} places for a picture, not {pictures}", places.len());
            return Err(problem(what, why));
        }
        // Without a picture nothing lies between the prompt's two parts.
        let place = places.first().copied().unwrap_or(0);
        let picture = image.map(|image| self.picture(image)).transpose()?;
        let vision = picture.as_ref().map_or(Ok(0), |p| p.dim(0))?;
        let tokens = prompt.len() - pictures + vision + reply.len();
        if tokens > max_tokens {
            let why =
                format!("{tokens} tokens, {vision} of them the picture's; at most {max_tokens} fit (--max-tokens)");
            return Err(problem(what, why));
        }
        let text: Vec<u32> = prompt[place + pictures..].iter().chain(&reply).copied().collect();
        let embeds = match picture {
            Some(picture) => Tensor::cat(&[self.words(&prompt[..place])?, picture, self.words(&text)?], 0)?,
            None => self.words(&text)?,
        };
        let mut kinds = vec![Kind::Other; place];
        kinds.extend(vec![Kind::Vision; vision]);
        kinds.extend(vec![Kind::Other; prompt.len() - place - pictures]);
        kinds.extend(vec![Kind::Answer; reply.len()]);
        let mut ids = prompt[..place].to_vec();
        ids.extend(vec![prompt[place]; vision]);
        ids.extend(text);
        Ok(Sample { embeds, real: kinds.len(), kinds, ids })
    }

    /// Rows of the embedding, `[n, hidden]` on the CPU.
    fn words(&self, ids: &[u32]) -> Result<Tensor, Error> {
        let text = &self.model.text;
        let hidden = text.hidden_size;
        let name = "language_model.model.embed_tokens.weight";
        let mut data = Vec::with_capacity(ids.len() * hidden);
        for &id in ids {
            let at = id as usize * hidden;
            if id as usize >= text.vocab_size {
                return Err(problem(
                    &self.checkpoint.dir().join("tokenizer.json"),
                    format!("token {id} has no row in {name}"),
                ));
            }
            data.extend(self.checkpoint.f32_range(name, &[text.vocab_size, hidden], at..at + hidden)?);
        }
        Ok(Tensor::from_vec(data, (ids.len(), hidden), &Device::Cpu)?)
    }
}

/// PyTorch's bilinear interpolation, corners not aligned, of `[h, w, c]`.
fn bilinear(x: &Tensor, height: usize, width: usize) -> candle_core::Result<Tensor> {
    let (h, w, _) = x.dims3()?;
    let x = axis(x, 0, h, height)?;
    axis(&x, 1, w, width)
}

fn axis(x: &Tensor, dim: usize, from: usize, to: usize) -> candle_core::Result<Tensor> {
    let scale = from as f32 / to as f32;
    let at: Vec<f32> = (0..to).map(|i| ((i as f32 + 0.5) * scale - 0.5).max(0.0)).collect();
    let low: Vec<u32> = at.iter().map(|a| *a as u32).collect();
    let high: Vec<u32> = low.iter().map(|&l| (l + 1).min(from as u32 - 1)).collect();
    let part: Vec<f32> = at.iter().zip(&low).map(|(a, &l)| a - l as f32).collect();
    let mut shape = [1; 3];
    shape[dim] = to;
    let t = Tensor::from_vec(part, &shape[..], x.device())?;
    let pick = |i: Vec<u32>| x.index_select(&Tensor::new(i, x.device())?, dim);
    let (a, b) = (pick(low)?, pick(high)?);
    a.broadcast_mul(&(1.0 - &t)?)? + b.broadcast_mul(&t)?
}

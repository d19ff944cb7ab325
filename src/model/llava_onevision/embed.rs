//! Pictures and questions become the embeddings that enter the text model: tiles, tower, projector, any-res packing,
//! chat template. Follows transformers' processor and `pack_image_features`.
use super::LlavaOnevision;
use crate::Error;
use crate::calibrate::CalibrateError;
use crate::calibrate::batch::{Kind, Sample};
use crate::calibrate::pairs::ASSISTANT;
use crate::checkpoint::Checkpoint;
use crate::image::{Rgb, anyres};
use crate::model::vision::{Reader, Tower};
use crate::prompt::{ChatTemplate, Message};
use crate::text::Linear;
use candle_core::{Device, Tensor};
use std::ops::Range;
use std::path::Path;
use tokenizers::{Encoding, Tokenizer};

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
    /// A tensor or a tokenizer file is missing or wrong.
    pub fn load(model: &'a LlavaOnevision, checkpoint: &'a Checkpoint, device: &Device) -> Result<Self, Error> {
        let r = Reader { checkpoint, device };
        let (vision, hidden) = (model.vision.hidden_size, model.text.hidden_size);
        let bias = checkpoint.contains("multi_modal_projector.linear_1.bias");
        let path = checkpoint.dir().join("tokenizer.json");
        let json = crate::checkpoint::tokenizer(checkpoint.dir())?;
        let tokenizer = Tokenizer::from_bytes(json.to_string()).map_err(|e| problem(&path, e))?;
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
            template: ChatTemplate::read(checkpoint.dir())?,
            model,
            checkpoint,
            tokenizer,
            eos,
            device: device.clone(),
        })
    }

    /// Whether it computes on the CPU.
    pub fn on_cpu(&self) -> bool {
        self.device.is_cpu()
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
        let features = self.features(&tiles.tiles)?;
        Ok(self.pack(&features, &tiles)?.to_device(&Device::Cpu)?)
    }

    /// The tokens of one picture among several, `[g * g + 1, hidden]` on the CPU: one tile that shows it whole, and a
    /// newline. transformers (since 4.48) cuts tiles only from a picture that is alone.
    ///
    /// # Errors
    /// Tensor arithmetic only.
    pub fn small_picture(&self, image: &Rgb) -> Result<Tensor, Error> {
        let p = &self.model.preprocessing;
        let tile = anyres::whole(image, self.model.vision.image_size, p.mean, p.filter);
        let newline = self.newline.reshape((1, self.model.text.hidden_size))?;
        Ok(Tensor::cat(&[self.features(&[tile])?, newline], 0)?.to_device(&Device::Cpu)?)
    }

    /// What tower and projector make of square tiles, `[tiles * g * g, hidden]` on the device.
    fn features(&self, tiles: &[Rgb]) -> Result<Tensor, Error> {
        let (p, side) = (&self.model.preprocessing, self.model.vision.image_size);
        let mut features = Vec::new();
        for part in tiles.chunks(TILES) {
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
        Ok(Tensor::cat(&features, 0)?)
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

    fn encode(&self, text: &str, special: bool) -> Result<Encoding, Error> {
        let encoding = self.tokenizer.encode(text, special);
        encoding.map_err(|e| problem(&self.checkpoint.dir().join("tokenizer.json"), e))
    }

    /// A calibration sample: the conversation with its pictures, up to the last answer and the end of its turn. Every
    /// answer counts as answer. `what` names the conversation in messages.
    ///
    /// # Errors
    /// [`CalibrateError::Sample`] where the conversation is at fault: it does not end with an answer, the prompt has
    /// not one place for each picture, more than `max_tokens` tokens.
    pub fn sample(
        &self,
        what: &str,
        messages: &[Message],
        pictures: &[Rgb],
        max_tokens: usize,
    ) -> Result<Sample, Error> {
        let unfit = |problem: String| Error::from(CalibrateError::Sample { what: what.into(), problem });
        let Some((last, before)) = messages.split_last().filter(|(last, _)| last.role == ASSISTANT) else {
            return Err(unfit("there is no answer at the end".into()));
        };
        let prompt = self.template.conversation(before).map_err(|e| unfit(e.to_string()))?;
        // A template may have written the token with which the tokenizer would begin.
        let begun = !self.template.bos().is_empty() && prompt.text.starts_with(self.template.bos());
        let (earlier, prompt) = (prompt.answers, self.encode(&prompt.text, !begun)?);
        let mut reply = self.encode(last.text().trim(), false)?.get_ids().to_vec();
        if reply.is_empty() {
            return Err(unfit("the answer is empty".into()));
        }
        reply.extend(self.tokenizer.token_to_id(&self.eos));
        let image = self.model.image_token_id;
        let places = prompt.get_ids().iter().filter(|&&id| id as usize == image).count();
        if places != pictures.len() {
            return Err(unfit(format!("the prompt has {places} places for pictures, not {}", pictures.len())));
        }
        let seen: Vec<Tensor> = pictures
            .iter()
            .map(|p| if places == 1 { self.picture(p) } else { self.small_picture(p) })
            .collect::<Result<_, _>>()?;
        let vision = seen.iter().map(|p| p.dim(0)).sum::<candle_core::Result<usize>>()?;
        let tokens = prompt.len() - places + vision + reply.len();
        if tokens > max_tokens {
            let why =
                format!("{tokens} tokens, {vision} of them the pictures'; at most {max_tokens} fit (--max-tokens)");
            return Err(unfit(why));
        }
        self.lay(&prompt, &earlier, seen, reply)
    }

    /// The tokens of prompt, pictures and reply one after the other. `earlier`: the bytes of the prompt's answers.
    fn lay(
        &self,
        prompt: &Encoding,
        earlier: &[Range<usize>],
        pictures: Vec<Tensor>,
        reply: Vec<u32>,
    ) -> Result<Sample, Error> {
        let image = self.model.image_token_id;
        let (mut ids, mut kinds, mut embeds, mut words) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut pictures = pictures.into_iter();
        for (&id, &(start, end)) in prompt.get_ids().iter().zip(prompt.get_offsets()) {
            if let Some(picture) = (id as usize == image).then(|| pictures.next()).flatten() {
                embeds.extend(self.words(&std::mem::take(&mut words))?);
                ids.resize(ids.len() + picture.dim(0)?, id);
                kinds.resize(ids.len(), Kind::Vision);
                embeds.push(picture);
                continue;
            }
            let answered = start < end && earlier.iter().any(|place| place.contains(&start));
            kinds.push(if answered { Kind::Answer } else { Kind::Other });
            ids.push(id);
            words.push(id);
        }
        ids.extend(&reply);
        kinds.resize(ids.len(), Kind::Answer);
        words.extend(reply);
        embeds.extend(self.words(&words)?);
        Ok(Sample::new(Tensor::cat(&embeds, 0)?, kinds, ids))
    }

    /// Rows of the embedding, `[n, hidden]` on the CPU; none of none.
    fn words(&self, ids: &[u32]) -> Result<Option<Tensor>, Error> {
        if ids.is_empty() {
            return Ok(None);
        }
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
        Ok(Some(Tensor::from_vec(data, (ids.len(), hidden), &Device::Cpu)?))
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

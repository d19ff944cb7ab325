//! `config.json` and `preprocessor_config.json` of the three generations.
use super::tower::{self, Generation, MERGE, QwenTower};
use crate::checkpoint::Checkpoint;
use crate::front::config::{ConfigError, Section};
use crate::front::decoder::DecoderConfig;
use crate::front::processor::{Filter, Normalisation, ProcessorFile};
use crate::front::{claims, config_keys};

/// How many pixels a picture may have when it enters the tower: it is resized to fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PixelLimits {
    pub min: usize,
    pub max: usize,
}

/// A checkpoint's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct QwenVl {
    pub text: DecoderConfig,
    pub tower: QwenTower,
    pub pixels: PixelLimits,
    pub normalisation: Normalisation,
    /// What the user should know about how the configuration was read.
    pub notes: Vec<String>,
}

impl QwenVl {
    /// Reads and checks the configuration of `checkpoint`, and that it holds as many blocks.
    ///
    /// # Errors
    /// A missing file or key, an unsupported architecture or value; the message names file and key.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, crate::Error> {
        let file = checkpoint.dir().join("config.json");
        let c = Section { file: file.clone(), path: String::new(), json: checkpoint.config() };
        let model_type = c.str("model_type")?;
        let generation = Generation::of(model_type).ok_or_else(|| ConfigError::Unsupported {
            file,
            found: model_type.into(),
            supported: "qwen2_vl, qwen2_5_vl, qwen3_vl".into(),
        })?;
        config_keys::check(&c, config_keys::QWEN_VL)?;
        // Qwen2-VL and Qwen2.5-VL are published with the text model's keys on the outside.
        let flat = generation != Generation::Three && c.get("text_config").is_none();
        let section = if flat {
            Section { json: c.json, file: c.file.clone(), path: String::new() }
        } else {
            c.section("text_config")?
        };
        let (mut text, note) = DecoderConfig::of_section(checkpoint, &c, &section)?;
        let mut notes: Vec<String> = note.into_iter().collect();
        let vision = c.section("vision_config")?;
        let tower = QwenTower::read(&vision, generation, text.hidden_size)?;
        // Behind the last block llama.cpp keeps the tokens that are asked for, and no picture's features fit.
        if tower.deepstack.len() >= text.num_layers {
            return Err(vision
                .invalid("deepstack_visual_indexes", "fewer of them than the text model has blocks")
                .into());
        }
        text.deepstack_layers = tower.deepstack.len();
        let key = if flat { "num_hidden_layers" } else { "text_config.num_hidden_layers" };
        text.check_blocks(checkpoint, key)?;
        let layers = [tower.num_layers; 2];
        claims::blocks(checkpoint, "vision_config.depth", tower.num_layers, tower::BLOCKS, layers)?;
        let processor = ProcessorFile::read(checkpoint)?;
        let p = processor.section();
        const CLASS: &str = "Qwen2VLImageProcessor";
        if p.str_opt("image_processor_type")?.is_some_and(|kind| !kind.starts_with(CLASS)) {
            return Err(p.invalid("image_processor_type", CLASS).into());
        }
        if p.bool_opt("do_center_crop")? == Some(true) {
            return Err(p.invalid("do_center_crop", "false or absent").into());
        }
        let mut pixels = PixelLimits::read(&p, &tower)?;
        notes.extend(pixels.settle(&tower));
        let normalisation = Normalisation::read(&p, Filter::Bicubic)?;
        Ok(QwenVl { text, tower, pixels, normalisation, notes })
    }
}

/// Tokens of the largest picture that the runtime takes unless it is told otherwise: attention in the tower needs memory
/// by the square of them.
const MAX_TOKENS: usize = 4096;

impl PixelLimits {
    /// Lowers a maximum that is above the runtime's, and says so.
    fn settle(&mut self, tower: &QwenTower) -> Option<String> {
        let most = MAX_TOKENS * (tower.patch_size * MERGE).pow(2);
        if self.max <= most {
            return None;
        }
        let note = format!(
            "pictures of more than {most} pixels ({MAX_TOKENS} tokens) are made smaller, as llama.cpp does; transformers \
             goes up to {} ({} tokens)",
            self.max,
            self.max * MAX_TOKENS / most
        );
        self.max = most.max(self.min);
        Some(note)
    }

    /// `min_pixels` and `max_pixels` go before `size`, as transformers has it.
    fn read(p: &Section, tower: &QwenTower) -> Result<Self, ConfigError> {
        // (key, the processor's default, the tower's)
        for (key, default, want) in
            [("merge_size", 2, MERGE), ("temporal_patch_size", 2, 2), ("patch_size", 14, tower.patch_size)]
        {
            if p.size_opt(key)?.unwrap_or(default) != want {
                return Err(p.invalid(key, "what vision_config says"));
            }
        }
        let size = if p.get("size").is_some() { Some(p.section("size")?) } else { None };
        let limit = |old: &str, new: &str, default: usize| {
            let inner = match &size {
                None => return Ok(p.size_opt(old)?.unwrap_or(default)),
                Some(size) => match size.size_opt(new)? {
                    Some(n) => Some(n),
                    None => size.size_opt(old)?,
                },
            };
            p.size_opt(old)?.or(inner).ok_or_else(|| size.as_ref().unwrap_or(p).missing(new))
        };
        let (min, max) =
            (limit("min_pixels", "shortest_edge", 56 * 56)?, limit("max_pixels", "longest_edge", 28 * 28 * 1280)?);
        if min > max || max >= 1 << 31 {
            return Err(p.invalid("max_pixels", "at least min_pixels, and below 2^31"));
        }
        Ok(PixelLimits { min, max })
    }
}

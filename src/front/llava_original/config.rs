//! `config.json` of LLaVA's own layout.
use super::tower::Tower;
use crate::checkpoint::Checkpoint;
use crate::front::config::{ConfigError, Section};
use crate::front::config_keys::{self, KeyRule, KeyRule::*};
use crate::front::decoder::DecoderConfig;
use crate::front::llava::{Llava, View, read_normalisation};
use crate::front::llava_onevision::{LlavaOnevision, Preprocessing, anyres_max};
use crate::front::processor::{Size, pinpoints};
use crate::front::tower::{TowerArch, TowerConfig};
use serde_json::Value;
use std::path::Path;

/// The key that tells this layout, and names the tower.
pub(in crate::front) const KEY: &str = "mm_vision_tower";

/// A class of LLaVA's code.
struct Architecture {
    name: &'static str,
    /// Its text model.
    model_type: &'static str,
    /// The chat template that llava-hf publishes for models of this kind, as transformers' conversion writes it.
    template: &'static str,
    /// It is for vocabularies of at most so many tokens.
    most_tokens: usize,
}

const ARCHITECTURES: [Architecture; 3] = [
    Architecture {
        name: "LlavaLlamaForCausalLM",
        model_type: "llama",
        template: include_str!("vicuna.jinja"),
        // Vicuna's. Yi's and Llama 3's are larger, and have templates of their own.
        most_tokens: 32128,
    },
    Architecture {
        name: "LlavaMistralForCausalLM",
        model_type: "mistral",
        template: include_str!("mistral.jinja"),
        most_tokens: usize::MAX,
    },
    Architecture {
        name: "LlavaQwenForCausalLM",
        model_type: "qwen2",
        template: include_str!("qwen.jinja"),
        most_tokens: usize::MAX,
    },
];

/// What LLaVA's code adds to the text model's configuration.
const KEYS: &[(&str, KeyRule)] = &[
    (KEY, Read),
    ("architectures", Read),
    ("image_aspect_ratio", Read),
    ("image_grid_pinpoints", Read),
    ("mm_projector_type", Read),
    ("mm_patch_merge_type", Read),
    ("mm_vision_select_layer", Read),
    ("mm_vision_select_feature", Word("patch")),
    // The tensors' shapes say it.
    ("mm_hidden_size", Harmless),
    ("mm_resampler_type", Off),
    // Tokens around pictures, and in place of them.
    ("mm_use_im_start_end", Off),
    ("mm_use_im_patch_token", Off),
    ("s2", Off),
    // Of training.
    ("mm_projector_lr", Harmless),
    ("mm_vision_tower_lr", Harmless),
    ("mm_tunable_parts", Harmless),
    // Videos are not converted.
    ("mm_newline_position", Harmless),
    ("mm_spatial_pool_mode", Harmless),
    ("mm_spatial_pool_stride", Harmless),
    ("mm_spatial_pool_out_channels", Harmless),
];

/// Whether `config` is of this layout.
pub(in crate::front) fn is_layout(config: &Value) -> bool {
    config.get(KEY).is_some_and(|tower| !tower.is_null())
}

/// Checks what can be said without weights and tower.
///
/// # Errors
/// A class that is not supported, or a key that changes what the model computes and is not understood.
pub(in crate::front) fn accept(dir: &Path, config: &Value) -> Result<(), ConfigError> {
    let c = Section { file: dir.join("config.json"), path: String::new(), json: config };
    architecture(&c)?;
    config_keys::check(&c, KEYS)?;
    for (key, value) in config.as_object().into_iter().flatten() {
        let known = KEYS.iter().any(|(name, _)| name == key);
        if key.starts_with("mm_") && !known && !config_keys::is_nothing(value) {
            return Err(c.invalid(key, "absent: what it changes is not known"));
        }
    }
    // Without the key it is one layer.
    if c.str_opt("mm_projector_type")? != Some("mlp2x_gelu") {
        return Err(c.invalid("mm_projector_type", "mlp2x_gelu"));
    }
    Ok(())
}

fn architecture(c: &Section) -> Result<&'static Architecture, ConfigError> {
    let found = c.get("architectures").and_then(|list| list.get(0)?.as_str());
    let known = ARCHITECTURES.iter().find(|a| Some(a.name) == found);
    known.ok_or_else(|| {
        let want = "LlavaLlamaForCausalLM, LlavaMistralForCausalLM or LlavaQwenForCausalLM, with mm_vision_tower";
        c.invalid("architectures", want)
    })
}

/// A model of this layout.
pub(super) enum Original {
    Llava(Llava),
    Onevision(LlavaOnevision),
}

/// Reads and checks the configuration of `checkpoint`, and that it holds as many blocks. Beside it the chat template to take
/// where the checkpoint has none.
///
/// # Errors
/// A missing file or key, an unsupported architecture or value; the message names file and key.
pub(super) fn read(checkpoint: &Checkpoint) -> Result<(Original, Option<&'static str>), crate::Error> {
    accept(checkpoint.dir(), checkpoint.config())?;
    let file = checkpoint.dir().join("config.json");
    let c = Section { file: file.clone(), path: String::new(), json: checkpoint.config() };
    let architecture = architecture(&c)?;
    let mut json = checkpoint.config().clone();
    json["model_type"] = architecture.model_type.into();
    let section = Section { file, path: String::new(), json: &json };
    let (text, notes) = DecoderConfig::of_section(checkpoint, &c, &section)?;
    let tower = Tower::read(checkpoint, &c)?;
    let vision = tower.config(&c)?;
    let normalisation = read_normalisation(&tower.processor.section(), vision.image_size)?;
    text.check_blocks(checkpoint, "num_hidden_layers")?;
    vision.check_blocks(checkpoint)?;
    let template = (text.vocab_size <= architecture.most_tokens).then_some(architecture.template.trim_end());

    let pinpoints = |vision: &TowerConfig| square_pinpoints(&c, vision);
    let model = match Aspect::read(&c, vision.arch)? {
        Aspect::AnyresMax(anyres_max) => {
            let preprocessing = Preprocessing { pinpoints: pinpoints(&vision)?, normalisation };
            Original::Onevision(LlavaOnevision { text, vision, preprocessing, projector_bias: true, anyres_max, notes })
        }
        aspect => {
            let view = match aspect {
                Aspect::Anyres => View::Tiles(pinpoints(&vision)?),
                Aspect::Pad => View::Square,
                _ => View::Centre,
            };
            Original::Llava(Llava { text, vision, view, normalisation, projector_bias: true, notes })
        }
    };
    Ok((model, template))
}

/// `image_aspect_ratio`
enum Aspect {
    /// Absent or `square`: the processor's crop.
    Crop,
    /// LLaVA 1.5.
    Pad,
    /// LLaVA-NeXT.
    Anyres,
    /// LLaVA-OneVision.
    AnyresMax(usize),
}

impl Aspect {
    /// # Errors
    /// A value that is none of these, another tower than such models have, or grids that are merged in another way.
    fn read(c: &Section, tower: TowerArch) -> Result<Self, ConfigError> {
        const ASPECT: &str = "image_aspect_ratio";
        const MERGE: &str = "mm_patch_merge_type";
        let aspect = match c.str_opt(ASPECT)? {
            None | Some("square") => Aspect::Crop,
            Some("pad") => Aspect::Pad,
            Some("anyres") => Aspect::Anyres,
            Some(other) => Aspect::AnyresMax(
                anyres_max(other).ok_or_else(|| c.invalid(ASPECT, "square, pad, anyres or anyres_max_N"))?,
            ),
        };
        let (want, one) = match aspect {
            Aspect::AnyresMax(_) => (TowerArch::Siglip, false),
            Aspect::Anyres => (TowerArch::Clip, false),
            Aspect::Pad | Aspect::Crop => (TowerArch::Clip, true),
        };
        if tower != want {
            return Err(c.invalid(ASPECT, "anyres_max_N for a SigLIP tower, anything else for CLIP"));
        }
        match (c.str_opt(MERGE)?, one) {
            (Some("spatial_unpad"), false) | (None | Some("flat"), true) => Ok(aspect),
            _ => Err(c.invalid(MERGE, "spatial_unpad for anyres, else flat or absent")),
        }
    }
}

/// `image_grid_pinpoints`. Where two canvases are equally good transformers takes the first [height, width], LLaVA's code the first
/// [width, height]: as in llava-hf's conversions, transformers' reading counts.
///
/// # Errors
/// It is no list of multiples of the tower's side, or the two readings are of other canvases.
fn square_pinpoints(c: &Section, vision: &TowerConfig) -> Result<Vec<Size>, ConfigError> {
    const PINPOINTS: &str = "image_grid_pinpoints";
    let list = pinpoints(c, vision.image_size)?.ok_or_else(|| c.missing(PINPOINTS))?;
    let turned = |p: &Size| Size { height: p.width, width: p.height };
    match list.iter().all(|p| list.contains(&turned(p))) {
        true => Ok(list),
        false => Err(c.invalid(PINPOINTS, "a list that has each canvas in both directions")),
    }
}

//! The vision tower of LLaVA's own layout: a repository that `mm_vision_tower` names.
use super::config::{KEY, accept};
use crate::Error;
use crate::checkpoint::{Checkpoint, read_configuration, read_json};
use crate::events::Observer;
use crate::front::FrontError;
use crate::front::config::{ConfigError, Section};
use crate::front::processor::ProcessorFile;
use crate::front::tower::TowerConfig;
use crate::hub::{Hub, HubId};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What a tower's files say.
pub(super) struct Tower {
    file: PathBuf,
    path: &'static str,
    vision: Value,
    pub processor: ProcessorFile,
}

impl Tower {
    /// # Errors
    /// The tower was not found, or a file of it cannot be read.
    pub fn read(checkpoint: &Checkpoint, c: &Section) -> Result<Self, Error> {
        let Some(dir) = checkpoint.tower() else {
            let published = published(c.str(KEY)?).filter(|_| checkpoint.has_tower());
            let [vision, processor] =
                published.ok_or_else(|| c.invalid(KEY, "a tower that is inside, or the folder of one"))?;
            let file = c.file.clone();
            return Ok(Tower { path: KEY, vision, processor: ProcessorFile::of(file.clone(), processor), file });
        };
        let file = dir.join("config.json");
        let config = read_json(&file)?;
        let (path, vision) = vision_half(&file, &config)?;
        let processor = dir.join("preprocessor_config.json");
        let processor = ProcessorFile::of(processor.clone(), read_json(&processor)?);
        Ok(Tower { file, path, vision, processor })
    }

    /// Its shape, and how many of its blocks run.
    ///
    /// # Errors
    /// A missing key, an unsupported value, or no such block.
    pub fn config(&self, c: &Section) -> Result<TowerConfig, ConfigError> {
        let section = Section { file: self.file.clone(), path: self.path.into(), json: &self.vision };
        if section.str("model_type")? == "siglip_vision_model" {
            // LLaVA's class drops SigLIP's last block, and saves the others.
            return TowerConfig::read(&section, -2);
        }
        const LAYER: &str = "mm_vision_select_layer";
        let layer = c.get(LAYER).and_then(Value::as_i64);
        let blocks = section.size("num_hidden_layers")? as i64;
        let used = layer.map(|layer| if layer < 0 { blocks + 1 + layer } else { layer });
        match layer {
            Some(layer) if used.is_some_and(|used| (1..=blocks).contains(&used)) => TowerConfig::read(&section, layer),
            _ => Err(c.invalid(LAYER, "the output of one of the tower's blocks")),
        }
    }
}

/// The configuration of the half of CLIP or SigLIP that sees, or of that half alone, and where in the file it stands.
fn vision_half(file: &Path, config: &Value) -> Result<(&'static str, Value), ConfigError> {
    let c = Section { file: file.into(), path: String::new(), json: config };
    let (path, kind) = match c.str("model_type")? {
        "clip" => ("vision_config", "clip_vision_model"),
        "siglip" => ("vision_config", "siglip_vision_model"),
        "clip_vision_model" | "siglip_vision_model" => return Ok(("", config.clone())),
        _ => return Err(c.invalid("model_type", "clip or siglip: mm_vision_tower names it as the vision tower")),
    };
    let mut vision = c.section(path)?.json.clone();
    vision["model_type"] = kind.into();
    Ok((path, vision))
}

/// `vision_config` and processor of the towers that published models have inside: their own files are not needed.
fn published(name: &str) -> Option<[Value; 2]> {
    let (kind, width, inner, blocks, side, mean, std) = match name.rsplit('/').next()? {
        "clip-vit-large-patch14-336" => {
            let (mean, std) = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]);
            ("clip_vision_model", 1024, 4096, 24, 336, mean, std)
        }
        "siglip-so400m-patch14-384" => ("siglip_vision_model", 1152, 4304, 27, 384, [0.5; 3], [0.5; 3]),
        _ => return None,
    };
    let vision = json!({"model_type": kind, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks,
                        "num_attention_heads": 16, "image_size": side, "patch_size": 14});
    Some([vision, json!({"size": side, "resample": 3, "image_mean": mean, "image_std": std})])
}

/// Finds the tower of `checkpoint`, downloading it if it is nowhere else: its weights where they are not inside, else its
/// configuration where that is not known.
///
/// # Errors
/// The configuration is not supported; the tower is nowhere, or is none that is supported.
pub(in crate::front) fn find_tower(
    checkpoint: &mut Checkpoint,
    hub: &Hub,
    observer: &dyn Observer,
) -> Result<(), Error> {
    accept(checkpoint.dir(), checkpoint.config())?;
    let file = checkpoint.dir().join("config.json");
    let c = Section { file: file.clone(), path: String::new(), json: checkpoint.config() };
    let name = c.str(KEY)?;
    if checkpoint.has_tower() && published(name).is_some() {
        return Ok(());
    }
    let last = name.trim_end_matches('/').rsplit('/').next().unwrap_or(name);
    let beside = checkpoint.dir().canonicalize().ok().and_then(|dir| Some(dir.parent()?.join(last)));
    let given = Some(PathBuf::from(name)).filter(|path| path.is_absolute());
    let mut folders = given.into_iter().chain([checkpoint.dir().join(last)]).chain(beside);
    let dir = match folders.find(|dir| dir.join("config.json").is_file()) {
        Some(dir) => dir,
        None => name.parse().map_err(Error::from).and_then(|id: HubId| hub.fetch(&id, observer, is_tower)).map_err(
            |error| FrontError::File {
                file,
                problem: format!(
                    "the vision tower is {name:?}, from `{KEY}`, and is not here: {error}; put its folder, called \
                     {last:?}, beside the model's"
                ),
            },
        )?,
    };
    Ok(checkpoint.add_tower(&dir)?)
}

/// # Errors
/// The folder is not that of a CLIP or SigLIP.
fn is_tower(dir: &Path) -> Result<(), Error> {
    let config = read_configuration(dir)?;
    vision_half(&dir.join("config.json"), &config)?;
    Ok(())
}

//! What MODEL names: a checkpoint's folder, a hub id, or a GGUF file.
use super::config::{ConfigError, Section};
use super::{
    FrontError, Origin, Pair, gemma3, gguf, idefics3, internvl, llava, llava_onevision, llava_original, qwen_vl,
};
use crate::Error;
use crate::checkpoint::{Checkpoint, read_configuration};
use crate::events::Observer;
use crate::hub::{Hub, HubId, repository_of};
use crate::runtime::find_mmproj;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The door of a family of checkpoints: (checkpoint, name, repository).
type Front = for<'a> fn(&'a Checkpoint, &str, Option<&str>) -> Result<Pair<'a>, Error>;

/// Every supported family: `model_type` in config.json, or the key that tells LLaVA's own layout, what people call it, its door.
const FAMILIES: [(&str, &str, Front); 12] = [
    ("gemma3", "Gemma 3", gemma3::open),
    ("idefics3", "Idefics3, SmolVLM", idefics3::open),
    ("llava", "LLaVA 1.5", llava::open),
    ("llava_next", "LLaVA-NeXT (1.6)", llava::open),
    ("llava_onevision", "LLaVA-OneVision", llava_onevision::open),
    (llava_original::KEY, "LLaVA 1.5, NeXT and OneVision in LLaVA's own layout", llava_original::open),
    ("qwen2_vl", "Qwen2-VL", qwen_vl::open),
    ("qwen2_5_vl", "Qwen2.5-VL", qwen_vl::open),
    ("qwen3_vl", "Qwen3-VL (dense)", qwen_vl::open),
    ("smolvlm", "SmolVLM2", idefics3::open),
    ("internvl", "InternVL2.5, 3 and 3.5 of transformers (dense)", internvl::open),
    ("internvl_chat", "InternVL2 to 3.5 (dense)", internvl::open),
];

/// The supported families, for people.
pub fn families() -> String {
    FAMILIES.map(|(model_type, name, _)| format!("{name} ({model_type})")).join(", ")
}

/// What can be said about a checkpoint before its weights are there.
///
/// # Errors
/// Its family is not supported, it is an adapter, or its weights are quantised.
fn accept(dir: &Path) -> Result<(), Error> {
    let config = read_configuration(dir)?;
    family(dir, &config)?;
    if llava_original::is_layout(&config) {
        llava_original::accept(dir, &config)?;
    }
    Ok(())
}

/// The checkpoint in `dir` and what it names as a part of it.
fn open(dir: &Path, hub: &Hub, observer: &dyn Observer) -> Result<Checkpoint, Error> {
    let mut checkpoint = Checkpoint::open(dir)?;
    if llava_original::is_layout(checkpoint.config()) {
        llava_original::find_tower(&mut checkpoint, hub, observer)?;
    }
    Ok(checkpoint)
}

/// The family of the checkpoint in `dir`, whose config.json is `config`.
fn family(dir: &Path, config: &Value) -> Result<Front, ConfigError> {
    let file = dir.join("config.json");
    let found = match llava_original::is_layout(config) {
        true => llava_original::KEY,
        false => Section { file: file.clone(), path: String::new(), json: config }.str("model_type")?,
    };
    let known = FAMILIES.iter().find(|(model_type, ..)| *model_type == found);
    known.map(|(.., front)| *front).ok_or_else(|| ConfigError::Unsupported {
        file,
        found: found.into(),
        supported: families(),
    })
}

/// A model on disk.
pub enum FoundModel {
    Checkpoint {
        checkpoint: Checkpoint,
        /// `org/name` on the hub, if it came from there.
        repository: Option<String>,
    },
    Gguf {
        text: PathBuf,
        mmproj: Option<PathBuf>,
    },
}

impl FoundModel {
    /// Finds `model`, downloading it if it is a hub id. `mmproj` is the vision file of a GGUF model; without one the
    /// mmproj*.gguf beside the model is taken, and without that it is a text model.
    ///
    /// # Errors
    /// Nothing is there, the hub does not have it, or several mmproj files lie beside the model.
    pub fn find(
        model: impl AsRef<Path>,
        mmproj: Option<&Path>,
        hub: &Hub,
        observer: &dyn Observer,
    ) -> Result<Self, Error> {
        let path = model.as_ref();
        let fail = |problem: String| FrontError::File { file: path.into(), problem };
        if path.is_file() {
            if path.extension().is_none_or(|end| end != "gguf") {
                return Err(fail("is neither a .gguf file nor a checkpoint's folder".into()).into());
            }
            let mmproj = match mmproj {
                Some(given) => Some(given.to_path_buf()),
                None => match find_mmproj(path) {
                    Ok(found) => Some(found),
                    Err(crate::runtime::RuntimeError::NoMmproj { .. }) => None,
                    Err(error) => return Err(fail(error.to_string()).into()),
                },
            };
            return Ok(FoundModel::Gguf { text: path.into(), mmproj });
        }
        if mmproj.is_some() {
            return Err(fail("--mmproj goes with a GGUF model; a checkpoint has its own vision tower".into()).into());
        }
        if path.is_dir() {
            let repository = repository_of(path);
            return Ok(FoundModel::Checkpoint { checkpoint: open(path, hub, observer)?, repository });
        }
        let id: HubId = path.to_string_lossy().parse()?;
        let dir = hub.fetch(&id, observer, accept)?;
        Ok(FoundModel::Checkpoint { checkpoint: open(&dir, hub, observer)?, repository: Some(id.name) })
    }

    /// The two files that it becomes.
    ///
    /// # Errors
    /// A family that is not supported; what the family's front refuses.
    pub fn pair(&self) -> Result<Pair<'_>, Error> {
        match self {
            FoundModel::Checkpoint { checkpoint, repository } => {
                let name = display_name(checkpoint.dir(), repository.as_deref());
                family(checkpoint.dir(), checkpoint.config())?(checkpoint, &name, repository.as_deref())
            }
            FoundModel::Gguf { text, mmproj } => gguf::pair(text, mmproj.as_deref()),
        }
    }

    /// Where it came from.
    pub fn origin(&self) -> Origin {
        match self {
            FoundModel::Checkpoint { checkpoint, repository } => {
                let name = repository.clone().unwrap_or_else(|| checkpoint.dir().display().to_string());
                Origin::checkpoint(checkpoint.dir(), name)
            }
            FoundModel::Gguf { text, mmproj } => Origin::gguf(text, mmproj.as_deref()),
        }
    }
}

/// The model's name: the hub's, or the directory's.
fn display_name(dir: &Path, repository: Option<&str>) -> String {
    if let Some(repository) = repository {
        return repository.rsplit('/').next().unwrap_or(repository).into();
    }
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.into());
    dir.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned())
}

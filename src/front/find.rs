//! What MODEL names: a checkpoint's folder, a hub id, or a GGUF file.
use super::config::{ConfigError, Section};
use super::{FrontError, Origin, Pair, gemma3, gguf, idefics3, internvl, llava, llava_onevision, qwen_vl};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::events::Observer;
use crate::hub::{Hub, HubId, repository_of};
use crate::runtime::find_mmproj;
use std::path::{Path, PathBuf};

/// The door of a family of checkpoints: (checkpoint, name, repository).
type Front = for<'a> fn(&'a Checkpoint, &str, Option<&str>) -> Result<Pair<'a>, Error>;

/// Every supported family: `model_type` in config.json, what people call it, its door.
const FAMILIES: [(&str, &str, Front); 11] = [
    ("gemma3", "Gemma 3", gemma3::open),
    ("idefics3", "Idefics3, SmolVLM", idefics3::open),
    ("llava", "LLaVA 1.5", llava::open),
    ("llava_next", "LLaVA-NeXT (1.6)", llava::open),
    ("llava_onevision", "LLaVA-OneVision", llava_onevision::open),
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

/// The family of a checkpoint.
fn family(checkpoint: &Checkpoint) -> Result<Front, ConfigError> {
    let file = checkpoint.dir().join("config.json");
    let config = Section { file: file.clone(), path: String::new(), json: checkpoint.config() };
    const ORIGINAL: &str = "mm_vision_tower";
    if config.get(ORIGINAL).is_some() {
        let want = "absent: this is LLaVA's original layout, which is not read; llava-hf has the published models in \
                    transformers' (llava-hf/llava-1.5-7b-hf is liuhaotian/llava-v1.5-7b)";
        return Err(config.invalid(ORIGINAL, want));
    }
    let found = config.str("model_type")?;
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
    pub fn find(model: &str, mmproj: Option<&Path>, hub: &Hub, observer: &dyn Observer) -> Result<Self, Error> {
        let path = Path::new(model);
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
            return Ok(FoundModel::Checkpoint { checkpoint: Checkpoint::open(path)?, repository });
        }
        let id: HubId = model.parse()?;
        let dir = hub.fetch(&id, observer)?;
        Ok(FoundModel::Checkpoint { checkpoint: Checkpoint::open(&dir)?, repository: Some(id.name) })
    }

    /// The two files that it becomes.
    ///
    /// # Errors
    /// A family that is not supported; what the family's front refuses.
    pub fn pair(&self) -> Result<Pair<'_>, Error> {
        match self {
            FoundModel::Checkpoint { checkpoint, repository } => {
                let name = display_name(checkpoint.dir(), repository.as_deref());
                family(checkpoint)?(checkpoint, &name, repository.as_deref())
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

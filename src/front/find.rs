//! What MODEL names: a checkpoint's folder, a hub id, or a GGUF file.
use super::{ConfigError, FrontError, Pair, gguf, llava, llava_onevision};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::events::Observer;
use crate::hub::{Hub, HubId, repository_of};
use crate::runtime::find_mmproj;
use std::path::{Path, PathBuf};

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
                open(checkpoint, &name, repository.as_deref())
            }
            FoundModel::Gguf { text, mmproj } => gguf::pair(text, mmproj.as_deref()),
        }
    }

    /// Where it came from: `org/name` on the hub, or a path.
    pub fn origin(&self) -> String {
        match self {
            FoundModel::Checkpoint { checkpoint, repository } => {
                repository.clone().unwrap_or_else(|| checkpoint.dir().display().to_string())
            }
            FoundModel::Gguf { text, .. } => text.display().to_string(),
        }
    }
}

/// Families whose checkpoints are read.
pub const SUPPORTED: &str = "llava_onevision, llava (1.5), llava_next (1.6)";

/// Both files of a checkpoint, by the front of its family.
fn open<'a>(checkpoint: &'a Checkpoint, name: &str, repository: Option<&str>) -> Result<Pair<'a>, Error> {
    match checkpoint.config()["model_type"].as_str() {
        Some("llava_onevision") => llava_onevision::open(checkpoint, name, repository),
        Some("llava" | "llava_next") => llava::open(checkpoint, name, repository),
        other => {
            let file = checkpoint.dir().join("config.json");
            let found = other.unwrap_or("absent").into();
            Err(ConfigError::Unsupported { file, found, supported: SUPPORTED }.into())
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

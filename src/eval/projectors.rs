//! Which projector (mmproj) makes the pictures of which model.
//!
//! Quantisations of one model share a projector. A rotated model has one of its own; the id that mbq-convert writes into
//! both files tells ([`crate::gguf::pair_of`]). Files without an id go with any that is not rotated.

use std::path::{Path, PathBuf};

use super::run::EvalError;
use crate::gguf::{GgufError, GgufFile, PAIR_KEY, belongs};

/// The projectors in use.
#[derive(Debug)]
pub(super) struct Projectors {
    pub files: Vec<GgufFile>,
    /// For the reference, then for each candidate: its place in `files`.
    of: Vec<usize>,
}

impl Projectors {
    /// Finds each model's projector: of the `given` ones, or beside the model the one that carries its id. `models` begins
    /// with the reference.
    ///
    /// # Errors
    /// A model has none, or a given one is no model's.
    pub fn assign(models: &[&GgufFile], given: Vec<GgufFile>) -> Result<Self, EvalError> {
        let count = given.len();
        let mut this = Projectors { files: given, of: Vec::new() };
        for model in models {
            let at = this.find(model)?;
            this.of.push(at);
        }
        match this.files[..count].iter().enumerate().find(|(i, _)| !this.of.contains(i)) {
            Some((_, unused)) => Err(EvalError::UnusedProjector { path: unused.path.clone() }),
            None => Ok(this),
        }
    }

    /// The place of the projector of model `i`, the reference being 0.
    pub fn of(&self, i: usize) -> usize {
        self.of[i]
    }

    fn find(&mut self, model: &GgufFile) -> Result<usize, EvalError> {
        let id = model.metadata.str(PAIR_KEY);
        let own = |f: &GgufFile| id.is_some() && f.metadata.str(PAIR_KEY) == id;
        let mut files = self.files.iter();
        if let Some(at) =
            files.position(own).or_else(|| self.files.iter().position(|f| belongs(&model.metadata, &f.metadata)))
        {
            return Ok(at);
        }
        match id.and_then(|id| beside(&model.path, id)) {
            Some(found) => {
                self.files.push(found);
                Ok(self.files.len() - 1)
            }
            None => {
                let mmproj = self.files[0].path.clone();
                Err(EvalError::Pair(GgufError::Pair { model: model.path.clone(), mmproj }))
            }
        }
    }
}

/// The first file of the model's folder that is a projector with this id.
fn beside(model: &Path, id: &str) -> Option<GgufFile> {
    let dir = model.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let files = std::fs::read_dir(dir).ok()?.filter_map(|f| Some(f.ok()?.path()));
    let named = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("mmproj") && name.ends_with(".gguf")
    };
    let mut files: Vec<PathBuf> = files.filter(named).collect();
    files.sort();
    let mut headers = files.iter().filter_map(|path| GgufFile::open(path).ok());
    headers.find(|h| h.is_projector() && h.metadata.str(PAIR_KEY) == Some(id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Header;

    fn file(path: PathBuf, architecture: &str, id: Option<&str>) -> GgufFile {
        let mut header = Header::default();
        header.metadata.set("general.architecture", architecture);
        if let Some(id) = id {
            header.metadata.set(PAIR_KEY, id);
        }
        std::fs::write(&path, header.encode()).unwrap();
        GgufFile::open(&path).unwrap()
    }

    #[test]
    fn every_model_has_its_own() {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["rotated", "others"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let text = |name: &str, id| file(dir.path().join(name), "qwen2", id);
        let mmproj = |name: &str, id| file(dir.path().join(name), "clip", id);
        let (plain, rotated, other) =
            (text("f16.gguf", Some("a")), text("rotated/q.gguf", Some("b")), text("o.gguf", None));
        let give = || mmproj("mmproj-f16.gguf", Some("a"));
        let assign = |models: &[&GgufFile], given| Projectors::assign(models, given).map(|p| p.of);

        assert_eq!(assign(&[&plain, &plain, &other], vec![give()]).unwrap(), [0, 0, 0]);
        let error = assign(&[&plain, &rotated], vec![give()]).unwrap_err().to_string();
        assert!(error.contains("rotated/q.gguf") && error.contains("/mmproj-f16.gguf does not belong"), "{error}");
        let theirs = || mmproj("others/mmproj.gguf", None);
        assert_eq!(assign(&[&rotated, &plain], vec![theirs()]).unwrap(), [0, 0]);
        assert_eq!(assign(&[&plain, &rotated], vec![theirs(), give()]).unwrap(), [1, 0]);
        let error = assign(&[&plain], vec![theirs(), give()]).unwrap_err().to_string();
        assert!(error.contains("others/mmproj.gguf") && error.contains("no model"), "{error}");

        // Beside the candidate, whatever its name says.
        mmproj("rotated/mmproj-a.gguf", Some("c"));
        let own = mmproj("rotated/mmproj-x.gguf", Some("b"));
        let found = Projectors::assign(&[&plain, &rotated, &plain], vec![give()]).unwrap();
        assert_eq!((found.of, &found.files[1].path), (vec![0, 1, 0], &own.path));
        assert_eq!(assign(&[&plain, &rotated], vec![give(), own]).unwrap(), [0, 1]);
    }
}

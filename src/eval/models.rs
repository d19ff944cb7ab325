//! The files of an evaluation: the reference (model 0), the candidates (models 1, 2, …) and their projectors.

use std::path::{Path, PathBuf};

use super::data::Questions;
use super::projectors::Projectors;
use super::run::{EvalError, Setup};
use crate::digest::hex;
use crate::events::{Event, Observer};
use crate::gguf::GgufFile;

/// What the files' headers say, and their digests.
pub(super) struct Models {
    pub reference: GgufFile,
    pub candidates: Vec<GgufFile>,
    projectors: Option<Projectors>,
    /// SHA-256 of the models, then of the projectors.
    digests: Vec<String>,
}

/// The file's name, for messages.
pub(super) fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

impl Models {
    /// Reads the headers, and the questions: projectors count where these have pictures.
    ///
    /// # Errors
    /// A file that is not what it is given as; vocabularies that differ; a model without projector; bad questions.
    pub fn read(setup: &Setup) -> Result<(Self, Questions), EvalError> {
        let text = |path: &PathBuf| {
            let header = GgufFile::open(path)?;
            if header.is_projector() {
                return Err(EvalError::IsProjector { path: path.into() });
            }
            Ok(header)
        };
        let reference = text(&setup.reference)?;
        let candidates = setup.candidates.iter().map(text).collect::<Result<Vec<_>, _>>()?;
        for candidate in &candidates {
            if let Some(what) = reference.vocabulary_difference(candidate) {
                let (candidate, reference) = (candidate.path.clone(), reference.path.clone());
                return Err(EvalError::Vocabulary { candidate, reference, what });
            }
        }
        let given = setup.mmproj.iter().map(|path| GgufFile::open(path)).collect::<Result<Vec<_>, _>>()?;
        if let Some(header) = given.iter().find(|header| !header.is_projector()) {
            let architecture = header.architecture().to_owned();
            return Err(EvalError::NotProjector { path: header.path.clone(), architecture });
        }
        let questions = Questions::read(&setup.data, &setup.image_root, setup.limit)?;
        let projectors = match questions.list.iter().filter(|q| q.image.is_some()).count() {
            0 => None,
            pictures if given.is_empty() => return Err(EvalError::NoProjector(pictures)),
            _ => {
                let models: Vec<&GgufFile> = std::iter::once(&reference).chain(&candidates).collect();
                Some(Projectors::assign(&models, given)?)
            }
        };
        Ok((Models { reference, candidates, projectors, digests: Vec::new() }, questions))
    }

    /// Hashes all files.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn hash(&mut self, observer: &dyn Observer) -> Result<(), EvalError> {
        let models = std::iter::once(&self.reference).chain(&self.candidates);
        let all: Vec<&GgufFile> = models.chain(self.projectors.iter().flat_map(|p| &p.files)).collect();
        observer.event(Event::PhaseStart { name: "checksums".into(), total: all.len() as u64, unit: "files" });
        for header in all {
            self.digests.push(hex(&header.digest()));
            observer.event(Event::Advance { n: 1, detail: name(&header.path) });
        }
        observer.event(Event::PhaseEnd);
        Ok(())
    }

    /// The digest of model `i`, once they are hashed.
    pub fn digest(&self, i: usize) -> &str {
        &self.digests[i]
    }

    /// The projector of model `i` and its digest, once they are hashed.
    pub fn projector(&self, i: usize) -> Option<(&GgufFile, &str)> {
        let projectors = self.projectors.as_ref()?;
        let at = projectors.of(i);
        Some((&projectors.files[at], &self.digests[1 + self.candidates.len() + at]))
    }

    /// The projector of model `i` where it is not the reference's.
    pub fn own_projector(&self, i: usize) -> Option<(&GgufFile, &str)> {
        self.projector(i).filter(|own| self.projector(0).is_some_and(|reference| reference.1 != own.1))
    }
}

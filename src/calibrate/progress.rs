//! What of a calibration is done, on disk after every step, so that an interrupted run can go on.
use super::CalibrateError;
use super::compensate::Compensated;
use super::mbq::FoundScales;
use super::sensitivity::BlockSensitivity;
use super::store::{JobId, replace};
use crate::Error;
use crate::events::{Event, Observer};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The part of a calibration that is done, as `--resume` reads it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Progress {
    pub job: JobId,
    pub loss: Option<f64>,
    pub sensitivities: Vec<BlockSensitivity>,
    pub blocks: Vec<Vec<FoundScales>>,
    /// Blocks whose bytes are in the store.
    #[serde(default)]
    pub compensated: Vec<Compensated>,
}

impl Progress {
    /// What `path` says is done of `job`. Nothing, if the checkpoint at the job's place is another by now.
    pub fn read(path: &Path, job: &JobId, observer: &dyn Observer) -> Result<Self, Error> {
        let fail = |problem: String| CalibrateError::File { path: path.into(), problem };
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Progress::default()),
            Err(e) => return Err(fail(e.to_string()).into()),
        };
        let progress: Progress = serde_json::from_slice(&bytes)
            .map_err(|e| fail(format!("not a progress file of this version ({e}): start without --resume")))?;
        if progress.job.model == job.model && progress.job.weights != job.weights {
            let note = "the checkpoint has changed since the run that --resume would continue: starting over";
            observer.event(Event::Note(format!("{}: {note}", job.model)));
            return Ok(Progress::default());
        }
        if progress.job != *job {
            let problem = "belongs to another calibration (model, data or settings differ): leave out --resume, or name another --work-dir";
            return Err(fail(problem.into()).into());
        }
        Ok(progress)
    }

    /// Puts it on disk in place of what was there; a crash leaves one or the other.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        // invariant: numbers, strings and lists only.
        replace(path, &serde_json::to_vec(self).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers come back with all their bits, or a resumed run would weigh errors otherwise than an undisturbed one.
    #[test]
    fn numbers_are_kept_exactly() {
        for loss in [0.00023215782619291782, 0.00010868789853539893, 1.0 / 3.0, f64::MIN_POSITIVE, f64::MAX] {
            let progress = Progress { loss: Some(loss), ..Progress::default() };
            let read: Progress = serde_json::from_slice(&serde_json::to_vec(&progress).unwrap()).unwrap();
            assert_eq!(read.loss, Some(loss));
        }
    }
}

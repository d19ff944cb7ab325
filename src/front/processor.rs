//! How pictures become pixel values: `preprocessor_config.json`, or `image_processor` in `processor_config.json`.
use super::config::{ConfigError, Section};
use crate::Error;
use crate::checkpoint::Checkpoint;
use serde_json::Value;
use std::path::PathBuf;

const FLAT: &str = "preprocessor_config.json";
const NESTED: &str = "processor_config.json";
const SECTION: &str = "image_processor";

/// The file that describes it.
pub(super) struct Processor {
    file: PathBuf,
    path: &'static str,
    json: Value,
}

impl Processor {
    /// transformers 5 writes the section and no file of its own, and prefers it where both are there.
    ///
    /// # Errors
    /// A file is missing or no JSON.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, Error> {
        let file = checkpoint.dir().join(NESTED);
        let nested = file.exists().then(|| checkpoint.json(NESTED)).transpose()?;
        if let Some(json) = nested.as_ref().and_then(|json| json.get(SECTION)).filter(|v| v.is_object()) {
            return Ok(Processor { file, path: SECTION, json: json.clone() });
        }
        Ok(Processor { file: checkpoint.dir().join(FLAT), path: "", json: checkpoint.json(FLAT)? })
    }

    pub fn section(&self) -> Section<'_> {
        Section { file: self.file.clone(), path: self.path.into(), json: &self.json }
    }
}

/// Checks that pictures are resized by bicubic filtering, scaled to 0…1 and normalised, not cropped, by `class` or its
/// fast form.
///
/// # Errors
/// It is not so; the message names the key.
pub(super) fn check_steps(p: &Section, class: &'static str) -> Result<(), ConfigError> {
    if p.str_opt("image_processor_type")?.is_some_and(|kind| !kind.starts_with(class)) {
        return Err(p.invalid("image_processor_type", class));
    }
    if p.bool_opt("do_center_crop")? == Some(true) {
        return Err(p.invalid("do_center_crop", "false or absent"));
    }
    for key in ["do_resize", "do_rescale", "do_normalize"] {
        if p.bool_opt(key)? == Some(false) {
            return Err(p.invalid(key, "true"));
        }
    }
    let rescale = p.float_opt("rescale_factor")?.unwrap_or(1.0 / 255.0);
    if (rescale * 255.0 - 1.0).abs() > 1e-6 {
        return Err(p.invalid("rescale_factor", "1/255"));
    }
    // Pillow's number of the filter.
    if p.get("resample").is_some_and(|v| v.as_u64() != Some(3)) {
        return Err(p.invalid("resample", "3 (bicubic)"));
    }
    Ok(())
}

/// Three numbers, one for each colour.
pub(super) fn colours(s: &Section, key: &str) -> Result<[f32; 3], ConfigError> {
    let list = s.get(key).ok_or_else(|| s.missing(key))?.as_array();
    let values: Option<Vec<f32>> = list.and_then(|l| l.iter().map(|v| v.as_f64().map(|x| x as f32)).collect());
    values.and_then(|v| v.try_into().ok()).ok_or_else(|| s.invalid(key, "three numbers"))
}

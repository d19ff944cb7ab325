//! The image processor of a checkpoint: the file it stands in, and what these processors have in common.
use super::config::{ConfigError, Section};
use crate::checkpoint::{Checkpoint, CheckpointError, optional_json};
use crate::gguf::Metadata;
use serde_json::Value;
use std::path::PathBuf;

const FLAT: &str = "preprocessor_config.json";
const NESTED: &str = "processor_config.json";

/// The image processor's configuration.
pub(super) struct ProcessorFile {
    file: PathBuf,
    path: &'static str,
    json: Value,
}

impl ProcessorFile {
    /// Section `image_processor` of `processor_config.json`, which transformers 5 writes and prefers where both are
    /// there, else `preprocessor_config.json`.
    ///
    /// # Errors
    /// Neither is there, or it cannot be read.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        if checkpoint.dir().join(NESTED).exists() {
            let json = checkpoint.json(NESTED)?;
            if let Some(json) = json.get("image_processor").filter(|v| v.is_object()) {
                let file = checkpoint.dir().join(NESTED);
                return Ok(ProcessorFile { file, path: "image_processor", json: json.clone() });
            }
        }
        Ok(ProcessorFile { file: checkpoint.dir().join(FLAT), path: "", json: checkpoint.json(FLAT)? })
    }

    /// `processor_config.json` as a whole, what stands beside the image processor; empty where it is absent.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn outer(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let json = optional_json(checkpoint.dir(), NESTED)?;
        Ok(ProcessorFile { file: checkpoint.dir().join(NESTED), path: "", json })
    }

    /// `preprocessor_config.json` of another folder, or what stands for it.
    pub fn of(file: PathBuf, json: Value) -> Self {
        ProcessorFile { file, path: "", json }
    }

    pub fn section(&self) -> Section<'_> {
        Section { file: self.file.clone(), path: self.path.into(), json: &self.json }
    }
}

/// What pictures are resized with, by Pillow's numbers. The runtime has one for each projector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    Lanczos = 1,
    Bilinear = 2,
    Bicubic = 3,
}

/// By which mean and deviation the channels of pixels from 0 to 1 are normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalisation {
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

impl Normalisation {
    /// # Errors
    /// A step is left out, or pixels are scaled or resampled in another way than the runtime does: by the filter `resample`.
    pub(super) fn read(p: &Section, resample: Filter) -> Result<Self, ConfigError> {
        for key in ["do_resize", "do_rescale", "do_normalize"] {
            if p.bool_opt(key)? == Some(false) {
                return Err(p.invalid(key, "true"));
            }
        }
        let rescale = p.float_opt("rescale_factor")?.unwrap_or(1.0 / 255.0);
        if (rescale * 255.0 - 1.0).abs() > 1e-6 {
            return Err(p.invalid("rescale_factor", "1/255"));
        }
        if p.get("resample").is_some_and(|v| v.as_u64() != Some(resample as u64)) {
            let want = match resample {
                Filter::Lanczos => "1 (Lanczos)",
                Filter::Bilinear => "2 (bilinear)",
                Filter::Bicubic => "3 (bicubic)",
            };
            return Err(p.invalid("resample", want));
        }
        Ok(Normalisation { mean: triple(p, "image_mean", -SHIFT)?, std: triple(p, "image_std", f32::MIN_POSITIVE)? })
    }

    pub(super) fn write(&self, keys: &mut Metadata) {
        keys.set_array("clip.vision.image_mean", self.mean.as_slice());
        keys.set_array("clip.vision.image_std", self.std.as_slice());
    }
}

/// Colours, from 0 to 1 or to 255, are shifted and divided by no more than this.
const SHIFT: f32 = 1000.0;

/// Three numbers from `least` to [`SHIFT`].
fn triple(s: &Section, key: &str, least: f32) -> Result<[f32; 3], ConfigError> {
    let list = s.get(key).ok_or_else(|| s.missing(key))?.as_array();
    let number = |v: &Value| v.as_f64().map(|x| x as f32).filter(|x| (least..=SHIFT).contains(x));
    let values: Option<Vec<f32>> = list.and_then(|l| l.iter().map(number).collect());
    let want = "three numbers to shift colours (image_mean) or to divide them (image_std) by";
    values.and_then(|v| v.try_into().ok()).ok_or_else(|| s.invalid(key, want))
}

/// A canvas' sides, pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub height: usize,
    pub width: usize,
}

/// `image_grid_pinpoints`, multiples of `side`, in the order of the file (ties are broken by it); none: the key is absent.
///
/// # Errors
/// It is no such list.
pub(super) fn pinpoints(s: &Section, side: usize) -> Result<Option<Vec<Size>>, ConfigError> {
    const KEY: &str = "image_grid_pinpoints";
    let bad = || s.invalid(KEY, "a list of [height, width], multiples of image_size");
    let Some(list) = s.get(KEY) else { return Ok(None) };
    let list = list.as_array().ok_or_else(bad)?;
    let side_of = |v: &Value| v.as_u64().map(|n| n as usize).filter(|n| *n > 0 && n % side == 0 && *n < 1 << 16);
    let size = |p: &Value| match p.as_array()?.as_slice() {
        [height, width] => Some(Size { height: side_of(height)?, width: side_of(width)? }),
        _ => None,
    };
    let all: Option<Vec<Size>> = list.iter().map(size).collect();
    all.filter(|v| !v.is_empty()).map(Some).ok_or_else(bad)
}

/// Pairs of (width, height), in the file's order, which decides between equally good canvases.
pub(super) fn write_pinpoints(pinpoints: &[Size], keys: &mut Metadata) {
    let pairs: Vec<i32> = pinpoints.iter().flat_map(|p| [p.width as i32, p.height as i32]).collect();
    keys.set_array("clip.vision.image_grid_pinpoints", pairs.as_slice());
}

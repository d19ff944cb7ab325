//! The part of a record that calibration wrote, as far as a page shows it. Older records lack some of it.
use crate::calibrate::answers::Turns;
use crate::calibrate::compensate::{Compensated, CompensationSettings};
use crate::calibrate::mbq::Ratios;
use crate::calibrate::sensitivity::BlockSensitivity;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What calibration noted.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Noted {
    pub settings: NotedSettings,
    pub skipped: Vec<String>,
    pub own_answers: Option<BTreeMap<String, Turns>>,
    pub tokens: Option<u64>,
    pub image_root: Option<PathBuf>,
    pub bpw: Option<f64>,
    pub imatrix_file: Option<PathBuf>,
    pub sensitivities: Vec<BlockSensitivity>,
    pub ratios: Vec<Ratios>,
    pub blocks: Vec<Vec<NotedScales>>,
    pub compensated: Vec<Compensated>,
    pub seconds: NotedSeconds,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct NotedSettings {
    pub compensation: Option<CompensationSettings>,
    /// By the keys of `--set`; null where the default was taken.
    pub switches: Map<String, Value>,
    /// How many were used.
    pub samples: usize,
    /// The list's path, or `built-in`.
    pub source: Option<String>,
    /// `Balanced` or `Image`.
    pub imatrix: Option<String>,
}

impl NotedSettings {
    /// How many entries were drawn, of which `skipped` could not be used.
    pub fn drawn(&self, skipped: usize) -> usize {
        self.samples.saturating_add(skipped)
    }
}

/// What the search of scales found for a group.
#[derive(Debug, Deserialize)]
pub struct NotedScales {
    pub group: String,
    pub ratio: Option<f64>,
    pub exponent: Option<f64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct NotedSeconds {
    pub embedding: Option<f64>,
    /// Seconds by name; of `each block` a list.
    pub phases: Map<String, Value>,
    pub all: Option<f64>,
}

//! What a calibration can be told: the methods, and the switches of research (`--set KEY=VALUE`, docs/calibration.md).
//! A switch that would change nothing under a method is refused.
use super::compensate::VisionWeight;
use super::grid::{Activations, WeightGrid};
use super::mbq::Loss;
use super::{CalibrateError, CalibrateOptions};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};
use std::num::NonZeroUsize;

/// Tokens that are packed together, at least.
pub(super) const CHUNK_TOKENS: usize = 1024;

/// How a model is quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Modalities are balanced while rounding errors are compensated; where no linear's type can be, while scales are
    /// searched.
    Mbq,
    /// The paper's search of scales alone.
    MbqScales,
    /// The search without balance, loss mse unless stated.
    Awq,
    SmoothQuant,
    /// Error compensation without scales or balance.
    Gptq,
    /// Round to nearest: no scales.
    Rtn,
}

impl Method {
    /// As `--method` and `mbq.method` spell it.
    pub fn name(self) -> &'static str {
        match self {
            Method::Mbq => "mbq",
            Method::MbqScales => "mbq-scales",
            Method::Awq => "awq",
            Method::SmoothQuant => "smoothquant",
            Method::Gptq => "gptq",
            Method::Rtn => "rtn",
        }
    }

    /// What is done for linears of which `compensated` says whether their rounding errors can be compensated.
    pub fn of_types(self, compensated: bool) -> Self {
        match self {
            Method::Mbq if !compensated => Method::MbqScales,
            Method::Gptq if !compensated => Method::Rtn,
            method => method,
        }
    }

    /// Whether rounding errors are compensated.
    pub fn compensates(self) -> bool {
        matches!(self, Method::Mbq | Method::Gptq)
    }
}

/// What linears' inputs are rounded to while they are calibrated for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationBits {
    #[default]
    Float,
    /// Blocks of 32 in int8, as ggml's integer kernels have them (W4A8).
    Int8,
    /// The paper's grids: weights of 4 bits per channel, activations of 8 per token.
    Paper,
}

/// Switches of research, by the keys of `--set`; `None` is the default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Switches {
    /// Which pairs are drawn when there are more [default: 0].
    pub seed: Option<u64>,
    /// Samples of more tokens are skipped [default: the model's context].
    pub max_tokens: Option<NonZeroUsize>,
    pub activations: Option<ActivationBits>,
    /// The model's own answers to general questions about each picture are calibrated on, too [default: on for mbq].
    pub own_answers: Option<bool>,
    /// Look for scales before errors are compensated, too [default: off].
    pub scales: Option<bool>,
    /// How errors are added up in the search [default: mae for mbq, mse for awq].
    pub loss: Option<Loss>,
    /// Search with activations as the quantised blocks before give them [default: off].
    pub distort: Option<bool>,
    /// The balance of modalities in the search [default: on].
    pub balance: Option<bool>,
    /// Score every candidate on every token [default: off].
    pub exhaustive: Option<bool>,
    /// Scale v -> o under grouped queries too, with one scale per value channel [default: off].
    pub share_heads: Option<bool>,
    /// How far compensation aims at the full-precision stream, 0 to 1 [default: 0.5].
    pub target: Option<f64>,
    /// Aim o and down at what the residual stream has lost, too [default: off].
    pub residual: Option<bool>,
    /// Let the rows of o and down make up for each other [default: on].
    pub two_sided: Option<bool>,
}

impl Switches {
    /// Reads `KEY=VALUE` pairs; flags are `on` or `off`.
    ///
    /// # Errors
    /// In words: an unknown key, a value that it does not take, a key that is set twice.
    pub fn read(pairs: &[String]) -> Result<Self, String> {
        let mut all = Map::new();
        for pair in pairs {
            let (key, text) = pair.split_once('=').ok_or_else(|| format!("{pair}: expected KEY=VALUE"))?;
            let value = match text {
                "on" => true.into(),
                "off" => false.into(),
                _ => text.parse::<Number>().map_or_else(|_| text.into(), Value::Number),
            };
            // Alone first: the message does not say which of several it is about.
            let alone = Value::Object(Map::from_iter([(key.to_string(), value.clone())]));
            serde_json::from_value::<Self>(alone).map_err(|e| format!("{key}: {e}"))?;
            if all.insert(key.into(), value).is_some() {
                return Err(format!("{key}: is set twice"));
            }
        }
        let this: Self = serde_json::from_value(all.into()).map_err(|e| e.to_string())?;
        match this.target {
            Some(target) if !(0.0..=1.0).contains(&target) => Err("target: 0 to 1".into()),
            _ => Ok(this),
        }
    }

    /// What a run is told of `method`; nothing is kept on disk, and memory is not bounded.
    pub(super) fn options<'a>(
        &self,
        method: Method,
        scales: bool,
        weights: &'a dyn WeightGrid,
    ) -> CalibrateOptions<'a> {
        CalibrateOptions {
            method,
            weights,
            activations: Activations::Float,
            loss: self.loss.unwrap_or(if method == Method::Awq { Loss::Mse } else { Loss::Mae }),
            distort: self.distort.unwrap_or(false),
            balance: self.balance.unwrap_or(true),
            exhaustive: self.exhaustive.unwrap_or(false),
            share_heads: self.share_heads.unwrap_or(false),
            scales,
            importance: None,
            alpha: 0.5,
            chunk_tokens: CHUNK_TOKENS,
            memory: usize::MAX,
            device_memory: None,
            spill: None,
            compensation: None,
            progress: None,
        }
    }

    /// Refuses what `method` (as it is done for the file's types) has no use for.
    ///
    /// # Errors
    /// Names the switch.
    pub fn check(&self, method: Method, vision_weight: Option<VisionWeight>) -> Result<(), CalibrateError> {
        let own = method == Method::Mbq;
        let searches = matches!(method, Method::MbqScales | Method::Awq) || own && self.scales == Some(true);
        let balances = method == Method::MbqScales || own && self.scales == Some(true);
        let used = [
            ("--set scales", self.scales.is_some(), own),
            ("--set loss", self.loss.is_some(), searches),
            ("--set distort", self.distort.is_some(), searches),
            ("--set balance", self.balance.is_some(), balances),
            ("--set exhaustive", self.exhaustive.is_some(), searches),
            ("--set share-heads", self.share_heads.is_some(), searches),
            ("--set target", self.target.is_some(), own),
            ("--set residual", self.residual.is_some(), own),
            ("--set two-sided", self.two_sided.is_some(), own),
            ("--vision-weight", vision_weight.is_some(), own),
        ];
        match used.into_iter().find(|(_, given, useful)| *given && !useful) {
            Some((flag, ..)) => {
                Err(CalibrateError::NoEffect { flag, with: format!("with --method {}", method.name()) })
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn switches(pairs: &[&str]) -> Result<Switches, String> {
        Switches::read(&pairs.iter().map(|p| p.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn every_key_is_taken_once() {
        let keys = serde_json::to_value(Switches::default()).unwrap();
        let keys = keys.as_object().unwrap();
        assert_eq!(keys.len(), 13);
        for key in keys.keys() {
            let value = match key.as_str() {
                "seed" | "max-tokens" => "3",
                "activations" => "int8",
                "loss" => "mse",
                "target" => "1",
                _ => "on",
            };
            let pair = format!("{key}={value}");
            assert_ne!(switches(&[&pair]).unwrap(), Switches::default(), "{key}");
            assert!(switches(&[&pair, &pair]).unwrap_err().contains("twice"));
            assert!(switches(&[&format!("{key}=?")]).unwrap_err().starts_with(key));
        }
        assert!(switches(&["speed=1"]).unwrap_err().contains("share-heads"));
        assert!(switches(&["target=2"]).unwrap_err().contains("0 to 1"));
        assert!(switches(&["max-tokens=0"]).is_err() && switches(&["seed"]).is_err());
    }

    #[test]
    fn what_changes_nothing_is_refused() {
        let weight = Some(VisionWeight::Fixed(0.3));
        let refused = |pairs: &[&str], method, weight| switches(pairs).unwrap().check(method, weight).is_err();
        assert!(!refused(&["scales=on", "loss=mse", "target=1"], Method::Mbq, weight));
        assert!(refused(&["loss=mse"], Method::Mbq, None), "no scales are searched");
        assert!(refused(&["target=1"], Method::Gptq, None) && refused(&[], Method::Awq, weight));
        assert!(!refused(&["balance=off"], Method::MbqScales, None) && refused(&["balance=off"], Method::Awq, None));
    }
}

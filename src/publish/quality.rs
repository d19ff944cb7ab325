//! What `mbq-convert eval --json` measured of a model.
use crate::ModelFileError;
use serde_json::Value;
use std::path::Path;

/// A report, and where it came from.
pub(super) struct Report {
    json: Value,
    name: String,
}

/// A number with its 95 % interval.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// Of one model.
pub(super) struct Quality {
    /// Nats per token.
    pub kl: Measured,
    /// Share of positions where both models put the same token first.
    pub agreement: Measured,
    pub accuracy: Option<Measured>,
    /// Whether these are answers about pictures.
    pub pictures: bool,
}

impl Measured {
    fn read(json: &Value) -> Option<Self> {
        let number = |key: &str| json.get(key)?.as_f64().filter(|v| v.is_finite());
        Some(Measured { value: number("value")?, low: number("low")?, high: number("high")? })
    }

    pub fn percent(self) -> String {
        format!("{:.1} % ({:.1} to {:.1})", 100.0 * self.value, 100.0 * self.low, 100.0 * self.high)
    }

    pub fn nats(self) -> String {
        format!("{:.4} ({:.4} to {:.4})", self.value, self.low, self.high)
    }
}

impl Report {
    /// Reads eval's JSON.
    ///
    /// # Errors
    /// A file that cannot be read or is not eval's.
    pub fn read(path: &Path) -> Result<Self, ModelFileError> {
        let text = std::fs::read(path).map_err(|source| ModelFileError::Read { path: path.into(), source })?;
        let json: Value = serde_json::from_slice(&text).unwrap_or_default();
        let whole = json["candidates"].is_array() && json["data"].is_object() && json["reference"]["name"].is_string();
        if !whole {
            return Err(ModelFileError::unfit(path, "is not what `mbq-convert eval --json FILE` writes"));
        }
        Ok(Report { json, name: crate::digest::file_name(path) })
    }

    /// What it says of the model with this digest.
    ///
    /// # Errors
    /// It measured the model, and lacks the numbers.
    pub fn of(&self, sha256: &str) -> Result<Option<Quality>, ModelFileError> {
        let list = self.json["candidates"].as_array().map(Vec::as_slice).unwrap_or_default();
        let Some(candidate) = list.iter().find(|c| c["model"]["sha256"] == sha256) else { return Ok(None) };
        let pictures = candidate["picture"].is_object();
        let split = &candidate[if pictures { "picture" } else { "text" }];
        // Raw prompts have given answers only.
        let fidelity = if split["greedy"].is_object() { &split["greedy"] } else { &split["given"] };
        let (kl, agreement) = (Measured::read(&fidelity["kl_mean"]), Measured::read(&fidelity["agreement"]));
        let (Some(kl), Some(agreement)) = (kl, agreement) else {
            return Err(ModelFileError::unfit(&self.name, "lacks kl_mean or agreement of the model; run eval again"));
        };
        let accuracy = Measured::read(&candidate["accuracy"]["all"]);
        Ok(Some(Quality { kl, agreement, accuracy, pictures }))
    }

    /// The names of what it measured.
    pub fn candidates(&self) -> String {
        let list = self.json["candidates"].as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter().filter_map(|c| c["model"]["name"].as_str()).collect::<Vec<_>>().join(", ")
    }

    /// Right answers of the reference.
    pub fn reference_accuracy(&self) -> Option<Measured> {
        Measured::read(&self.json["reference_accuracy"]["all"])
    }

    /// How it was measured, in a sentence or three.
    pub fn method(&self) -> String {
        let data = &self.json["data"];
        let text = |value: &Value| value.as_str().unwrap_or("?").to_string();
        let file = crate::digest::file_name(Path::new(&text(&data["path"])));
        let digest: String = text(&data["sha256"]).chars().take(12).collect();
        format!(
            "Measured with `mbq-convert eval` {}: {} questions, {} of them about a picture, from `{file}` (SHA-256 {digest}…). \
             The files run on the answers of `{}`, token by token; divergence and agreement are means over those tokens. In \
             brackets 95 % intervals, bootstrapped over questions ({} resamples).",
            text(&self.json["version"]),
            data["questions"],
            data["with_picture"],
            text(&self.json["reference"]["name"]),
            data["bootstrap_resamples"],
        )
    }
}

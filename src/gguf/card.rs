//! What `general.*` says about a model: its name taken apart as Hugging Face spells it, and its card's front matter.
use super::value::Array;
use super::Metadata;
use std::path::Path;

/// `Base-Size-FineTune-vX.Y`, the parts of a model's name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Name {
    /// As on the hub, without the organisation.
    pub full: String,
    pub base: String,
    pub size: Option<String>,
    pub finetune: Option<String>,
    pub version: Option<String>,
}

fn is_size(part: &str) -> bool {
    let number = part.strip_suffix(|c: char| "KMBTkmbt".contains(c)).unwrap_or("");
    let number = number.rsplit(['x', 'X']).next().unwrap_or("");
    number.starts_with(|c: char| c.is_ascii_digit()) && number.parse::<f64>().is_ok()
}

fn is_version(part: &str) -> bool {
    part.strip_prefix(['v', 'V'])
        .is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()) && n.parse::<f64>().is_ok())
}

impl Name {
    /// Takes `full` apart. Without a size in it, `parameters` makes one.
    pub fn parse(full: &str, parameters: usize) -> Self {
        let parts: Vec<&str> = full.split(['-', '_', ' ']).filter(|p| !p.is_empty()).collect();
        let version = parts.iter().find(|p| is_version(p)).map(|p| p.to_string());
        let at = parts.iter().position(|p| is_size(p));
        let join = |parts: &[&str]| {
            parts
                .iter()
                .filter(|p| !is_version(p) && !p.eq_ignore_ascii_case("hf"))
                .copied()
                .collect::<Vec<_>>()
                .join("-")
        };
        let base = join(&parts[..at.unwrap_or(parts.len())]);
        let finetune = at.map(|at| join(&parts[at + 1..])).filter(|f| !f.is_empty());
        Name {
            full: full.to_string(),
            base: if base.is_empty() { full.to_string() } else { base },
            size: Some(at.map_or_else(|| size_label(parameters), |at| size_case(parts[at]))),
            finetune,
            version,
        }
    }

    /// The file name for weights of type `encoding`: `Base-Size-FineTune-vX.Y-Encoding.gguf`.
    pub fn file(&self, encoding: &str) -> String {
        let parts = [Some(&self.base), self.size.as_ref(), self.finetune.as_ref(), self.version.as_ref()];
        let mut name = parts.into_iter().flatten().cloned().collect::<Vec<_>>().join("-");
        // A directory may be called anything.
        name.retain(|c| !c.is_control() && !"/\\:".contains(c));
        format!("{name}-{encoding}.gguf")
    }
}

/// `0.5b` -> `0.5B`; the `x` of `8x7B` stays small, as the naming convention writes it.
fn size_case(size: &str) -> String {
    size.to_uppercase().replace('X', "x")
}

/// `89M`, `7.6B`.
fn size_label(parameters: usize) -> String {
    let n = parameters as f64;
    let (n, unit) = if n >= 1e9 {
        (n / 1e9, "B")
    } else if n >= 1e6 {
        (n / 1e6, "M")
    } else {
        (n / 1e3, "K")
    };
    if n >= 10.0 { format!("{n:.0}{unit}") } else { format!("{n:.1}{unit}") }
}

/// The front matter of a model card (`README.md`), as far as GGUF has keys for it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Card {
    pub license: Option<String>,
    pub license_name: Option<String>,
    pub license_link: Option<String>,
    pub base_models: Vec<String>,
    pub languages: Vec<String>,
    pub tags: Vec<String>,
}

impl Card {
    /// Reads `README.md` in `dir`; without one, or without front matter, everything is empty.
    pub fn read(dir: &Path) -> Self {
        std::fs::read_to_string(dir.join("README.md")).map(|text| Self::parse(&text)).unwrap_or_default()
    }

    /// Reads the values of the keys above that are scalars or plain lists; other YAML is passed over.
    fn parse(text: &str) -> Self {
        let mut card = Card::default();
        let mut lines = text.lines();
        if lines.next().map(str::trim_end) != Some("---") {
            return card;
        }
        let unquote = |v: &str| v.trim().trim_matches(['"', '\'']).to_string();
        let mut key = String::new();
        for line in lines.take_while(|l| l.trim_end() != "---") {
            let values: Vec<String> = match line.trim_start().strip_prefix("- ") {
                Some(item) => vec![unquote(item)],
                None if line.starts_with(char::is_whitespace) => continue,
                None => {
                    let Some((k, v)) = line.split_once(':') else { continue };
                    key = k.trim().to_string();
                    match v.trim().strip_prefix('[').and_then(|v| v.strip_suffix(']')) {
                        Some(list) => list.split(',').map(unquote).filter(|v| !v.is_empty()).collect(),
                        None => Some(unquote(v)).filter(|v| !v.is_empty()).into_iter().collect(),
                    }
                }
            };
            match key.as_str() {
                "license" => card.license = values.into_iter().next(),
                "license_name" => card.license_name = values.into_iter().next(),
                "license_link" => card.license_link = values.into_iter().next(),
                "base_model" => card.base_models.extend(values),
                "language" => card.languages.extend(values),
                "tags" => card.tags.extend(values),
                _ => (),
            }
        }
        card
    }

    /// Writes `general.license` and the like.
    pub fn write(&self, keys: &mut Metadata) {
        let license = [
            ("general.license", &self.license),
            ("general.license.name", &self.license_name),
            ("general.license.link", &self.license_link),
        ];
        for (key, value) in license {
            if let Some(value) = value {
                keys.set(key, value);
            }
        }
        if !self.base_models.is_empty() {
            keys.set("general.base_model.count", self.base_models.len() as u32);
        }
        for (i, id) in self.base_models.iter().enumerate() {
            let key = |part: &str| format!("general.base_model.{i}.{part}");
            let (organization, name) = id.split_once('/').unwrap_or(("", id));
            keys.set(&key("name"), name);
            if !organization.is_empty() {
                keys.set(&key("organization"), organization);
                keys.set(&key("repo_url"), format!("https://huggingface.co/{id}"));
            }
        }
        for (key, list) in [("general.languages", &self.languages), ("general.tags", &self.tags)] {
            if !list.is_empty() {
                keys.set_array(key, Array::strings(list));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let n = Name::parse("llava-onevision-qwen2-0.5b-ov-hf", 0);
        assert_eq!((n.base.as_str(), n.size.as_deref()), ("llava-onevision-qwen2", Some("0.5B")));
        assert_eq!(n.file("Q3_K"), "llava-onevision-qwen2-0.5B-ov-Q3_K.gguf");
        assert_eq!(Name::parse("Some-8x7B-Chat-v1.2", 0).file("MBQ3"), "Some-8x7B-Chat-v1.2-MBQ3.gguf");
        assert_eq!(Name::parse("model", 89_300_000).file("F16"), "model-89M-F16.gguf");
        assert_eq!(Name::parse("model", 7_615_616_512).size.as_deref(), Some("7.6B"));
    }

    #[test]
    fn front_matter() {
        let text = "---\nlicense: apache-2.0\nlanguage:\n- en\n- zh\ntags: [a, \"b\"]\nbase_model: org/Base-7B\n\
                    widget:\n  - text: license\n---\nlicense: none\n";
        let card = Card::parse(text);
        assert_eq!(card.license.as_deref(), Some("apache-2.0"));
        assert_eq!(card.languages, ["en", "zh"]);
        assert_eq!(card.tags, ["a", "b"]);
        assert_eq!(card.base_models, ["org/Base-7B"]);
        assert_eq!(Card::parse("# Title\nlicense: mit"), Card::default());
    }
}

//! What `general.*` says about a model: its name taken apart as Hugging Face spells it, and its card's front matter.
use crate::files::read_plain;
use crate::gguf::{Array, Metadata};
use saphyr_parser::{Event, Parser, ScalarStyle};
use std::path::Path;

/// `Base-Size-FineTune-vX.Y`, the parts of a model's name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelName {
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

impl ModelName {
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
        ModelName {
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

/// The front matter of a model card (`README.md`), as far as GGUF has keys for it. Every value may be one or a list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Card {
    pub licenses: Vec<String>,
    pub license_names: Vec<String>,
    pub license_links: Vec<String>,
    pub base_models: Vec<String>,
    pub languages: Vec<String>,
    pub tags: Vec<String>,
}

impl Card {
    /// Reads `README.md` in `dir`; without one, or without front matter, everything is empty.
    ///
    /// # Errors
    /// In words: the front matter is no YAML, or the file cannot be read.
    pub fn read(dir: &Path) -> Result<Self, String> {
        let path = dir.join("README.md");
        match read_plain(&path) {
            Ok(bytes) => Self::parse(&String::from_utf8_lossy(&bytes)).map_err(|e| format!("{}: {e}", path.display())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Card::default()),
            Err(e) => Err(format!("{}: {e}", path.display())),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut card = Card::default();
        for (key, values) in FrontMatter::parse(text)?.unwrap_or_default().0 {
            card.add(&key, values);
        }
        Ok(card)
    }

    fn add(&mut self, key: &str, values: Vec<String>) {
        let list = match key {
            "license" => &mut self.licenses,
            "license_name" => &mut self.license_names,
            "license_link" => &mut self.license_links,
            "base_model" => &mut self.base_models,
            "language" | "languages" => &mut self.languages,
            "tags" => &mut self.tags,
            _ => return,
        };
        list.extend(values);
    }

    /// Writes `general.license` and the like.
    pub fn write(&self, keys: &mut Metadata) {
        let license = [
            ("general.license", &self.licenses),
            ("general.license.name", &self.license_names),
            ("general.license.link", &self.license_links),
        ];
        for (key, values) in license {
            if !values.is_empty() {
                // The key holds one string; llama.cpp's converter joins a list so, too.
                keys.set(key, values.join(","));
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

/// A card's front matter: top-level keys, each with its value or the values of its list; what is nested deeper is not kept.
/// Scalars are taken as they are written: the language `no` is Norwegian, not false.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FrontMatter(pub Vec<(String, Vec<String>)>);

impl FrontMatter {
    /// Of a card's text; none where it has none.
    ///
    /// # Errors
    /// In words: it is no YAML.
    pub fn parse(text: &str) -> Result<Option<Self>, String> {
        let Some(yaml) = front_matter(text) else { return Ok(None) };
        let mut entries: Vec<(String, Vec<String>)> = Vec::new();
        // Of the entry whose value comes next.
        let (mut open, mut key) = (Vec::new(), None::<usize>);
        for event in Parser::new_from_str(&yaml) {
            let (event, _) = event.map_err(|e| format!("the front matter is no YAML: {e}"))?;
            match event {
                Event::DocumentEnd => break,
                Event::MappingStart(..) | Event::SequenceStart(..) => open.push(event),
                Event::MappingEnd | Event::SequenceEnd => {
                    open.pop();
                    if open.len() == 1 {
                        // A key that is itself a list or mapping is nobody's.
                        key = if key.is_none() { Some(usize::MAX) } else { None };
                    }
                }
                Event::Scalar(text, style, ..) => match (open.as_slice(), key) {
                    ([Event::MappingStart(..)], None) => {
                        key = Some(entries.len());
                        entries.push((text.into_owned(), Vec::new()));
                    }
                    ([Event::MappingStart(..)], Some(of)) => {
                        add(&mut entries, of, &text, style);
                        key = None;
                    }
                    ([Event::MappingStart(..), Event::SequenceStart(..)], Some(of)) => {
                        add(&mut entries, of, &text, style);
                    }
                    _ => {}
                },
                Event::Alias(_) if open.len() == 1 => key = None,
                _ => {}
            }
        }
        Ok(Some(FrontMatter(entries)))
    }

    /// The values of a key; none where it is absent, empty or nested.
    pub fn get(&self, key: &str) -> &[String] {
        self.0.iter().find(|(name, _)| name == key).map_or(&[], |(_, values)| values)
    }
}

/// Adds a value to entry `of`, if there is one and the value is none of YAML's nulls.
fn add(entries: &mut [(String, Vec<String>)], of: usize, text: &str, style: ScalarStyle) {
    let text = text.trim();
    let null = style == ScalarStyle::Plain && matches!(text, "~" | "null");
    if let (Some((_, values)), false) = (entries.get_mut(of), null || text.is_empty()) {
        values.push(text.into());
    }
}

/// The text between the first line, `---`, and the next such line.
fn front_matter(text: &str) -> Option<String> {
    let mut lines = text.strip_prefix('\u{feff}').unwrap_or(text).lines();
    (lines.next()?.trim_end() == "---").then(|| {
        let inside = lines.take_while(|line| line.trim_end() != "---");
        inside.flat_map(|line| [line, "\n"]).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let n = ModelName::parse("llava-onevision-qwen2-0.5b-ov-hf", 0);
        assert_eq!((n.base.as_str(), n.size.as_deref()), ("llava-onevision-qwen2", Some("0.5B")));
        assert_eq!(n.file("Q3_K"), "llava-onevision-qwen2-0.5B-ov-Q3_K.gguf");
        assert_eq!(ModelName::parse("Some-8x7B-Chat-v1.2", 0).file("MBQ3"), "Some-8x7B-Chat-v1.2-MBQ3.gguf");
        assert_eq!(ModelName::parse("model", 89_300_000).file("F16"), "model-89M-F16.gguf");
        assert_eq!(ModelName::parse("model", 7_615_616_512).size.as_deref(), Some("7.6B"));
    }

    #[test]
    fn front_matter() {
        let text = "---\nlicense: apache-2.0\nlanguage:\n- en\n- zh\ntags: [a, \"b\"]\nbase_model: org/Base-7B\n\
                    widget:\n  - text: license\n---\nlicense: none\n";
        let card = Card::parse(text).unwrap();
        assert_eq!(card.licenses, ["apache-2.0"]);
        assert_eq!(card.languages, ["en", "zh"]);
        assert_eq!(card.tags, ["a", "b"]);
        assert_eq!(card.base_models, ["org/Base-7B"]);
        assert_eq!(Card::parse("# Title\nlicense: mit").unwrap(), Card::default());
    }

    /// As cards on the hub are written: lists in both styles, Norwegian, comments, folded texts, CRLF, a BOM.
    #[test]
    fn front_matter_is_yaml() {
        let licenses = |text: &str| Card::parse(text).unwrap().licenses;
        assert_eq!(licenses("---\nlicense: [apache-2.0, 'mit']\n---\n"), ["apache-2.0", "mit"]);
        assert_eq!(licenses("---\nlicense:\n  - apache-2.0\n  - mit # both\n---\n"), ["apache-2.0", "mit"]);
        assert_eq!(licenses("\u{feff}---\r\nlicense: other # see below\r\n---\r\n"), ["other"]);
        assert_eq!(licenses("---\nlicense:\ntags: null\n---\n"), [""; 0]);
        assert_eq!(licenses("---\nlicense: mit\n"), ["mit"], "the end is missing");
        let card = "---\nlanguage: no\nlicense_name: >-\n  Qwen RESEARCH\n  LICENSE\nlicense_link: \"https://x.org/a: b\"\n\
                    tags: [no, on, 1.10, {a: b}]\nmodel-index:\n- name: x\n  license: none\n---\n";
        let card = Card::parse(card).unwrap();
        assert_eq!(card.languages, ["no"]);
        assert_eq!(card.license_names, ["Qwen RESEARCH LICENSE"]);
        assert_eq!(card.license_links, ["https://x.org/a: b"]);
        assert_eq!(card.tags, ["no", "on", "1.10"]);
        assert!(card.licenses.is_empty());
        assert!(Card::parse("---\nlicense: [mit\n---\n").unwrap_err().contains("no YAML"));
    }
}

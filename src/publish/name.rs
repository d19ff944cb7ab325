//! GGUF's naming convention (ggml's docs/gguf.md): `Base-Size-FineTune-vX.Y-Encoding-00001-of-00003.gguf`. Fine-tune, version
//! and shard may be missing.
use crate::front::ModelName;
use crate::gguf::{FileType, Metadata, ShardName};

/// Encodings that file names carry and this program does not write.
const OTHERS: [&str; 24] = [
    "Q4_1", "Q5_0", "Q5_1", "Q2_K_S", "Q2_K_L", "Q3_K_L", "Q3_K_XL", "Q4_K_S", "Q4_K_L", "Q5_K_S", "Q5_K_M", "Q5_K_L",
    "Q6_K_L", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XS", "IQ3_M", "IQ4_NL", "TQ1_0", "TQ2_0",
];

/// A file's name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufName {
    pub base: String,
    /// `7B`, `8x7B`.
    pub size: String,
    pub finetune: Option<String>,
    /// `v1.2`
    pub version: Option<String>,
    /// `Q4_K_M`, in capitals.
    pub encoding: String,
    pub shard: Option<ShardName>,
}

fn is_size(part: &str) -> bool {
    let Some(number) = part.strip_suffix(|c: char| "KMBTQ".contains(c)) else { return false };
    let (experts, number) = number.split_once('x').map_or((None, number), |(n, rest)| (Some(n), rest));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (whole, fraction) = number.split_once('.').map_or((number, None), |(a, b)| (a, Some(b)));
    experts.is_none_or(digits) && digits(whole) && fraction.is_none_or(digits)
}

fn is_version(part: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    part.strip_prefix('v').is_some_and(|n| n.split('.').all(digits))
}

impl GgufName {
    /// Takes `name` apart.
    ///
    /// # Errors
    /// In words: what the convention wants and is not there.
    pub fn parse(name: &str) -> Result<Self, String> {
        let Some(stem) = name.strip_suffix(".gguf") else { return Err("does not end in .gguf".into()) };
        if let Some(c) = stem.chars().find(|c| !(c.is_ascii_alphanumeric() || "._-".contains(*c))) {
            return Err(format!(
                "has the character {c:?}; letters, digits, `.`, `_` and `-` are common to all readers"
            ));
        }
        let shard = ShardName::parse(name);
        let stem = shard.as_ref().map_or(stem, |s| &s.stem);
        let mut parts: Vec<&str> = stem.split('-').collect();
        let encodings = || FileType::all().map(FileType::name).chain(OTHERS);
        let last = parts.pop().unwrap_or_default();
        let Some(encoding) = encodings().find(|e| e.eq_ignore_ascii_case(last)) else {
            return Err(format!("ends in {last:?}, which is no type such as MBQ3 or Q4_K_M"));
        };
        let version = parts.pop_if(|part| is_version(part)).map(String::from);
        let Some(at) = parts.iter().position(|part| is_size(part)) else {
            return Err("has no size such as 7B or 0.5B".into());
        };
        let base = parts[..at].join("-");
        if base.is_empty() || parts.iter().any(|part| part.is_empty()) {
            return Err("has no model's name before the size, or two dashes in a row".into());
        }
        let finetune = Some(parts[at + 1..].join("-")).filter(|text| !text.is_empty());
        Ok(GgufName { base, size: parts[at].into(), finetune, version, encoding: encoding.into(), shard })
    }

    /// The type that the name promises, if this program writes it.
    pub fn file_type(&self) -> Option<FileType> {
        self.encoding.parse().ok()
    }

    /// The name that a model's metadata give its file.
    pub fn suggested(metadata: &Metadata) -> Option<String> {
        let text = |key: &str| metadata.str(&format!("general.{key}")).map(String::from);
        let id = metadata.u64("general.file_type")?;
        let encoding = FileType::all().find(|t| u64::from(t.id()) == id)?.name();
        let name = ModelName {
            full: text("name")?,
            base: text("basename").or_else(|| text("name"))?.replace(' ', "-"),
            size: text("size_label"),
            finetune: text("finetune"),
            version: text("version"),
        };
        Some(name.file(encoding))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_convention() {
        let name = GgufName::parse("Mixtral-8x7B-Instruct-v0.1-Q4_K_M-00002-of-00003.gguf").unwrap();
        assert_eq!((name.base.as_str(), name.size.as_str()), ("Mixtral", "8x7B"));
        assert_eq!((name.finetune.as_deref(), name.version.as_deref()), (Some("Instruct"), Some("v0.1")));
        assert_eq!((name.encoding.as_str(), name.shard.unwrap().number), ("Q4_K_M", 2));
        let name = GgufName::parse("llava-onevision-qwen2-0.5B-ov-MBQ3.gguf").unwrap();
        assert_eq!((name.base.as_str(), name.size.as_str()), ("llava-onevision-qwen2", "0.5B"));
        assert_eq!(name.file_type().map(|t| t.id()), Some(192));
        assert_eq!(GgufName::parse("Qwen2.5-VL-3B-Instruct-q8_0.gguf").unwrap().encoding, "Q8_0");
        let wrong = [
            ("model.gguf", "ends in"),
            ("model-7B.gguf", "ends in"),
            ("model-MBQ3.gguf", "no size"),
            ("7B-MBQ3.gguf", "no model's name"),
            ("a model-7B-MBQ3.gguf", "' '"),
            ("model-7B-MBQ3.bin", ".gguf"),
            ("model--7B-MBQ3.gguf", "two dashes"),
        ];
        for (name, words) in wrong {
            let error = GgufName::parse(name).unwrap_err();
            assert!(error.contains(words), "{name}: {error}");
        }
    }

    /// What a conversion calls its files without -o is of the convention.
    #[test]
    fn our_own_names_are_of_the_convention() {
        for full in [
            "llava-onevision-qwen2-7b-ov-hf",
            "Qwen2.5-VL-3B-Instruct",
            "SmolVLM-256M-Instruct",
            "gemma-3-4b-it",
            "InternVL3-2B",
            "model",
        ] {
            for ty in FileType::all() {
                let file = ModelName::parse(full, 89_000_000).file(ty.name());
                let parsed = GgufName::parse(&file).unwrap_or_else(|e| panic!("{file}: {e}"));
                assert_eq!(parsed.file_type().map(FileType::id), Some(ty.id()), "{file}");
            }
        }
    }
}

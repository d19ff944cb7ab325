//! What both files say about where they come from.
use super::card::{Card, ModelName};
use crate::gguf::{Metadata, stored_metadata};

/// What both files say about where they come from.
#[derive(Debug, Clone, Default)]
pub struct General {
    pub name: ModelName,
    pub card: Card,
    /// `org/name` on the hub, if it came from there.
    pub repository: Option<String>,
}

/// llama.cpp's file type of weights in f16: what a front stores, where nothing else is asked for.
const MOSTLY_F16: u32 = 1;

impl General {
    pub(crate) fn write(&self, keys: &mut Metadata, kind: &str, architecture: &str) {
        keys.set("general.architecture", architecture).set("general.type", kind);
        keys.set("general.name", &self.name.full).set("general.basename", &self.name.base);
        let optional = [
            ("general.size_label", &self.name.size),
            ("general.finetune", &self.name.finetune),
            ("general.version", &self.name.version),
            ("general.source.huggingface.repository", &self.repository),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                keys.set(key, value);
            }
        }
        if let Some(repository) = &self.repository {
            keys.set("general.source.url", format!("https://huggingface.co/{repository}"));
        }
        self.card.write(keys);
        stored_metadata(keys, MOSTLY_F16);
    }
}

//! What both files say about where they come from.
use super::card::{Card, Name};
use crate::gguf::{Metadata, stored_metadata};

/// What both files say about where they come from.
#[derive(Debug, Clone, Default)]
pub struct General {
    pub name: Name,
    pub card: Card,
    /// `org/name` on the hub, if it came from there.
    pub repository: Option<String>,
}

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
        // The file type is filled in when it is known.
        stored_metadata(keys, 0);
    }
}

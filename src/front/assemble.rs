//! What every family's front does in the end: two files of rows and keys.
use super::decoder::{DecoderConfig, HEAD};
use super::pair_id::pair_id;
use super::vocabulary::Vocabulary;
use super::{Card, FrontError, General, ModelName, Pair, Row, Source, claims};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::gguf::{Metadata, PAIR_KEY};
use crate::prompt::PictureText;

/// What a family says about a checkpoint.
pub(super) struct Parts<'p> {
    /// The hub's name or the directory's; `org/name` on the hub.
    pub name: &'p str,
    pub repository: Option<&'p str>,
    pub text: &'p DecoderConfig,
    pub vision_rows: Vec<Row>,
    /// Whether the checkpoint may hold a tensor of this name besides: the model's answers do not depend on it.
    pub leaves_out: &'p dyn Fn(&str) -> bool,
    /// Writes the projector's keys.
    pub vision_keys: &'p dyn Fn(&mut Metadata),
    /// What the chat template writes for a picture.
    pub picture: PictureText,
    /// The chat template of a checkpoint that has none.
    pub template: Option<&'p str>,
    /// What the user should know.
    pub notes: &'p [String],
}

/// Both files of a checkpoint, every tensor of which is a row or left out.
///
/// # Errors
/// A vocabulary or tensor that is missing, wrong or beyond the runtime.
pub(super) fn pair<'a>(checkpoint: &'a Checkpoint, parts: Parts) -> Result<Pair<'a>, Error> {
    let text_rows = parts.text.rows();
    // A tied head is the embedding's bytes: else it is not tied, and a row.
    let leaves_out = |name: &str| (name == HEAD && parts.text.tie_word_embeddings) || (parts.leaves_out)(name);
    claims::check(checkpoint, text_rows.iter().chain(&parts.vision_rows), &leaves_out)?;
    let vocabulary = Vocabulary::read(checkpoint, parts.text.vocab_size, parts.picture, parts.template)?;
    let mut notes = [checkpoint.notes(), parts.notes, &vocabulary.notes].concat();
    // A card is no reason to refuse a model, but its licence is not dropped without a word.
    let card = Card::read(checkpoint.dir()).unwrap_or_else(|problem| {
        notes.push(format!("{problem}; licence, languages and tags are left out"));
        Card::default()
    });
    let parameters = text_rows.iter().map(|row| row.tensor.elements()).sum();
    let name = ModelName::parse(parts.name, parameters);
    let general = General { name, card, repository: parts.repository.map(String::from) };
    let mut keys = Metadata::default();
    general.write(&mut keys, "model", parts.text.architecture());
    parts.text.write(&mut keys);
    vocabulary.write(&mut keys);
    let mut vision_keys = Metadata::default();
    general.write(&mut vision_keys, "mmproj", "clip");
    (parts.vision_keys)(&mut vision_keys);
    let mut text = Source::renamed(checkpoint, keys, text_rows)?;
    let mut mmproj = Source::renamed(checkpoint, vision_keys, parts.vision_rows)?;
    let id = pair_id(&mmproj)?;
    text.metadata.set(PAIR_KEY, &id);
    mmproj.metadata.set(PAIR_KEY, &id);
    Ok(Pair { text, mmproj: Some(mmproj), name: general.name, notes })
}

/// Checks that the vocabulary has the tokens that the runtime writes around a picture, with the ids that config.json gives
/// them: (its key, if it has one, token).
///
/// # Errors
/// A token is missing, or has another id.
pub(super) fn check_brackets(
    checkpoint: &Checkpoint,
    pair: &Pair,
    brackets: &[(Option<&str>, &str)],
) -> Result<(), FrontError> {
    let tokens = pair.text.metadata.get("tokenizer.ggml.tokens").and_then(|v| v.as_array());
    for (key, token) in brackets {
        let id = tokens.and_then(|t| t.iter().position(|t| t.as_str() == Some(token)));
        let said = key.and_then(|key| Some((key, checkpoint.config().get(key).filter(|v| !v.is_null())?)));
        let problem = match (id, said) {
            (None, _) => format!("has no token {token:?}, which stands beside every picture"),
            (Some(id), Some((key, said))) if said.as_u64() != Some(id as u64) => {
                format!("gives {token:?} id {id}, but {key} in config.json is {said}")
            }
            _ => continue,
        };
        return Err(FrontError::File { file: checkpoint.dir().join("tokenizer.json"), problem });
    }
    Ok(())
}

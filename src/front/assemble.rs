//! The two files of a checkpoint, put together from what its family says.
use super::decoder::DecoderConfig;
use super::pair_id::pair_id;
use super::vocabulary::Vocabulary;
use super::{Card, General, ModelName, Pair, Row, Source, claims};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::gguf::{Metadata, PAIR_KEY};

/// What a family knows of a checkpoint.
pub(super) struct Parts<'p> {
    pub text: &'p DecoderConfig,
    /// Keys of the text model that [`DecoderConfig::write`] does not know.
    pub text_keys: &'p dyn Fn(&mut Metadata),
    pub vision_rows: Vec<Row>,
    /// `clip.*`.
    pub vision_keys: &'p dyn Fn(&mut Metadata),
    /// Canonical names of tensors that the model's answers do not depend on.
    pub harmless: &'p dyn Fn(&str) -> bool,
    /// What the user should know.
    pub notes: &'p [String],
}

/// Both files. `name` is the hub's or the directory's; `repository` is `org/name` on the hub.
///
/// # Errors
/// A vocabulary or tensor that is missing or wrong, or a tensor that nobody claims.
pub(super) fn pair<'a>(
    checkpoint: &'a Checkpoint,
    name: &str,
    repository: Option<&str>,
    parts: Parts,
) -> Result<Pair<'a>, Error> {
    let text_rows = parts.text.rows();
    claims::check(checkpoint, text_rows.iter().chain(&parts.vision_rows), parts.harmless)?;
    let vocabulary = Vocabulary::read(checkpoint, parts.text.vocab_size)?;
    let mut notes = [checkpoint.notes(), parts.notes, &vocabulary.notes].concat();
    // A card is no reason to refuse a model, but its licence is not dropped without a word.
    let card = Card::read(checkpoint.dir()).unwrap_or_else(|problem| {
        notes.push(format!("{problem}; licence, languages and tags are left out"));
        Card::default()
    });
    let parameters = text_rows.iter().map(|row| row.tensor.elements()).sum();
    let general = General { name: ModelName::parse(name, parameters), card, repository: repository.map(String::from) };
    let mut keys = Metadata::default();
    general.write(&mut keys, "model", parts.text.architecture());
    parts.text.write(&mut keys);
    (parts.text_keys)(&mut keys);
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

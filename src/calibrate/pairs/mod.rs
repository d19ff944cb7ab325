//! Calibration data: conversations about pictures, read from the files that people have (LLaVA/ShareGPT4V, OpenAI and
//! LlamaFactory JSON or JSONL, JSONL of questions) or from a folder of pictures with captions.
mod entry;

use super::CalibrateError;
use crate::Error;
use crate::files::read_plain_text;
use crate::image::{Rgb, decode_rgb, load_rgb};
use crate::prompt::Message;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Who speaks, as chat templates spell it.
pub const SYSTEM: &str = "system";
pub const USER: &str = "user";
pub const ASSISTANT: &str = "assistant";

/// Where a picture's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Picture {
    File(PathBuf),
    /// A `data:` URL's.
    Bytes(Vec<u8>),
}

impl Picture {
    /// Decodes the picture.
    ///
    /// # Errors
    /// In words: the file does not exist, or is no picture.
    pub fn load(&self) -> Result<Rgb, String> {
        match self {
            Picture::File(path) => {
                self.check()?;
                load_rgb(path).map_err(|e| e.to_string())
            }
            Picture::Bytes(bytes) => decode_rgb(Path::new("picture in a data: URL"), bytes).map_err(|e| e.to_string()),
        }
    }

    /// Says so if there is no such file; nothing is opened.
    fn check(&self) -> Result<(), String> {
        match self {
            // A pipe or a device would be read for ever.
            Picture::File(path) if !path.is_file() => {
                Err(format!("picture {} does not exist; see --image-root", path.display()))
            }
            _ => Ok(()),
        }
    }
}

/// A conversation that ends with an answer; or a picture alone, without messages. Every answer in it is learned from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    pub messages: Vec<Message>,
    /// In the order of the messages' [`crate::prompt::Part::Image`]s.
    pub pictures: Vec<Picture>,
}

impl Conversation {
    /// The messages of one question, behind a picture if `picture`, and its answer.
    pub fn single(question: &str, answer: &str, picture: bool) -> Vec<Message> {
        vec![Message::new(USER, usize::from(picture), question), Message::new(ASSISTANT, 0, answer)]
    }
}

/// What is asked of a picture that comes with a caption alone.
pub(super) const CAPTION_QUESTION: &str = "Describe the image.";
const PICTURES: [&str; 6] = ["png", "jpg", "jpeg", "webp", "bmp", "gif"];

fn fail(path: &Path, problem: impl std::fmt::Display) -> Error {
    CalibrateError::File { path: path.into(), problem: problem.to_string() }.into()
}

/// An entry that nobody has looked into yet.
enum PairEntry {
    Json(Value),
    /// A picture with its caption in a `.txt` beside it.
    Captioned(PathBuf),
}

/// The entries of a file or folder. What an entry says is understood, and its pictures are looked for, only when it is
/// asked for: entries that are not drawn may be broken.
pub struct List {
    path: PathBuf,
    root: PathBuf,
    entries: Vec<PairEntry>,
}

impl List {
    /// Reads `path`, a file or a folder, in its order (a folder's by name).
    ///
    /// Pictures are looked for under `image_root`, else beside the file, or in the folder. Absolute paths, `..` and
    /// symbolic links are followed as far as they end there: a list may be a stranger's, and a report about the model
    /// shows its pictures and captions. Addresses on the network are not followed.
    ///
    /// # Errors
    /// The file cannot be read, is empty, or no JSON.
    pub fn read(path: &Path, image_root: Option<&Path>) -> Result<Self, Error> {
        let entries = if path.is_dir() { folder(path)? } else { file(path)? };
        if entries.is_empty() {
            return Err(fail(path, "no image-text pairs in it"));
        }
        let own = if path.is_dir() { Some(path) } else { path.parent() };
        let root = image_root.or(own).unwrap_or(Path::new("")).into();
        Ok(List { path: path.into(), root, entries })
    }

    /// Where pictures are looked for.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// `n` of the entries, drawn with `seed` and kept in their order; all of them when there are no more than n.
    /// Which are drawn does not depend on what is in them.
    pub fn draw(&self, n: usize, seed: u64) -> Vec<usize> {
        draw(self.len(), n, seed)
    }

    /// The conversation of entry `index`, whose pictures exist.
    ///
    /// # Errors
    /// In words: the entry is not understood, has no answer, or a picture does not exist.
    pub fn conversation(&self, index: usize) -> Result<Conversation, String> {
        let conversation = match &self.entries[index] {
            PairEntry::Json(value) => entry::conversation(value, &self.root)?,
            PairEntry::Captioned(picture) => captioned(&self.root, picture)?,
        };
        conversation.pictures.iter().try_for_each(Picture::check)?;
        Ok(conversation)
    }

    /// Entry `index` for messages and progress: its number in the file, or the picture's path.
    pub fn name(&self, index: usize) -> String {
        match &self.entries[index] {
            PairEntry::Json(_) => format!("{}: entry {}", self.path.display(), index + 1),
            PairEntry::Captioned(picture) => picture.display().to_string(),
        }
    }
}

fn folder(path: &Path) -> Result<Vec<PairEntry>, Error> {
    let mut pictures = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| fail(path, e))? {
        let picture = entry.map_err(|e| fail(path, e))?.path();
        let extension = picture.extension().and_then(|e| e.to_str()).unwrap_or_default().to_lowercase();
        if PICTURES.contains(&extension.as_str()) {
            pictures.push(picture);
        }
    }
    pictures.sort();
    Ok(pictures.into_iter().map(PairEntry::Captioned).collect())
}

fn captioned(root: &Path, picture: &Path) -> Result<Conversation, String> {
    let path = picture.with_extension("txt");
    for file in [picture, &path] {
        let file = std::path::absolute(file).map_err(|e| format!("{}: {e}", file.display()))?;
        entry::located(root, &file)?;
    }
    let pictures = vec![Picture::File(picture.into())];
    let caption = match read_plain_text(&path) {
        // The model describes it itself.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Conversation { messages: Vec::new(), pictures });
        }
        caption => caption.map_err(|e| format!("{}: the caption: {e}", path.display()))?,
    };
    let caption = caption.trim_start_matches('\u{feff}').trim();
    if caption.is_empty() {
        return Err(format!("{}: the caption is empty", path.display()));
    }
    let messages = Conversation::single(CAPTION_QUESTION, caption, true);
    Ok(Conversation { messages, pictures })
}

/// A JSON list, or JSON values one after the other (JSONL).
fn file(path: &Path) -> Result<Vec<PairEntry>, Error> {
    let bytes = std::fs::read(path).map_err(|e| fail(path, e))?;
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(fail(path, "is UTF-16 text; save it as UTF-8"));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        fail(path, format!("no UTF-8 text (at byte {}); save it as UTF-8", e.utf8_error().valid_up_to()))
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let not_json = |e: serde_json::Error| fail(path, format!("not JSON: {e}"));
    let values: Vec<Value> = if text.trim_start().starts_with('[') {
        serde_json::from_str(text).map_err(not_json)?
    } else {
        serde_json::Deserializer::from_str(text).into_iter().collect::<Result<_, _>>().map_err(not_json)?
    };
    Ok(values.into_iter().map(PairEntry::Json).collect())
}

fn draw(all: usize, n: usize, seed: u64) -> Vec<usize> {
    if all <= n {
        return (0..all).collect();
    }
    // splitmix64 gives each entry a key; the n smallest keys are drawn.
    let key = |i: usize| {
        let mut z = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let mut order: Vec<usize> = (0..all).collect();
    order.sort_by_key(|&i| key(i));
    let mut drawn = order[..n].to_vec();
    drawn.sort_unstable();
    drawn
}

#[cfg(test)]
mod tests;

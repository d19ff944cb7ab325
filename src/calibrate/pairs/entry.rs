//! One entry of a JSON file, in any of the layouts that training data come in:
//!
//! - LLaVA, ShareGPT4V: `image` (a path, a list of paths, or null), `conversations` of `from` and `value`;
//! - OpenAI: `messages` of `role` and `content`, a string or a list of typed parts;
//! - LlamaFactory, TRL: either of these with a list `images`, and `system`;
//! - `question` and `answer`, or a `caption`, with or without `image`.
//!
//! `<image>` in a text stands for the next picture of the entry. Without any, the pictures come first.
use super::{ASSISTANT, CAPTION_QUESTION, Conversation, Picture, SYSTEM, USER};
use crate::image::{LocateError, inside};
use crate::prompt::{Message, Part};
use base64::Engine;
use serde_json::Value;
use std::path::Path;

const PLACE: &str = "<image>";

/// # Errors
/// In words: what is missing or not understood. Nothing that could change what the model is shown is passed over.
pub(super) fn conversation(entry: &Value, root: &Path) -> Result<Conversation, String> {
    for key in ["video", "videos", "audio", "audios", "tools"] {
        if entry.get(key).is_some_and(|v| !blank(v)) {
            return Err(format!("`{key}` is not understood"));
        }
    }
    let mut reader = Reader { root, listed: listed(entry, root)?, places: 0, inline: Vec::new() };
    let mut messages = match present(entry, "messages").or(present(entry, "conversations")) {
        Some(turns) => reader.turns(turns)?,
        None => reader.question(entry)?,
    };
    if let Some(system) = entry.get("system").filter(|v| !blank(v)) {
        let system = reader.message(SYSTEM, system)?;
        if messages.first().is_some_and(|m| m.role == SYSTEM) {
            return Err("`system` stands beside a system turn".into());
        }
        messages.insert(0, system);
    }
    reader.finish(messages)
}

/// The value of a key, unless it is null: tables that became JSON have every key in every row.
fn present<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    value.get(key).filter(|v| !v.is_null())
}

/// Null, an empty string or list.
fn blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// The pictures of `image` and `images`.
fn listed(entry: &Value, root: &Path) -> Result<Vec<Picture>, String> {
    let mut pictures = Vec::new();
    for key in ["image", "images"] {
        match entry.get(key) {
            None => {}
            Some(value) if blank(value) => {}
            Some(Value::Array(list)) => {
                for value in list {
                    pictures.push(picture(value, root)?);
                }
            }
            Some(value) => pictures.push(picture(value, root)?),
        }
    }
    Ok(pictures)
}

/// A path, a `file:` or `data:` URL, or an object that holds one.
fn picture(value: &Value, root: &Path) -> Result<Picture, String> {
    let text = match value {
        Value::Object(fields) => ["url", "path"].iter().find_map(|key| fields.get(*key)).and_then(Value::as_str),
        value => value.as_str(),
    };
    let text = text.filter(|t| !t.is_empty()).ok_or("a picture is no path, list of paths or null")?;
    if let Some(data) = text.strip_prefix("data:") {
        let (kind, data) = data.split_once(',').ok_or("a data: URL without a comma")?;
        if !kind.ends_with(";base64") {
            return Err(format!("a data: URL of kind `{kind}`; only base64 is understood"));
        }
        let bytes = base64::engine::general_purpose::STANDARD.decode(data.trim());
        return Ok(Picture::Bytes(bytes.map_err(|e| format!("a data: URL is no base64: {e}"))?));
    }
    match text.split_once("://") {
        None => located(root, Path::new(text)),
        Some(("file", path)) => located(root, Path::new(path)),
        Some(_) => Err(format!("picture {text} is not downloaded: save it and give its path")),
    }
}

/// The picture that `path` names, which must lie below `root`. One that is missing is found out with the others.
pub(super) fn located(root: &Path, path: &Path) -> Result<Picture, String> {
    match inside(root, path) {
        Err(LocateError::Missing { .. }) => Ok(Picture::File(root.join(path))),
        found => found.map(Picture::File).map_err(|e| e.to_string()),
    }
}

struct Reader<'a> {
    root: &'a Path,
    /// Pictures named beside the turns.
    listed: Vec<Picture>,
    /// How many of these the turns have had a place for.
    places: usize,
    /// Pictures named inside the turns.
    inline: Vec<Picture>,
}

impl Reader<'_> {
    fn turns(&mut self, turns: &Value) -> Result<Vec<Message>, String> {
        let turns = turns.as_array().ok_or("the turns are no list")?;
        turns.iter().enumerate().map(|(i, turn)| self.turn(turn).map_err(|e| format!("turn {}: {e}", i + 1))).collect()
    }

    fn turn(&mut self, turn: &Value) -> Result<Message, String> {
        let role = present(turn, "role").or(present(turn, "from")).and_then(Value::as_str);
        let role = match role.ok_or("neither `role` nor `from`")? {
            "system" | "developer" => SYSTEM,
            "user" | "human" => USER,
            "assistant" | "gpt" => ASSISTANT,
            other => return Err(format!("the role `{other}` is not understood")),
        };
        if turn.get("tool_calls").is_some_and(|v| !blank(v)) {
            return Err("`tool_calls` is not understood".into());
        }
        self.message(role, present(turn, "content").or(present(turn, "value")).ok_or("neither `content` nor `value`")?)
    }

    fn message(&mut self, role: &str, content: &Value) -> Result<Message, String> {
        let mut parts = Vec::new();
        match content {
            Value::String(text) => self.text(text, &mut parts),
            Value::Array(list) => list.iter().try_for_each(|part| self.part(part, &mut parts))?,
            _ => return Err("the text is missing or no string".into()),
        }
        let message = Message { role: role.into(), parts };
        if role == ASSISTANT && message.parts.contains(&Part::Image) {
            return Err("a picture in an answer".into());
        }
        if role == ASSISTANT && message.parts.is_empty() {
            return Err("the answer is empty".into());
        }
        Ok(message)
    }

    /// A text with the pictures' places in it.
    fn text(&mut self, text: &str, parts: &mut Vec<Part>) {
        for (i, piece) in text.split(PLACE).enumerate() {
            if i > 0 {
                self.places += 1;
                parts.push(Part::Image);
                self.inline.extend(self.listed.get(self.places - 1).cloned());
            }
            let piece = piece.trim();
            if !piece.is_empty() {
                parts.push(Part::Text(piece.into()));
            }
        }
    }

    /// A typed part of a message.
    fn part(&mut self, part: &Value, parts: &mut Vec<Part>) -> Result<(), String> {
        let kind = part.get("type").and_then(Value::as_str).ok_or("a part of a message has no `type`")?;
        match kind {
            "text" => {
                self.text(part.get("text").and_then(Value::as_str).ok_or("a part has no `text`")?, parts);
                Ok(())
            }
            "image" | "image_url" => {
                match ["image_url", "image", "url", "path"].iter().find_map(|key| present(part, key)) {
                    None => self.text(PLACE, parts),
                    Some(value) => {
                        self.inline.push(picture(value, self.root)?);
                        parts.push(Part::Image);
                    }
                }
                Ok(())
            }
            other => Err(format!("a part of type `{other}` is not understood")),
        }
    }

    /// The layout without turns.
    fn question(&mut self, entry: &Value) -> Result<Vec<Message>, String> {
        let answer = present(entry, "answer").or(present(entry, "caption"));
        let question = match present(entry, "question") {
            Some(question) => self.message(USER, question)?,
            None if answer.is_some() && !self.listed.is_empty() => Message::new(USER, 0, CAPTION_QUESTION),
            None => return Err("neither `conversations`, `messages`, `question` nor an `image` with a caption".into()),
        };
        Ok(vec![question, self.message(ASSISTANT, answer.ok_or("`answer` is missing")?)?])
    }

    /// Checks the order of turns and that every picture has its place.
    fn finish(self, mut messages: Vec<Message>) -> Result<Conversation, String> {
        // Nothing is learned from what follows the last answer.
        let answers = messages.iter().rposition(|m| m.role == ASSISTANT);
        messages.truncate(answers.ok_or("no answer (a turn of `gpt` or `assistant`)")? + 1);
        let first = messages.iter().position(|m| m.role != SYSTEM);
        let Some(first) = first.filter(|&i| messages[i].role == USER) else {
            return Err("begins with an answer, not with a question".into());
        };
        let mut pictures = self.inline;
        if self.places == 0 {
            messages[first].parts.splice(0..0, vec![Part::Image; self.listed.len()]);
            pictures.splice(0..0, self.listed);
        } else if self.places != self.listed.len() {
            let (places, listed) = (self.places, self.listed.len());
            return Err(format!("{PLACE} stands {places} times for {listed} pictures"));
        }
        let places = messages.iter().flat_map(|m| &m.parts).filter(|p| **p == Part::Image).count();
        pictures.truncate(places);
        if messages.iter().any(|m| m.parts.is_empty() && m.role == USER) {
            return Err("a question is empty".into());
        }
        messages.retain(|m| !m.parts.is_empty());
        Ok(Conversation { messages, pictures })
    }
}

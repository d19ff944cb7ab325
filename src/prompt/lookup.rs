//! Which chat template a checkpoint has, as transformers 5 looks it up: its processor's, else its tokenizer's.
use super::{ChatTemplate, Context, LineEnd, PictureText, PromptError};
use crate::checkpoint::ROLES;
use crate::files::read_plain_text;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// What stands for a picture, where the files do not say.
const IMAGE: &str = "<image>";

fn fail(path: &Path, problem: impl std::fmt::Display) -> PromptError {
    PromptError::File { path: path.into(), problem: problem.to_string() }
}

fn text(path: &Path) -> Result<Option<String>, PromptError> {
    match read_plain_text(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(fail(path, e)),
    }
}

/// A JSON file of `dir`; null where there is none.
fn json(dir: &Path, file: &str) -> Result<Value, PromptError> {
    let path = dir.join(file);
    let Some(text) = text(&path)? else { return Ok(Value::Null) };
    match serde_json::from_str(&text).map_err(|e| fail(&path, format!("not valid JSON: {e}")))? {
        object @ Value::Object(_) => Ok(object),
        _ => Err(fail(&path, "no JSON object")),
    }
}

/// The template that a `chat_template` entry means: a string, or of several by name the one called `default`.
fn default(path: &Path, entry: &Value) -> Result<Option<String>, PromptError> {
    let named: BTreeMap<&str, &Value> = match entry {
        Value::Null => return Ok(None),
        Value::String(text) => return Ok(Some(text.clone())),
        Value::Array(list) => list.iter().filter_map(|t| Some((t["name"].as_str()?, &t["template"]))).collect(),
        Value::Object(map) => map.iter().map(|(name, text)| (name.as_str(), text)).collect(),
        _ => return Err(fail(path, "`chat_template` is neither a text nor a list of named texts")),
    };
    match named.get("default").map(|t| t.as_str()) {
        Some(Some(text)) => Ok(Some(text.into())),
        Some(None) => Err(fail(path, "the chat template `default` is no text")),
        None => {
            let names: Vec<&str> = named.into_keys().collect();
            Err(fail(path, format!("has the chat templates {}, none called `default`", names.join(", "))))
        }
    }
}

/// The template of the processor, else that of the tokenizer.
///
/// # Errors
/// A file that cannot be read, or templates by name of which none is `default`.
pub fn source(dir: &Path) -> Result<Option<String>, PromptError> {
    let of = |file: &str, json: &Value| default(&dir.join(file), &json["chat_template"]);
    let entry = |file: &str| of(file, &json(dir, file)?);
    if let Some(text) = entry("processor_config.json")? {
        return Ok(Some(text));
    }
    // The older file hides the newer one from processors, and knows no others beside it; without its key transformers fails.
    let file = "chat_template.json";
    let older = json(dir, file)?;
    if older.is_object() && older.get("chat_template").is_none() {
        return Err(fail(&dir.join(file), "has no key `chat_template`"));
    }
    if let Some(text) = of(file, &older)? {
        return Ok(Some(text));
    }
    let path = dir.join("chat_template.jinja");
    if let Some(text) = text(&path)? {
        return Ok(Some(text));
    }
    let more = dir.join("additional_chat_templates");
    let named = std::fs::read_dir(&more).into_iter().flatten().flatten().map(|f| f.path());
    let named: Vec<String> = named
        .filter(|p| p.extension().is_some_and(|e| e == "jinja"))
        .filter_map(|p| Some(p.file_stem()?.to_string_lossy().into_owned()))
        .collect();
    if named.iter().any(|name| name == "default") {
        return text(&more.join("default.jinja"));
    }
    if !named.is_empty() {
        return Err(fail(
            &more,
            format!("has the chat templates {}; chat_template.jinja is missing", named.join(", ")),
        ));
    }
    entry("tokenizer_config.json")
}

/// What transformers lets templates name: the special tokens, and the tools and documents that there are not.
fn variables(dir: &Path) -> Result<Map<String, Value>, PromptError> {
    let (config, map) = (json(dir, "tokenizer_config.json")?, json(dir, "special_tokens_map.json")?);
    let of = |v: &Value| Some(v.as_str().or(v["content"].as_str())?.to_owned());
    let token = |name: &&str| Some((name.to_string(), of(&config[*name]).or_else(|| of(&map[*name]))?.into()));
    let none = ["tools", "documents"].map(|name| (name.to_string(), Value::Null));
    Ok(ROLES.iter().filter_map(token).chain(none).collect())
}

impl ChatTemplate {
    /// The template of the checkpoint in `dir` with its special tokens.
    ///
    /// # Errors
    /// There is none, a file that cannot be read, or a template that cannot be applied.
    pub fn read(dir: &Path) -> Result<Self, PromptError> {
        let source = source(dir)?.ok_or_else(|| {
            fail(
                dir,
                "no chat template (chat_template.jinja, chat_template.json, processor_config.json or \
                 tokenizer_config.json): calibration needs one to word the prompts; copy it from the model's \
                 instruction-tuned original, or convert with --method rtn",
            )
        })?;
        Self::of(dir, source, PictureText::LLAVA)
    }

    /// `source` as the template of the checkpoint in `dir`, which writes `picture` for one.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that cannot be applied.
    pub(super) fn of(dir: &Path, source: String, picture: PictureText) -> Result<Self, PromptError> {
        let image = picture.text.map_or_else(|| image(dir), |text| Ok(text.into()))?;
        let (behind_each, behind_image) = match picture.line_end {
            LineEnd::Nobody => ("", ""),
            LineEnd::Runtime => ("", "\n"),
            LineEnd::Template => ("\n", ""),
        };
        let context = Context {
            variables: variables(dir)?,
            adds_bos: false,
            strings: false,
            image: image + behind_each,
            behind_image: behind_image.into(),
        };
        Self::new(source, context).map_err(|e| fail(dir, e))
    }
}

/// The text of the checkpoint's picture token.
///
/// # Errors
/// A file that cannot be read.
pub fn image(dir: &Path) -> Result<String, PromptError> {
    for file in ["processor_config.json", "tokenizer_config.json"] {
        let token = &json(dir, file)?["image_token"];
        match token.as_str().or(token["content"].as_str()) {
            Some(text) => return Ok(text.into()),
            None if token.is_null() => (),
            None => {
                return Err(fail(&dir.join(file), "`image_token` is no token: a string, or an object with `content`"));
            }
        }
    }
    Ok(IMAGE.into())
}

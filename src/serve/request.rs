//! The body of `POST /v1/chat/completions`.
use super::error::ApiError;
use super::fields::Fields;
use super::pictures::{PictureSource, Pictures};
use super::sampler::Sampling;
use crate::prompt::gguf::MARK;
use crate::prompt::{Message, Part};
use serde_json::Value;

/// A request for an answer, checked.
#[derive(Debug)]
pub struct ChatRequest {
    pub model: Option<String>,
    pub messages: Vec<Message>,
    /// In the order of the messages' [`Part::Image`]s.
    pub pictures: Vec<PictureSource>,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    pub max_tokens: Option<usize>,
    /// Goes on behind the model's own end: for measurements.
    pub ignore_eos: bool,
    pub stream: bool,
    /// Of a stream: an event with the usage at its end.
    pub include_usage: bool,
}

/// Of OpenAI's fields those that change nothing in the answer of a model that runs here.
const IGNORED: [&str; 9] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "parallel_tool_calls",
];

/// Of OpenAI's fields those that would change it.
const UNSUPPORTED: [&str; 14] = [
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "response_format",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "modalities",
    "audio",
    "web_search_options",
    "reasoning_effort",
    "verbosity",
    "n",
];

/// Whether a field is one that changes nothing, or has the value that it has where it is left out.
fn is_harmless(key: &str, value: &Value) -> bool {
    match key {
        "tools" | "functions" => value.as_array().is_some_and(Vec::is_empty),
        "tool_choice" | "function_call" => matches!(value.as_str(), Some("none" | "auto")),
        "response_format" => value.as_object().is_some_and(|o| o.len() == 1 && o.get("type") == Some(&"text".into())),
        "logprobs" => value == false,
        "top_logprobs" => value == 0,
        "logit_bias" => value.as_object().is_some_and(|o| o.is_empty()),
        "modalities" => value.as_array().is_some_and(|list| list.len() == 1 && list[0] == "text"),
        "verbosity" => value == "medium",
        "n" => value == 1,
        _ => IGNORED.contains(&key),
    }
}

/// Stop strings, at most.
const STOPS: usize = 4;
/// Bytes of one.
const STOP_BYTES: usize = 1024;

/// Values in a body, at most: parsed, a value takes forty times the two bytes that it may have there.
const MOST_VALUES: usize = 100_000;

/// About how many values `json` has: its commas and brackets outside of strings.
fn values(json: &[u8]) -> usize {
    let (mut count, mut in_string, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => count += 1,
            _ => {}
        }
    }
    count
}

impl ChatRequest {
    /// Reads a body; pictures are taken out of their URLs, but not decoded.
    ///
    /// # Errors
    /// What is not as OpenAI has it, or would change the answer in a way that is not supported, by its name.
    pub fn parse(body: &[u8], pictures: &Pictures) -> Result<Self, ApiError> {
        let values = values(body);
        if values > MOST_VALUES {
            let message = format!("the body has {values} values, more than {MOST_VALUES}");
            return Err(ApiError { param: None, ..ApiError::invalid("", message) });
        }
        let json: Value = serde_json::from_slice(body).map_err(|error| ApiError {
            param: None,
            ..ApiError::invalid("", format!("the body is not JSON: {error}"))
        })?;
        let mut fields = Fields::of(json, "")?;
        let model = fields.string("model")?.filter(|name| !name.is_empty());
        let mut found = Vec::new();
        let messages = messages(fields.need("messages")?, pictures, &mut found)?;
        let sampling = sampling(&mut fields)?;
        let stop = stop(&mut fields)?;
        let most = fields.integer("max_tokens", 1, i64::MAX)?;
        let max_tokens = fields.integer("max_completion_tokens", 1, i64::MAX)?.or(most).map(|n| n as usize);
        let ignore_eos = fields.boolean("ignore_eos")?.unwrap_or(false);
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let include_usage = include_usage(&mut fields, stream)?;
        fields.end(&UNSUPPORTED, is_harmless)?;
        Ok(ChatRequest {
            model,
            messages,
            pictures: found,
            sampling,
            stop,
            max_tokens,
            ignore_eos,
            stream,
            include_usage,
        })
    }
}

fn sampling(fields: &mut Fields) -> Result<Sampling, ApiError> {
    let usual = Sampling::default();
    // Without a seed an answer differs from one time to the next.
    let seed = fields.integer("seed", i64::MIN, i64::MAX)?.map_or_else(rand_seed, |seed| seed as u64);
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(usual.temperature),
        top_k: fields.integer("top_k", 0, i64::from(i32::MAX))?.map_or(usual.top_k, |k| k as usize),
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(usual.top_p),
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(usual.min_p),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        seed,
    })
}

/// A number that nobody foretells.
pub(super) fn rand_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let wrong = |message: &str| ApiError::invalid("stop", message);
    let list = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    if list.len() > STOPS {
        return Err(wrong("`stop` may hold 4 strings at most"));
    }
    let text = |value| match value {
        Value::String(text) if text.is_empty() => Err(wrong("a string of `stop` is empty")),
        Value::String(text) if text.len() > STOP_BYTES => Err(wrong("a string of `stop` is longer than 1024 bytes")),
        Value::String(text) => Ok(text),
        _ => Err(wrong("`stop` must be a string or a list of strings")),
    };
    list.into_iter().map(text).collect()
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = fields.take("stream_options") else { return Ok(false) };
    if !stream {
        return Err(ApiError::invalid("stream_options", "`stream_options` is for `stream`: true alone"));
    }
    let mut options = Fields::of(options, "stream_options")?;
    let usage = options.boolean("include_usage")?.unwrap_or(false);
    // Padding that OpenAI puts into streams; there is none here.
    options.boolean("include_obfuscation")?;
    options.end(&[], |_, _| false)?;
    Ok(usage)
}

fn messages(value: Value, pictures: &Pictures, found: &mut Vec<PictureSource>) -> Result<Vec<Message>, ApiError> {
    let Value::Array(list) = value else {
        return Err(ApiError::invalid("messages", "`messages` must be a list"));
    };
    if list.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` is empty"));
    }
    let message = |(i, value)| message(value, &format!("messages[{i}]"), pictures, found);
    list.into_iter().enumerate().map(message).collect()
}

/// What clients send back of an answer and what says nothing where it is empty.
fn is_empty_part(key: &str, value: &Value) -> bool {
    matches!(key, "tool_calls" | "annotations") && value.as_array().is_some_and(Vec::is_empty)
}

fn message(value: Value, at: &str, pictures: &Pictures, found: &mut Vec<PictureSource>) -> Result<Message, ApiError> {
    let mut fields = Fields::of(value, at)?;
    let Value::String(role) = fields.need("role")? else {
        return Err(ApiError::invalid(fields.name("role"), "`role` must be a string"));
    };
    let role = match role.as_str() {
        "developer" => "system",
        "system" | "user" | "assistant" => &role,
        "tool" | "function" => {
            let message = format!("the role `{role}` is not supported: there are no tools here");
            return Err(ApiError::unsupported(fields.name("role"), message));
        }
        _ => return Err(ApiError::invalid(fields.name("role"), "`role` must be system, developer, user or assistant")),
    };
    let content = fields.need("content")?;
    let place = fields.name("content");
    fields.end(&["name", "tool_calls", "function_call", "audio", "refusal", "tool_call_id"], is_empty_part)?;
    let parts = match content {
        Value::String(text) => vec![Part::Text(words(text, &place)?)],
        Value::Array(list) if list.is_empty() => return Err(ApiError::invalid(place, "a message's content is empty")),
        Value::Array(list) => {
            let part = |(i, value)| part(value, &format!("{place}[{i}]"), role == "user", pictures, found);
            list.into_iter().enumerate().map(part).collect::<Result<_, _>>()?
        }
        _ => return Err(ApiError::invalid(place, "a message's content must be a string or a list of parts")),
    };
    Ok(Message { role: role.into(), parts })
}

fn part(
    value: Value,
    at: &str,
    may_show: bool,
    pictures: &Pictures,
    found: &mut Vec<PictureSource>,
) -> Result<Part, ApiError> {
    let mut fields = Fields::of(value, at)?;
    let kind = fields.string("type")?;
    let part = match kind.as_deref() {
        Some("text") => {
            let place = fields.name("text");
            match fields.need("text")? {
                Value::String(text) => Part::Text(words(text, &place)?),
                _ => return Err(ApiError::invalid(place, "a part's text must be a string")),
            }
        }
        Some("image_url") if !may_show => {
            return Err(ApiError::invalid(at, "only messages of role `user` may have pictures"));
        }
        Some("image_url") => {
            let mut image = match fields.need("image_url")? {
                // Many programs leave the object out.
                Value::String(url) => Fields::of(serde_json::json!({"url": url}), &fields.name("image_url"))?,
                object => Fields::of(object, &fields.name("image_url"))?,
            };
            let place = image.name("url");
            let Value::String(url) = image.need("url")? else {
                return Err(ApiError::invalid(place, "a picture's URL must be a string"));
            };
            // How closely OpenAI looks; here a picture is always seen as the model's own processor prepares it.
            if !matches!(image.string("detail")?.as_deref(), None | Some("auto" | "low" | "high")) {
                return Err(ApiError::invalid(image.name("detail"), "`detail` must be auto, low or high"));
            }
            image.end(&[], |_, _| false)?;
            found.push(pictures.source(url, &place, found.len())?);
            Part::Image
        }
        Some("input_audio" | "file" | "refusal") => {
            return Err(ApiError::unsupported(at, "parts of this type are not supported; text and image_url are"));
        }
        _ => return Err(ApiError::invalid(fields.name("type"), "a part's `type` must be text or image_url")),
    };
    fields.end(&[], |_, _| false)?;
    Ok(part)
}

/// Text of a message. The runtime's mark for a picture cannot be part of it: it would be taken for one.
fn words(text: String, at: &str) -> Result<String, ApiError> {
    // Templates know the mark by its beginning, too.
    let begin = MARK.trim_end_matches("__>");
    if text.contains(begin) {
        return Err(ApiError::invalid(
            at,
            format!("text that holds `{begin}`, the runtime's mark for pictures, is refused"),
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;

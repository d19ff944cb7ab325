//! `tokenizer.json` with the tokens that only its neighbours name, as transformers 5 completes it.
use super::{CheckpointError, read_json, vocab_json};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

/// The roles of special tokens in transformers' order, which is that in which it adds them to a vocabulary that lacks them.
pub(crate) const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// `tokenizer.json` of `dir`, or what transformers makes of Qwen2's `vocab.json` and `merges.txt`. Added tokens that it lacks
/// stand behind its own: those of `added_tokens_decoder` in `tokenizer_config.json`, or of `added_tokens.json` where that key is
/// absent, then the special tokens.
///
/// # Errors
/// A file that cannot be read, or an id that transformers would not give: the ids follow the vocabulary without a gap.
pub(crate) fn tokenizer(dir: &Path) -> Result<Value, CheckpointError> {
    let path = dir.join("tokenizer.json");
    let made = if path.exists() { None } else { vocab_json::read(dir)? };
    let mut json = made.map_or_else(|| read_json(&path), Ok)?;
    let (config, added) = (optional_json(dir, "tokenizer_config.json")?, optional_json(dir, "added_tokens.json")?);
    check_names(&dir.join("tokenizer_config.json"), &config)?;
    let mut missing = declared_tokens(&config, &added);
    missing.retain(|(_, t)| t["content"].as_str().is_some_and(|content| !has(&json, content)));
    if missing.is_empty() {
        return Ok(json);
    }
    for (next, (declared, mut token)) in (next_id(&json)..).zip(missing) {
        if declared.is_some_and(|id| id != next) {
            let field = format!("added token {}", token["content"]);
            let want =
                "the id behind the last token of tokenizer.json, as transformers counts; save the tokenizer again";
            return Err(CheckpointError::Field { path: dir.join("tokenizer_config.json"), field, want });
        }
        token["id"] = next.into();
        match json.get_mut("added_tokens") {
            Some(Value::Array(list)) => list.push(token),
            None | Some(Value::Null) => json["added_tokens"] = json!([token]),
            Some(_) => {
                let field = "added_tokens".into();
                return Err(CheckpointError::Field { path, field, want: "a list" });
            }
        }
    }
    Ok(json)
}

/// A file of `dir`; null where there is none.
///
/// # Errors
/// It cannot be read.
pub(crate) fn optional_json(dir: &Path, file: &str) -> Result<Value, CheckpointError> {
    let path = dir.join(file);
    if path.exists() { read_json(&path) } else { Ok(Value::Null) }
}

/// Whether the vocabulary or the added tokens have it.
fn has(json: &Value, content: &str) -> bool {
    let added = json["added_tokens"].as_array().into_iter().flatten();
    json["model"]["vocab"].get(content).is_some() || added.into_iter().any(|t| t["content"] == content)
}

fn next_id(json: &Value) -> u64 {
    let added = json["added_tokens"].as_array().into_iter().flatten().filter_map(|t| t["id"].as_u64());
    let vocab = json["model"]["vocab"].as_object().into_iter().flatten().filter_map(|(_, id)| id.as_u64());
    added.chain(vocab).max().map_or(0, |id| id + 1)
}

/// Refuses special tokens of `tokenizer_config.json` that are no tokens: transformers would, and a model without its end of an
/// answer never ends one.
///
/// # Errors
/// The first of them.
pub(crate) fn check_names(path: &Path, config: &Value) -> Result<(), CheckpointError> {
    let bad = |field: String, want| Err(CheckpointError::Field { path: path.into(), field, want });
    let is_token = |v: &Value| v.get("content").is_some_and(Value::is_string);
    for role in ROLES {
        if !(config[role].is_null() || config[role].is_string() || is_token(&config[role])) {
            return bad(role.into(), "a token: a string, or an object with `content`");
        }
    }
    let map = match &config["added_tokens_decoder"] {
        Value::Null => return Ok(()),
        Value::Object(map) => map,
        _ => return bad("added_tokens_decoder".into(), "an object"),
    };
    for (id, token) in map {
        let field = format!("added_tokens_decoder.{id}");
        if id.parse::<u32>().is_err() || !is_token(token) || token["content"] == "" {
            return bad(field, "the id of an object with `content`");
        }
        // transformers takes no 0 or null for false.
        let flags = ["single_word", "lstrip", "rstrip", "normalized", "special"];
        if let Some(key) = flags.iter().find(|key| token.get(**key).is_some_and(|v| !v.is_boolean())) {
            return bad(format!("{field}.{key}"), "true or false");
        }
    }
    Ok(())
}

/// Tokens that `tokenizer_config.json` and `added_tokens.json` name, as entries of `tokenizer.json`'s list, with the ids
/// that they give them.
pub(crate) fn declared_tokens(config: &Value, added: &Value) -> Vec<(Option<u64>, Value)> {
    let token = |content: &str, special: bool, normalized: bool| {
        json!({"content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": normalized,
               "special": special})
    };
    let mut found: Vec<(Option<u64>, Value)> = Vec::new();
    if let Some(decoder) = config["added_tokens_decoder"].as_object() {
        for (id, entry) in decoder {
            let flag = |key: &str| entry[key].as_bool().unwrap_or(false);
            let Some(content) = entry["content"].as_str() else { continue };
            let mut t = token(content, flag("special"), flag("normalized"));
            ["single_word", "lstrip", "rstrip"].iter().for_each(|key| t[key] = flag(key).into());
            found.push((id.parse().ok(), t));
        }
    } else {
        for (content, id) in added.as_object().into_iter().flatten() {
            found.push((id.as_u64(), token(content, false, true)));
        }
    }
    found.sort_by_key(|(id, _)| *id);
    let named = |v: &Value| v.as_str().or(v["content"].as_str()).map(str::to_string);
    let roles = ROLES.iter().filter_map(|role| named(&config[*role]));
    let lists = ["additional_special_tokens", "extra_special_tokens"].iter().flat_map(|key| match &config[*key] {
        Value::Array(list) => list.iter().filter_map(named).collect::<Vec<_>>(),
        Value::Object(map) => map.values().filter_map(named).collect(),
        _ => Vec::new(),
    });
    found.extend(roles.chain(lists).map(|content| (None, token(&content, true, false))));
    // Named twice, once as special: it is.
    let named = |t: &Value| t["content"].as_str().map(str::to_string);
    let special: BTreeSet<_> =
        found.iter().filter(|(_, t)| t["special"] == true).filter_map(|(_, t)| named(t)).collect();
    for (_, t) in &mut found {
        t["special"] = named(t).is_some_and(|content| special.contains(&content)).into();
    }
    let mut seen = BTreeSet::new();
    found.retain(|(_, t)| t["content"].as_str().is_some_and(|c| !c.is_empty() && seen.insert(c.to_string())));
    found
}

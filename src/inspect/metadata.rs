//! Metadata values, for people and for machines.
use crate::gguf::Value;
use serde_json::{Value as Json, json};

/// One line: long strings and arrays by their beginning.
pub fn show(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = match value {
        Value::Array(values) => {
            let first: Vec<String> = values.iter().take(8).map(|v| show(&v)).collect();
            let more = if values.len() > 8 { format!(", … ({} in all)", values.len()) } else { String::new() };
            return format!("[{}{more}]", first.join(", "));
        }
        Value::String(text) => format!("{:?}", String::from_utf8_lossy(text)),
        Value::Bool(v) => v.to_string(),
        Value::F32(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
        // invariant: the others are integers.
        v => v.as_u64().map(|v| v.to_string()).or(v.as_i64().map(|v| v.to_string())).unwrap_or_default(),
    };
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

/// Arrays that are longer (vocabularies) are given as `{"length": …, "first": […]}`.
const LONG: usize = 1024;

/// The value as JSON. What is no UTF-8 has replacement characters; NaN and infinities are null.
pub fn to_json(value: &Value) -> Json {
    match value {
        Value::Array(values) if values.len() > LONG => {
            json!({"length": values.len(), "first": values.iter().take(8).map(|v| to_json(&v)).collect::<Vec<_>>()})
        }
        Value::Array(values) => values.iter().map(|v| to_json(&v)).collect(),
        Value::String(text) => String::from_utf8_lossy(text).into(),
        Value::Bool(v) => (*v).into(),
        Value::F32(v) => json!(v),
        Value::F64(v) => json!(v),
        v => v.as_u64().map(Json::from).or(v.as_i64().map(Json::from)).unwrap_or_default(),
    }
}

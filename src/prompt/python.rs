//! How Python writes values: `str`, `repr` and `json.dumps`, and the string methods that pycompat leaves out.
use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use std::fmt::Write;

/// `str(value)`: what `{{ value }}` writes.
pub(super) fn str(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.into(),
        None if value.is_undefined() => String::new(),
        None => repr(value),
    }
}

/// `repr(value)`.
fn repr(value: &Value) -> String {
    let list = |items: Vec<String>, ends: [&str; 2]| format!("{}{}{}", ends[0], items.join(", "), ends[1]);
    match value.kind() {
        ValueKind::None => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Number => number(value),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => match value.try_iter() {
            Ok(items) => list(items.map(|v| repr(&v)).collect(), ["[", "]"]),
            Err(_) => value.to_string(),
        },
        ValueKind::Map => match pairs(value) {
            Ok(pairs) => list(pairs.iter().map(|(k, v)| format!("{}: {}", repr(k), repr(v))).collect(), ["{", "}"]),
            Err(_) => value.to_string(),
        },
        _ => value.to_string(),
    }
}

fn pairs(map: &Value) -> Result<Vec<(Value, Value)>, Error> {
    map.try_iter()?.map(|key| Ok((key.clone(), map.get_item(&key)?))).collect()
}

/// Python writes exponents with a sign and two digits, and uses them from 1e16 and below 1e-4 on.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(x) = f64::try_from(value.clone()) else { return value.to_string() };
    if !x.is_finite() {
        return if x.is_nan() { "nan".into() } else { if x > 0.0 { "inf" } else { "-inf" }.into() };
    }
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        return format!("{x:?}");
    }
    let text = format!("{x:e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => _ = write!(out, "\\x{:02x}", u32::from(c)),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// How `json.dumps` lays a value out.
struct Json {
    ascii: bool,
    /// What one level is indented by.
    indent: Option<String>,
    item: String,
    key: String,
    sort: bool,
}

/// transformers' filter: `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(value: &Value, rest: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let option = |i: usize| -> Result<Option<Value>, Error> {
        let named: Option<Value> = options.get(NAMES[i])?;
        Ok(rest.get(i).cloned().or(named).filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let [ascii, indent, separators, sort] = [option(0)?, option(1)?, option(2)?, option(3)?];
    options.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(text) if text.as_str().is_some() => Some(text.to_string()),
        Some(n) => Some(" ".repeat(i64::try_from(n)?.clamp(0, 64) as usize)),
    };
    let (item, key) = match separators {
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
        Some(pair) => {
            let pair: Vec<Value> = pair.try_iter()?.collect();
            let [item, key] = pair.as_slice() else {
                return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators are two strings"));
            };
            (item.to_string(), key.to_string())
        }
    };
    let truth = |v: Option<Value>| v.is_some_and(|v| v.is_true());
    let layout = Json { ascii: truth(ascii), indent, item, key, sort: truth(sort) };
    let mut out = String::new();
    layout.write(&mut out, value, 0)?;
    Ok(Value::from(out))
}

impl Json {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(match number(value).as_str() {
                "nan" => "NaN",
                "inf" => "Infinity",
                "-inf" => "-Infinity",
                other => other,
            }),
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(out, ['[', ']'], &items, depth, |out, item| self.write(out, item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut pairs = pairs(value)?;
                if self.sort {
                    pairs.sort_by_key(|(key, _)| key.to_string());
                }
                self.list(out, ['{', '}'], &pairs, depth, |out, (key, value)| {
                    self.string(out, &str(key));
                    out.push_str(&self.key);
                    self.write(out, value, depth + 1)
                })?;
            }
            kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} is no JSON"))),
        }
        Ok(())
    }

    fn list<T>(
        &self,
        out: &mut String,
        ends: [char; 2],
        items: &[T],
        depth: usize,
        each: impl Fn(&mut String, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = self.indent.as_ref().filter(|_| !items.is_empty()) {
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
        };
        out.push(ends[0]);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item);
            }
            line(out, depth + 1);
            each(out, item)?;
        }
        line(out, depth);
        out.push(ends[1]);
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) {
        let json = serde_json::Value::from(text).to_string();
        if !self.ascii {
            return out.push_str(&json);
        }
        for c in json.chars() {
            if c.is_ascii() && c != '\x7f' {
                out.push(c);
            } else {
                c.encode_utf16(&mut [0; 2]).iter().for_each(|half| _ = write!(out, "\\u{half:04x}"));
            }
        }
    }
}

/// Methods of Python's strings, lists and dictionaries: pycompat's, and some more that templates use.
pub(super) fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args);
    };
    let three = |a: &str, b: &str, c: &str| [a, b, c].into_iter().map(Value::from).collect::<Value>();
    Ok(match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "partition" => {
            let (by,): (&str,) = from_args(args)?;
            text.split_once(by).map_or_else(|| three(text, "", ""), |(a, b)| three(a, by, b))
        }
        "rpartition" => {
            let (by,): (&str,) = from_args(args)?;
            text.rsplit_once(by).map_or_else(|| three("", "", text), |(a, b)| three(a, by, b))
        }
        "rsplit" => {
            let (by, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let parts = most.and_then(|n| usize::try_from(n).ok()).map_or(usize::MAX, |n| n.saturating_add(1));
            let mut list: Vec<&str> = match by {
                Some(by) => text.rsplitn(parts, by).collect(),
                None if parts == usize::MAX => text.split_whitespace().rev().collect(),
                None => return Err(Error::new(ErrorKind::InvalidOperation, "rsplit: a limit needs a separator")),
            };
            list.reverse();
            list.into_iter().map(Value::from).collect()
        }
        // In characters, as Python counts.
        "find" | "rfind" | "index" => {
            let (what,): (&str,) = from_args(args)?;
            let at = if name == "rfind" { text.rfind(what) } else { text.find(what) };
            match at {
                Some(at) => Value::from(text[..at].chars().count()),
                None if name == "index" => {
                    return Err(Error::new(ErrorKind::InvalidOperation, "substring not found"));
                }
                None => Value::from(-1),
            }
        }
        _ => return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    })
}

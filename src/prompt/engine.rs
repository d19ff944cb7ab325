//! minijinja, set up as transformers sets up jinja2.
use super::{PromptError, kept, python};
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Value};
use std::fmt::Write as _;
use std::io::{self, Write};

/// Instructions that one rendering may take, a fraction of a second; a long conversation takes some ten thousand.
const WORK: u64 = 1_000_000;
/// Bytes that one rendering may write.
const LONGEST: usize = 16 << 20;
/// The one template of an environment.
const NAME: &str = "chat";

/// # Errors
/// The source is not Jinja.
pub(super) fn compile(source: &str) -> Result<Environment<'static>, PromptError> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_fuel(Some(WORK));
    env.set_debug(false); // errors name the line; with all variables they may be endless
    env.set_unknown_method_callback(python::method);
    env.set_formatter(|out, _, value| Ok(out.write_str(&python::str(value))?));
    minijinja_contrib::add_to_environment(&mut env);
    kept::add_to(&mut env);
    env.add_filter("tojson", python::tojson);
    env.add_filter("string", |value: &Value| python::str(value));
    // To jinja2 whatever has a length and items is a sequence.
    env.add_test("sequence", |v: &Value| matches!(v.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String));
    env.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, python::str(message)))
    });
    env.add_function("strftime_now", |format: &str| -> Result<String, Error> {
        let mut text = String::new();
        // invariant: writing to a string fails only where the format is not understood.
        write!(text, "{}", chrono::Local::now().format(format)).map_err(|_| {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {format:?} is no format of dates"))
        })?;
        Ok(text)
    });
    env.add_template_owned(NAME, prepared(source)).map_err(fail)?;
    Ok(env)
}

/// # Errors
/// The template fails, or takes more than its share of work or room.
pub(super) fn render(env: &Environment, values: &Value) -> Result<String, PromptError> {
    let mut out = Limited(Vec::new());
    env.get_template(NAME).and_then(|t| t.render_captured_to(values, &mut out).map(drop)).map_err(fail)?;
    String::from_utf8(out.0).map_err(|e| PromptError::Template(e.to_string()))
}

fn fail(error: Error) -> PromptError {
    PromptError::Template(match error.kind() {
        ErrorKind::OutOfFuel => format!("it does not come to an end within {WORK} steps"),
        ErrorKind::WriteFailure => format!("it writes more than {} MiB", LONGEST >> 20),
        _ => format!("{error:#}"),
    })
}

/// Text that may not grow without end.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > LONGEST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The source with transformers' `{% generation %}` blocks, which mark the assistant's words for training, as blocks
/// that minijinja has and that do as little: `{% with %}`, a scope of its own; and with what is set watched ([`kept`]).
/// Dashes and line ends stay as they are.
fn prepared(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (text, tag) = rest.split_at(at);
        out.push_str(text);
        let end = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or(tag.len(), |end| end + 2),
            Some(b'{') => expression_end(tag, "}}"),
            Some(b'%') => expression_end(tag, "%}"),
            _ => 1,
        };
        let (tag, behind) = tag.split_at(end);
        let name = tag_name(tag);
        rest = behind;
        match name {
            "generation" => out.push_str(&tag.replacen(name, "with", 1)),
            "endgeneration" => out.push_str(&tag.replacen(name, "endwith", 1)),
            "set" => out.push_str(&kept::watch(tag)),
            "raw" => {
                out.push_str(tag);
                let end = raw_end(rest);
                out.push_str(&rest[..end]);
                rest = &rest[end..];
            }
            _ => out.push_str(tag),
        }
    }
    out + rest
}

/// The word after `{%`, `{%-` or `{%+`; empty for other tags.
fn tag_name(tag: &str) -> &str {
    let Some(inner) = tag.strip_prefix("{%") else { return "" };
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
    let end = inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len());
    &inner[..end]
}

/// Bytes of a tag up to and with its `close`, which does not count inside of strings, and `}}` not where it ends
/// dictionaries; all of it where nothing closes it.
fn expression_end(tag: &str, close: &str) -> usize {
    let bytes = tag.as_bytes();
    let (mut at, mut quote, mut braces) = (2, None, 0usize);
    while at < bytes.len() {
        let byte = bytes[at];
        match quote {
            Some(_) if byte == b'\\' => at += 1,
            Some(q) if byte == q => quote = None,
            Some(_) => {}
            None if braces == 0 && bytes[at..].starts_with(close.as_bytes()) => return at + 2,
            None if byte == b'"' || byte == b'\'' => quote = Some(byte),
            None if byte == b'{' => braces += 1,
            None if byte == b'}' => braces = braces.saturating_sub(1),
            None => {}
        }
        at += 1;
    }
    tag.len()
}

/// Where the `{% endraw %}` of a raw block begins.
fn raw_end(text: &str) -> usize {
    let mut from = 0;
    while let Some(at) = text[from..].find("{%") {
        if tag_name(&text[from + at..]) == "endraw" {
            return from + at;
        }
        from += at + 2;
    }
    text.len()
}

//! minijinja, set up as transformers sets up jinja2.
use super::{PromptError, kept, nested, python};
use crate::bounded::{self, Bounds, Unfinished};
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Value};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

/// Instructions that one rendering may take, a fraction of a second; a long conversation takes some ten thousand.
const WORK: u64 = 1_000_000;
/// Bytes that one rendering may write.
const LONGEST: usize = 16 << 20;
/// Bytes of a template; the longest known has some 20,000. Each two of them may take a kilobyte of stack.
const LONGEST_SOURCE: usize = 64 << 10;
/// Steps may be large: a step may repeat a text a hundred million times.
const BOUNDS: Bounds = Bounds { bytes: 256 << 20, time: Duration::from_secs(5), stack: 64 << 20 };
/// The one template of an environment.
const NAME: &str = "chat";

/// A template that is compiled.
#[derive(Debug, Clone)]
pub(super) struct Compiled(Arc<Environment<'static>>);

/// # Errors
/// The source is not Jinja, or takes more than its share of time or room.
pub(super) fn compile(source: &str) -> Result<Compiled, PromptError> {
    if source.len() > LONGEST_SOURCE {
        return Err(PromptError::Exhausts(format!("has more than {} KiB", LONGEST_SOURCE >> 10)));
    }
    nested::check(source).map_err(PromptError::Exhausts)?;
    bounded(source)
}

/// Takes what [`nested::check`] would refuse, too.
fn bounded(source: &str) -> Result<Compiled, PromptError> {
    let source = prepared(source);
    Ok(Compiled(Arc::new(within_bounds(move || environment(source))?)))
}

fn environment(source: String) -> Result<Environment<'static>, PromptError> {
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
    env.add_template_owned(NAME, source).map_err(fail)?;
    Ok(env)
}

/// # Errors
/// The template fails, or takes more than its share of work or room.
pub(super) fn render(Compiled(env): &Compiled, values: Value) -> Result<String, PromptError> {
    let env = env.clone();
    within_bounds(move || {
        let mut out = Limited(Vec::new());
        env.get_template(NAME).and_then(|t| t.render_captured_to(values, &mut out).map(drop)).map_err(fail)?;
        String::from_utf8(out.0).map_err(|e| PromptError::Template(e.to_string()))
    })
}

fn within_bounds<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PromptError> + Send + 'static,
) -> Result<T, PromptError> {
    bounded::run(BOUNDS, work).map_err(|unfinished| match unfinished {
        Unfinished::Memory => PromptError::Exhausts(format!("takes more than {} MiB of memory", BOUNDS.bytes >> 20)),
        Unfinished::Time => {
            PromptError::Exhausts(format!("takes more than {} seconds of the processor", BOUNDS.time.as_secs()))
        }
        Unfinished::Panic => PromptError::Template("the template engine fails on it".into()),
    })?
}

fn fail(error: Error) -> PromptError {
    match error.kind() {
        ErrorKind::OutOfFuel => {
            let steps = || format!("does not come to an end within {WORK} steps");
            PromptError::Exhausts(error.detail().map_or_else(steps, String::from))
        }
        // Of what is written, and of what is called.
        _ if error.detail().is_some_and(|detail| detail.contains("recursion limit")) => {
            PromptError::Exhausts("is nested too deep".into())
        }
        ErrorKind::WriteFailure => PromptError::Exhausts(format!("writes more than {} MiB", LONGEST >> 20)),
        _ => PromptError::Template(format!("{error:#}")),
    }
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
        let (tag, behind) = tag.split_at(tag_end(tag));
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

/// Bytes of the comment, expression or statement that `tag` begins with; 1 where its `{` opens none.
pub(super) fn tag_end(tag: &str) -> usize {
    match tag.as_bytes().get(1) {
        Some(b'#') => tag.find("#}").map_or(tag.len(), |end| end + 2),
        Some(b'{') => expression_end(tag, "}}"),
        Some(b'%') => expression_end(tag, "%}"),
        _ => 1,
    }
}

/// The word after `{%`, `{%-` or `{%+`; empty for other tags.
pub(super) fn tag_name(tag: &str) -> &str {
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
pub(super) fn raw_end(text: &str) -> usize {
    let mut from = 0;
    while let Some(at) = text[from..].find("{%") {
        if tag_name(&text[from + at..]) == "endraw" {
            return from + at;
        }
        from += at + 2;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;

    /// What is said of a template with `source` before a prompt.
    fn said(source: &str) -> String {
        said_of(compile(source))
    }

    fn said_of(compiled: Result<Compiled, PromptError>) -> String {
        match compiled.and_then(|template| render(&template, context!(a => 1))) {
            Ok(text) => format!("made {text}"),
            Err(PromptError::Exhausts(problem)) => problem,
            Err(other) => other.to_string(),
        }
    }

    #[test]
    fn one_step_may_not_take_all_memory() {
        let text = "{% set t = 'a' * 16000000 %}";
        for step in [
            "('a' * 10000)|replace('a', t)",
            "t.join([''] * 9999)",
            "([t] * 9999)|tojson",
            "'%999999999d'|format(1)",
            "([1] * 99999999999)|list",
            "('b\\n' * 100000)|indent(100000)",
            "['a' * 100000000, 'a' * 100000000, 'a' * 100000000]",
        ] {
            assert_eq!(
                said(&format!("{text}{{% if {step} %}}{{% endif %}}")),
                "takes more than 256 MiB of memory",
                "{step}"
            );
        }
    }

    #[test]
    fn what_no_variable_holds_may_not_either() {
        let filled = "{% for i in range(9999) %}{{ 'a' * 16000000 }}{% endfor %}";
        for source in [
            format!("{{% set a %}}{filled}{{% endset %}}"),
            format!("{{% macro m() %}}{filled}{{% endmacro %}}{{% if m() %}}{{% endif %}}"),
            format!("{{% filter upper %}}{filled}{{% endfilter %}}"),
            "{% macro m(x, n) %}{% if n %}{{ m(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ m('a', 40) }}".into(),
            (0..300).map(|i| format!("{{% set a{i} = 'a' * 16000000 %}}")).collect(),
        ] {
            assert_eq!(said(&source), "takes more than 256 MiB of memory", "{source:.60}");
        }
        assert_eq!(said(filled), "writes more than 16 MiB");
    }

    #[test]
    fn chains_and_nests_end() {
        let chain = |start: &str, link: &str, end: &str| {
            let links = (LONGEST_SOURCE - start.len() - end.len()) / link.len();
            let source = format!("{start}{}{end}", link.repeat(links));
            let refused = ["is nested too deep", "has more than 500 operators in a row"];
            assert!(refused.contains(&said(&source).as_str()), "{link}");
            said_of(bounded(&source))
        };
        for link in ["+1", "~1", "|e", "**1", "<1"] {
            chain("{{ 1", link, " }}");
        }
        chain("{{ ", "not ", "1 }}");
        chain("{% if 0 %}", "{%elif 0%}", "{% endif %}");
        assert_eq!(said(&" ".repeat(LONGEST_SOURCE + 1)), "has more than 64 KiB");
        let brackets = format!("{{{{ {}1{} }}}}", "(".repeat(1000), ")".repeat(1000));
        assert_eq!([said(&brackets), said_of(bounded(&brackets))], ["is nested too deep"; 2]);
        assert_eq!(said("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), "is nested too deep");
    }
}

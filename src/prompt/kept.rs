//! What a chat template may keep in variables. minijinja counts steps alone: a value that contains itself, or is very
//! deep, overflows the stack where it is written, compared or dropped, and a text that is doubled fills the memory.
use minijinja::value::{Object, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Filters that [`watch`] puts behind what is set; the second one for attributes of namespaces.
const FILTERS: [&str; 2] = ["_mbq_kept", "_mbq_kept_in_namespace"];
/// Lists in lists and so on that a variable may hold.
const DEEPEST: usize = 100;
/// Items and bytes of text of a variable.
const LONGEST: usize = 16 << 20;
/// Items that are looked at in one rendering.
const MOST_ITEMS: usize = 10_000_000;

pub(super) fn add_to(env: &mut Environment) {
    env.add_filter(FILTERS[0], |state: &State, value: Value| kept(state, value, true));
    env.add_filter(FILTERS[1], |state: &State, value: Value| kept(state, value, false));
}

/// A `{% set %}` tag whose value goes through this module; others as they are.
pub(super) fn watch(tag: &str) -> String {
    let unchanged = || tag.to_string();
    let (Some(start), Some(inner)) = (tag.find("set").map(|at| at + 3), tag.strip_suffix("%}")) else {
        return unchanged();
    };
    let inner = inner.strip_suffix(['-', '+']).unwrap_or(inner);
    let Some(body) = inner.get(start..) else { return unchanged() };
    let (head, end) = (&tag[..start], &tag[inner.len()..]);
    let is_target = |text: &str| text.chars().all(|c| c.is_alphanumeric() || c.is_whitespace() || "_.,()".contains(c));
    match body.split_once('=') {
        Some((_, value)) if value.trim().is_empty() => unchanged(),
        Some((target, value)) if is_target(target) => {
            let filter = FILTERS[usize::from(target.contains('.'))];
            format!("{head}{target}= ({value})|{filter} {end}")
        }
        // A block's text.
        _ => format!("{head}{body}|{} {end}", FILTERS[0]),
    }
}

/// Items seen in this rendering.
#[derive(Debug, Default)]
struct Seen(AtomicUsize);

impl Object for Seen {}

fn fail(problem: &str) -> Error {
    Error::new(ErrorKind::OutOfFuel, format!("sets a variable to {problem}"))
}

fn kept(state: &State, value: Value, namespaces: bool) -> Result<Value, Error> {
    let seen = state.get_or_set_temp_object("mbq-kept", Seen::default);
    let mut left = LONGEST;
    measure(&value, &seen, &mut left, DEEPEST, namespaces)?;
    Ok(value)
}

/// # Errors
/// The value is too deep, too large, or, unless it may, contains a namespace, which could come to contain itself.
fn measure(value: &Value, seen: &Seen, left: &mut usize, depth: usize, namespaces: bool) -> Result<(), Error> {
    let size = 1 + value.as_str().map_or(0, str::len);
    *left = left.checked_sub(size).ok_or_else(|| fail(&format!("more than {} MiB", LONGEST >> 20)))?;
    if seen.0.fetch_add(1, Relaxed) >= MOST_ITEMS {
        return Err(fail(&format!("lists again and again, of more than {MOST_ITEMS} items in all")));
    }
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(());
    }
    if !namespaces && value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace")) {
        return Err(fail("a namespace, as an attribute of another or of itself; set its attributes one by one"));
    }
    let depth = depth.checked_sub(1).ok_or_else(|| fail(&format!("lists more than {DEEPEST} deep")))?;
    for item in value.try_iter()? {
        if value.kind() == ValueKind::Map {
            measure(&value.get_item(&item)?, seen, left, depth, namespaces)?;
        }
        measure(&item, seen, left, depth, namespaces)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::engine::{compile, render};
    use super::watch;
    use minijinja::context;

    #[test]
    fn only_what_is_set_is_watched() {
        assert_eq!(watch("{%- set a = b -%}"), "{%- set a = ( b )|_mbq_kept -%}");
        assert_eq!(watch("{% set n.a,b=1, 2%}"), "{% set n.a,b= (1, 2)|_mbq_kept_in_namespace %}");
        assert_eq!(watch("{% set a %}"), "{% set a |_mbq_kept %}");
        assert_eq!(watch("{% set a | replace(x='y') %}"), "{% set a | replace(x='y') |_mbq_kept %}");
        for tag in ["{% set a = %}", "{% set a", "{% set"] {
            assert_eq!(watch(tag), tag);
        }
    }

    fn rendered(source: &str) -> Result<String, String> {
        let template = compile(source).map_err(|e| e.to_string())?;
        render(&template, context!(messages => [context!(role => "user")])).map_err(|e| e.to_string())
    }

    #[test]
    fn values_that_are_set_stay_what_they_are() {
        for (source, text) in [
            ("{% set a = 1 if false %}{{ a is defined }}", "False"),
            ("{% set a = nothing %}{{ a is defined }}", "False"),
            ("{% set a, b = 1, 2 %}{{ a }}{{ b }}", "12"),
            ("{% set a = 'x=y', %}{{ a }}", "['x=y']"),
            ("{% set a = {'b': '%}'} %}{{ a.b }}", "%}"),
            ("{% set a %}x{% endset %}{% set b | upper %}{{ a }}{% endset %}{{ a + b }}", "xX"),
            (
                "{% set n = namespace(a=[]) %}{% for m in messages %}{% set n.a = n.a + [m] %}{% endfor %}{{ n.a }}",
                "[{'role': 'user'}]",
            ),
            ("{% set a = range(3) %}{% set b = a %}{{ b|list }}{{ a|list }}", "[0, 1, 2][0, 1, 2]"),
            ("{% set n = namespace(a=1) %}{% set m = n %}{% set m.a = 2 %}{{ n.a }}", "2"),
        ] {
            assert_eq!(rendered(source).as_deref(), Ok(text), "{source}");
        }
    }

    #[test]
    fn values_without_end_are_refused() {
        let looped = |set: &str| {
            let head = "{% set n = namespace(t='a') %}{% for i in range(9999) %}";
            format!("{head}{{% set n.t = {set} %}}{{% endfor %}}{{{{ n.t }}}}")
        };
        for (source, problem) in [
            (looped("n, n.t"), "a namespace"),
            (looped("namespace(t=n)"), "a namespace"),
            (looped("{'n': n}"), "a namespace"),
            (looped("[n.t]"), "100 deep"),
            (looped("[n.t] * 1"), "100 deep"),
            (looped("n.t ~ n.t"), "16 MiB"),
            (looped("[n.t, n.t]"), "again and again"),
            (looped("[range(99999), i]"), "again and again"),
            ("{% set x = 1 %}".to_string() + &"{% set x = [x] %}".repeat(101), "100 deep"),
        ] {
            let message = rendered(&source).unwrap_err();
            assert!(message.contains(problem), "{source}: {message}");
        }
    }
}

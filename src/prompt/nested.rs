//! What llama.cpp's template engine cannot take: it refuses more levels than [`DEEPEST`], and a long chain of operators
//! overflows its stack, which ends the whole program.
use super::engine::{raw_end, tag_end, tag_name};

/// Levels of llama.cpp's parser (`JINJA_RECURSIVE_LIMIT`).
const DEEPEST: usize = 128;
/// Operators of one tag; 8,000 are too many for 8 MiB of stack. Published templates have 22 at most.
const LONGEST: usize = 500;

/// # Errors
/// In words: what there is too much of. Levels are counted generously, as if all of a tag's `not`, `else`, signs and calls of
/// calls stood inside of each other.
pub(super) fn check(source: &str) -> Result<(), String> {
    // Of each block that is open: its own level, and those of its `elif`s.
    let mut open: Vec<usize> = Vec::new();
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let tag = &rest[at..];
        let (tag, behind) = tag.split_at(tag_end(tag));
        rest = behind;
        if !tag.starts_with("{{") && !tag.starts_with("{%") {
            continue;
        }
        let (name, inside) = (tag_name(tag), Inside::of(tag));
        match name {
            "elif" => open.iter_mut().last().into_iter().for_each(|levels| *levels += 1),
            "raw" => rest = &rest[raw_end(rest)..],
            _ if name.starts_with("end") => drop(open.pop()),
            _ => (),
        }
        if open.iter().sum::<usize>() + 1 + inside.levels > DEEPEST {
            return Err("is nested too deep".into());
        }
        if inside.operators > LONGEST {
            return Err(format!("has more than {LONGEST} operators in a row"));
        }
        let opens = matches!(name, "if" | "for" | "macro" | "call" | "filter" | "generation" | "raw");
        if opens || (name == "set" && !inside.assigns) {
            open.push(1);
        }
    }
    Ok(())
}

/// What an expression or a statement may take.
#[derive(Default)]
struct Inside {
    levels: usize,
    operators: usize,
    /// Whether there is a `=`.
    assigns: bool,
}

impl Inside {
    fn of(tag: &str) -> Self {
        let bytes = tag.get(2..tag.len().saturating_sub(2)).unwrap_or_default().as_bytes();
        let (mut this, mut open, mut deepest, mut nests) = (Inside::default(), 0usize, 0, 1);
        // Whether an operand ends here, and whether it is closed by a bracket.
        let (mut operand, mut closed) = (false, false);
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            let start = at;
            at += 1;
            match byte {
                b'"' | b'\'' => {
                    while bytes.get(at).is_some_and(|b| *b != byte) {
                        at += if bytes[at] == b'\\' { 2 } else { 1 };
                    }
                    at += 1;
                    (operand, closed) = (true, false);
                }
                b'(' | b'[' | b'{' => {
                    nests += usize::from(byte == b'(' && closed);
                    this.operators += usize::from(operand);
                    open += 1;
                    deepest = deepest.max(open);
                    (operand, closed) = (false, false);
                }
                b')' | b']' | b'}' => {
                    open = open.saturating_sub(1);
                    (operand, closed) = (true, true);
                }
                b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | 0x80.. => {
                    while bytes.get(at).is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_' || *b >= 0x80) {
                        at += 1;
                    }
                    let word = &bytes[start..at];
                    nests += usize::from([&b"not"[..], b"else"].contains(&word));
                    let joins = [&b"and"[..], b"or", b"in", b"is", b"if", b"not", b"else"].contains(&word);
                    this.operators += usize::from(joins);
                    (operand, closed) = (!joins, false);
                }
                _ if byte.is_ascii_whitespace() => (),
                _ => {
                    nests += usize::from(matches!(byte, b'-' | b'+') && !operand);
                    this.operators += usize::from(!matches!(byte, b',' | b':'));
                    this.assigns |= byte == b'=';
                    (operand, closed) = (false, false);
                }
            }
        }
        Inside { levels: nests + deepest, ..this }
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    /// The most that llama-mtmd-cli of b12032 takes, and one more.
    #[test]
    fn levels_are_those_of_llama_cpp() {
        let brackets = |n| format!("{{{{ {}1{} }}}}", "(".repeat(n), ")".repeat(n));
        let ifs = |n| format!("{}{{{{ 1 }}}}{}", "{% if 1 %}".repeat(n), "{% endif %}".repeat(n));
        let elifs = |n| format!("{{% if 0 %}}{}{{{{ 1 }}}}{{% endif %}}", "{%elif 0%}".repeat(n));
        for (made, most) in [(&brackets as &dyn Fn(usize) -> String, 126), (&ifs, 126), (&elifs, 125)] {
            assert_eq!(check(&made(most)), Ok(()), "{most}");
            assert_eq!(check(&made(most + 1)), Err("is nested too deep".into()), "{most}");
        }
        for nest in ["not ", "- ", "1 if 0 else ", "[", "f("] {
            assert!(check(&format!("{{{{ {} }}}}", nest.repeat(140))).is_err(), "{nest}");
        }
        assert!(check(&format!("{{{{ f{} }}}}", "()".repeat(140))).is_err());
    }

    #[test]
    fn what_stands_side_by_side_is_not_nested() {
        let blocks =
            ["{% if not a %}{% endif %}", "{% set a %}{% endset %}", "{% set a = -1 %}", "{{ f(1)[2] }}", "{# ((( #}"];
        for side in blocks.iter().chain(&["{% raw %}{{ (((( {% endraw %}", "{% generation %}{% endgeneration %}"]) {
            assert_eq!(check(&side.repeat(500)), Ok(()), "{side}");
        }
        assert_eq!(check(&format!("{{{{ '{}' }}}}", "((--+|.".repeat(500))), Ok(()));
        assert_eq!(check(&format!("{{{{ {{{}}} }}}}", "'a': (1), ".repeat(500))), Ok(()));
    }

    #[test]
    fn chains_are_short() {
        for link in ["+1", "|e", ".a", " or 0", " is a", "~ 'a'", "[0]"] {
            let chain = |n| format!("{{{{ a{} }}}}", link.repeat(n));
            assert_eq!(check(&chain(200)), Ok(()), "{link}");
            assert!(check(&chain(600)).unwrap_err().contains("operators"), "{link}");
        }
    }
}

//! Front matter, written.

/// Words that YAML 1.1, which the hub's readers follow, takes for something else than text.
const RESERVED: [&str; 9] = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];

/// A text as a YAML scalar: plain where that is safe, else in double quotes, as JSON has it.
pub(super) fn scalar(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "._/-".contains(c))
        && !RESERVED.contains(&text.to_lowercase().as_str());
    if plain { text.into() } else { serde_json::Value::from(text).to_string() }
}

/// A mapping under construction, between its two lines of dashes.
pub(super) struct FrontMatterText(String);

impl FrontMatterText {
    pub fn new() -> Self {
        FrontMatterText("---\n".into())
    }

    /// A key with one value, or a list of several; without values nothing.
    pub fn set<S: AsRef<str>>(&mut self, key: &str, values: &[S]) {
        match values {
            [] => (),
            [one] => self.0.push_str(&format!("{key}: {}\n", scalar(one.as_ref()))),
            _ => self.list(key, values),
        }
    }

    /// A key with a list, also of one.
    pub fn list<S: AsRef<str>>(&mut self, key: &str, values: &[S]) {
        if !values.is_empty() {
            self.0.push_str(&format!("{key}:\n"));
        }
        values.iter().for_each(|value| self.0.push_str(&format!("- {}\n", scalar(value.as_ref()))));
    }

    pub fn end(mut self) -> String {
        self.0.push_str("---\n");
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::FrontMatter;

    /// What is written reads back, whatever it is; the language `no` stays a text for readers of YAML 1.1 too.
    #[test]
    fn scalars_survive() {
        let texts = [
            "apache-2.0",
            "no",
            "1.10",
            "a: b",
            "# c",
            "it's \"x\"\\",
            "tab\tline\nend",
            "日本語",
            "-",
            "~",
            "[a]",
            " x",
        ];
        let mut front = FrontMatterText::new();
        front.list("values", &texts);
        front.set("one", &["NO"]);
        front.set::<&str>("none", &[]);
        let text = front.end();
        assert!(
            text.contains("- \"no\"\n") && text.contains("one: \"NO\"\n") && text.contains("- apache-2.0\n"),
            "{text}"
        );
        let read = FrontMatter::parse(&text).unwrap().unwrap();
        // The reader trims.
        let want: Vec<String> = texts.iter().map(|t| t.trim().to_string()).collect();
        assert_eq!(read.get("values"), want);
        assert_eq!(read.get("none"), [""; 0]);
    }
}

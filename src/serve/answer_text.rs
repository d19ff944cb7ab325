//! From a model's tokens to the text of its answer.

/// Text that grows by bytes of tokens. Characters are handed out whole, and nothing is that may become a stop string.
pub struct AnswerText {
    stops: Vec<String>,
    /// The beginning of a character.
    bytes: Vec<u8>,
    /// Text that may become a stop string.
    held: String,
    /// The vocabulary puts a space in front of the first word.
    leading_space: bool,
}

impl AnswerText {
    /// `leading_space`: the answer's first space is the vocabulary's, not the model's.
    pub fn new(stops: Vec<String>, leading_space: bool) -> Self {
        AnswerText { stops, bytes: Vec::new(), held: String::new(), leading_space }
    }

    /// Takes the bytes of a token; returns text to hand out, and whether a stop string was met, before which it ends.
    pub fn push(&mut self, bytes: &[u8]) -> (String, bool) {
        self.bytes.extend_from_slice(bytes);
        self.take_characters(false);
        if self.leading_space && !self.held.is_empty() {
            self.leading_space = false;
            if self.held.starts_with(' ') {
                self.held.remove(0);
            }
        }
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            self.bytes.clear();
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What is left at the end of the answer.
    pub fn finish(&mut self) -> String {
        self.take_characters(true);
        std::mem::take(&mut self.held)
    }

    /// Moves whole characters from `bytes` to `held`; what is no UTF-8 becomes U+FFFD, `at_end` half a character too.
    fn take_characters(&mut self, at_end: bool) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut rest = bytes.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => return self.held.push_str(text),
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    self.held.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        None if !at_end => return self.bytes = after.to_vec(),
                        None => return self.held.push('\u{fffd}'),
                        Some(wrong) => {
                            self.held.push('\u{fffd}');
                            rest = &after[wrong..];
                        }
                    }
                }
            }
        }
    }
}

/// Bytes at the end of `text` with which `stop` begins, but not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let ends = stop.char_indices().map(|(at, _)| at).skip(1);
    ends.filter(|&at| text.ends_with(&stop[..at])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &mut AnswerText, tokens: &[&[u8]]) -> (Vec<String>, bool) {
        let mut out = Vec::new();
        for token in tokens {
            let (part, stopped) = text.push(token);
            out.push(part);
            if stopped {
                return (out, true);
            }
        }
        out.push(text.finish());
        (out, false)
    }

    #[test]
    fn characters_come_whole() {
        let mut text = AnswerText::new(vec![], false);
        let (parts, _) = all(&mut text, &[b"a", &[0xe2, 0x98], &[0x85], &[0xff], b"z", &[0xc3]]);
        assert_eq!(parts, ["a", "", "\u{2605}", "\u{fffd}", "z", "", "\u{fffd}"]);
    }

    #[test]
    fn what_may_be_a_stop_string_is_held_back() {
        let mut text = AnswerText::new(vec!["END.".into(), "\n\n".into()], false);
        assert_eq!(all(&mut text, &[b"a E", b"N", b"x E", b"ND. more"]).0, ["a ", "", "ENx ", ""]);
        let mut text = AnswerText::new(vec!["END.".into()], false);
        assert_eq!(all(&mut text, &[b"the EN"]), (vec!["the ".into(), "EN".into()], false));
        let mut text = AnswerText::new(vec!["bc".into(), "b".into()], false);
        assert_eq!(all(&mut text, &[b"abc"]), (vec!["a".into()], true));
    }

    #[test]
    fn a_vocabularys_own_space_is_dropped() {
        let mut text = AnswerText::new(vec![], true);
        assert_eq!(all(&mut text, &[b"", b" A", b" star"]).0, ["", "A", " star", ""]);
        let mut text = AnswerText::new(vec![], true);
        assert_eq!(all(&mut text, &[b"A", b" star"]).0, ["A", " star", ""]);
    }
}

//! A question as the model's own chat template words it, as llama.cpp's tools would.

use minijinja::{Environment, Error, ErrorKind, Value, context};

/// What of a model shapes a prompt.
#[derive(Debug, Clone)]
pub struct Template {
    /// The Jinja source, from `tokenizer.chat_template`.
    pub source: String,
    /// Texts of the special tokens.
    pub bos: String,
    pub eos: String,
    /// Whether the tokenizer itself puts the bos token in front.
    pub adds_bos: bool,
}

/// A template that cannot be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    #[error("the reference's chat template cannot be applied: {0}")]
    Template(String),
    #[error("the reference's chat template drops the user's text")]
    Drops,
}

impl Template {
    /// One user turn with the generation prompt after it. A template that ignores plain strings gets a list of parts.
    ///
    /// # Errors
    /// A template that is no valid Jinja, raises an exception, or leaves the text out.
    pub fn user_turn(&self, text: &str) -> Result<String, PromptError> {
        let fail = |e: Error| PromptError::Template(format!("{e:#}"));
        let mut env = Environment::new();
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_template("chat", &self.source).map_err(fail)?;
        // invariant: added above.
        let template = env.get_template("chat").map_err(fail)?;
        let render = |content: Value| {
            template.render(context! {
                messages => vec![context! { role => "user", content => content }],
                bos_token => self.bos,
                eos_token => self.eos,
                add_generation_prompt => true,
                enable_thinking => true,
            })
        };
        let mut prompt = render(Value::from(text));
        if !prompt.as_ref().is_ok_and(|p| p.contains(text)) {
            let parts = vec![context! { type => "text", text => text }];
            let second = render(Value::from(parts));
            // A template that fails on both is reported with what it says to a plain string.
            if prompt.is_ok() || second.is_ok() {
                prompt = second;
            }
        }
        let prompt = prompt.map_err(fail)?;
        // Some templates strip the text; what is left of it must be there.
        if !prompt.contains(text.trim()) {
            return Err(PromptError::Drops);
        }
        Ok(match prompt.strip_prefix(&self.bos) {
            Some(rest) if self.adds_bos && !self.bos.is_empty() => rest.to_owned(),
            _ => prompt,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(source: &str, adds_bos: bool) -> Result<String, PromptError> {
        Template { source: source.into(), bos: "<s>".into(), eos: "</s>".into(), adds_bos }.user_turn("Hi?")
    }

    #[test]
    fn plain_strings_and_parts() {
        let chatml = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        assert_eq!(turn(chatml, false).unwrap(), "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n");
        let parts = "{{ bos_token }}{% for m in messages %}{% for c in m.content | selectattr('type', 'equalto', 'text') %}\
                     U:{{ c['text'].strip() }}{% endfor %}{% endfor %}";
        assert_eq!(turn(parts, true).unwrap(), "U:Hi?");
        assert_eq!(turn(parts, false).unwrap(), "<s>U:Hi?");
    }

    #[test]
    fn faults_are_errors() {
        assert!(matches!(turn("{% for %}", false), Err(PromptError::Template(_))));
        assert!(matches!(turn("no text", false), Err(PromptError::Drops)));
        assert!(turn("{{ raise_exception('only tools') }}", false).unwrap_err().to_string().contains("only tools"));
    }
}

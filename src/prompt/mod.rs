//! Chat templates: which one a checkpoint has ([`lookup`]), what it makes of a conversation, and how it is put so that
//! llama.cpp makes the same of it ([`gguf`]). Calibration, evaluation and the GGUF's own template all come through here.
mod engine;
pub mod gguf;
mod lookup;
mod python;

use minijinja::{Environment, Value};
use serde_json::json;
use std::ops::Range;
use std::path::PathBuf;

/// A part of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Text(String),
    /// The place of the conversation's next picture.
    Image,
}

/// What one side says in one turn. `role` is spelled as templates spell it: `system`, `user`, `assistant`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub role: String,
    pub parts: Vec<Part>,
}

impl Message {
    /// A turn of text with `images` pictures before it.
    pub fn new(role: &str, images: usize, text: &str) -> Self {
        let mut parts = vec![Part::Image; images];
        parts.push(Part::Text(text.into()));
        Message { role: role.into(), parts }
    }

    /// All of its text.
    pub fn text(&self) -> String {
        self.parts.iter().map(|p| if let Part::Text(text) = p { text.as_str() } else { "" }).collect()
    }

    /// The message as a template sees it; as one string, pictures are `image` in their places.
    fn value(&self, form: Form, image: &str) -> serde_json::Value {
        match form {
            Form::Parts => {
                let part = |part: &Part| match part {
                    Part::Text(text) => json!({"type": "text", "text": text}),
                    Part::Image => json!({"type": "image"}),
                };
                json!({"role": self.role, "content": self.parts.iter().map(part).collect::<Vec<_>>()})
            }
            Form::Text => {
                let part = |part: &Part| match part {
                    Part::Text(text) => text.clone(),
                    Part::Image => image.to_string(),
                };
                json!({"role": self.role, "content": self.parts.iter().map(part).collect::<String>()})
            }
        }
    }
}

/// How a template wants the contents of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Lists of typed parts, as transformers' processors pass them.
    Parts,
    /// Strings, as transformers' tokenizers and llama.cpp pass them.
    Text,
}

impl Form {
    fn other(self) -> Self {
        match self {
            Form::Parts => Form::Text,
            Form::Text => Form::Parts,
        }
    }
}

/// A chat template that cannot be found or applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
    #[error("the chat template cannot be applied: {0}")]
    Template(String),
    #[error("the chat template drops the {0}'s text")]
    Drops(String),
    #[error("the chat template rewrites earlier answers: their tokens cannot be told from the prompt's")]
    Rewrites,
}

/// What else shapes a prompt, beside the template's source.
#[derive(Debug, Clone, Default)]
pub struct Context {
    /// What a template can name beside the messages: `bos_token`, `eos_token`, `tools`, ...
    pub variables: serde_json::Map<String, serde_json::Value>,
    /// Whether the tokenizer itself puts the bos token in front.
    pub adds_bos: bool,
    /// What stands for a picture in contents that are strings.
    pub image: String,
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    context: Context,
    form: Form,
    env: Environment<'static>,
}

/// A conversation as text, with the places of the assistant's answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// Bytes of the answers, in order, each with the eos token where that follows at once.
    pub answers: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Compiles `source`. Contents are given in the form `prefer` unless only the other one comes through.
    ///
    /// # Errors
    /// What is not Jinja as transformers takes it, or makes no prompt of a plain question in either form.
    pub fn new(source: String, context: Context, prefer: Form) -> Result<Self, PromptError> {
        let env = engine::compile(&source)?;
        let mut this = ChatTemplate { source, context, form: prefer, env };
        if let Err(error) = this.probe(prefer) {
            // A template that takes neither is reported with what it says to the form that was preferred.
            this.probe(prefer.other()).map_err(|_| error)?;
            this.form = prefer.other();
        }
        Ok(this)
    }

    /// Whether the text of a question given in `form` comes out as it went in.
    fn probe(&self, form: Form) -> Result<(), PromptError> {
        const TEXT: &str = "What is it?";
        let mut message = Message::new("user", 0, TEXT).value(form, "");
        if let Some(part) = message["content"].get_mut(0) {
            // Shows where a template prints the list itself.
            part["mark"] = "printed whole".into();
        }
        let text = self.apply(json!([message]), true)?;
        let taken = text.contains(TEXT) && !text.contains("printed whole");
        if taken { Ok(()) } else { Err(PromptError::Drops("user".into())) }
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The bos token's text; empty where there is none.
    pub fn bos(&self) -> &str {
        self.variable("bos_token")
    }

    fn variable(&self, name: &str) -> &str {
        self.context.variables.get(name).and_then(serde_json::Value::as_str).unwrap_or_default()
    }

    /// The form in which it takes contents.
    pub fn form(&self) -> Form {
        self.form
    }

    fn apply(&self, messages: serde_json::Value, add_generation_prompt: bool) -> Result<String, PromptError> {
        let mut values = self.context.variables.clone();
        values.insert("messages".into(), messages);
        values.insert("add_generation_prompt".into(), add_generation_prompt.into());
        engine::render(&self.env, &Value::from_serialize(values))
    }

    /// The conversation as text; with `add_generation_prompt` the assistant's next turn is opened.
    ///
    /// # Errors
    /// The template raises an exception, works or writes without end, or leaves a user's or an assistant's words out.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, PromptError> {
        let values: Vec<_> = messages.iter().map(|m| m.value(self.form, &self.context.image)).collect();
        let text = self.apply(values.into(), add_generation_prompt)?;
        for message in messages.iter().filter(|m| m.role == "user") {
            // Some templates strip the text; what is left of it must be there.
            if !text.contains(message.text().trim()) && !lone(message) {
                return Err(PromptError::Drops(message.role.clone()));
            }
        }
        Ok(text)
    }

    /// The prompt for the assistant's next turn, without the bos token where the tokenizer adds it.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn prompt(&self, messages: &[Message]) -> Result<String, PromptError> {
        let prompt = self.render(messages, true)?;
        Ok(match prompt.strip_prefix(self.bos()) {
            Some(rest) if self.context.adds_bos => rest.to_owned(),
            _ => prompt,
        })
    }

    /// The prompt for the assistant's next turn, as [`Self::prompt`] gives it, and where in it the earlier answers stand.
    ///
    /// A template may word an answer that is given otherwise than it opens the turn of one that is awaited (the published
    /// LLaVA-OneVision one does), so that the places are found by a second rendering with marks for the answers.
    ///
    /// # Errors
    /// As [`Self::render`]; the template leaves earlier answers out, or rewrites them.
    pub fn conversation(&self, messages: &[Message]) -> Result<Rendered, PromptError> {
        let text = self.prompt(messages)?;
        let mark = |turn: usize| format!("\u{e000}{turn}\u{e001}");
        let mut marked = messages.to_vec();
        let turns: Vec<usize> = (0..messages.len()).filter(|&i| messages[i].role == "assistant").collect();
        turns.iter().for_each(|&i| marked[i].parts = vec![Part::Text(mark(i))]);
        let marked = self.prompt(&marked)?;
        let eos = self.variable("eos_token");
        let (mut rest, mut joined, mut answers) = (marked.as_str(), String::new(), Vec::new());
        for i in turns {
            let (before, after) = rest.split_once(&mark(i)).ok_or(PromptError::Drops("assistant".into()))?;
            joined += before;
            let start = joined.len();
            // Some templates strip the words.
            let words = messages[i].text();
            let whole = text.get(start..).is_some_and(|t| t.starts_with(&words));
            joined += if whole { &words } else { words.trim() };
            answers.push(start..joined.len() + if after.starts_with(eos) { eos.len() } else { 0 });
            rest = after;
        }
        if joined + rest != text {
            return Err(PromptError::Rewrites);
        }
        Ok(Rendered { text, answers })
    }
}

/// Whether text is spread over several parts, between which a template may put something.
fn lone(message: &Message) -> bool {
    message.parts.iter().filter(|p| matches!(p, Part::Text(_))).count() > 1
}

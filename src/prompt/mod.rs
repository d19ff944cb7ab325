//! Chat templates: which one a checkpoint has (`lookup`), what it makes of a conversation, and how it is put so that
//! llama.cpp makes the same of it ([`gguf`]). Calibration, evaluation and the GGUF's own template all come through here.
mod engine;
pub mod gguf;
mod kept;
mod lookup;
mod nested;
mod python;

use minijinja::Value;
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

impl Part {
    fn value(&self) -> serde_json::Value {
        match self {
            Part::Text(text) => json!({"type": "text", "text": text}),
            Part::Image => json!({"type": "image"}),
        }
    }
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

    /// The message as a template sees it.
    fn value(&self, form: Form, context: &Context) -> serde_json::Value {
        let content = match form {
            Form::Parts if !context.strings => self.parts.iter().map(Part::value).collect(),
            Form::Parts => json!([Part::Text(self.string(context)).value()]),
            Form::Text => self.string(context).into(),
        };
        json!({"role": self.role, "content": content})
    }

    /// The parts in one string, with the context's text for pictures.
    fn string(&self, context: &Context) -> String {
        let mut out = String::new();
        let mut behind_image = false;
        for part in &self.parts {
            match part {
                Part::Image => out += &context.image,
                Part::Text(text) => {
                    out += if behind_image { &context.behind_image } else { "" };
                    out += text;
                }
            }
            behind_image = *part == Part::Image;
        }
        out
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

/// Who ends the line behind a picture in a prompt of strings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineEnd {
    /// Text may follow at once.
    Nobody,
    /// The runtime, between pictures and the text behind them.
    Runtime,
    /// The template, behind each picture: the runtime does not.
    Template,
}

/// What a family's chat template writes for a picture, and what of it the runtime writes itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureText {
    /// The text in the prompt; none: the picture token that the checkpoint's files name.
    pub text: Option<&'static str>,
    pub line_end: LineEnd,
}

impl PictureText {
    pub const LLAVA: PictureText = PictureText { text: None, line_end: LineEnd::Runtime };
    /// Upstream's `mlp`, behind whose pictures the runtime writes nothing.
    pub const LLAVA_1_5: PictureText = PictureText { text: None, line_end: LineEnd::Nobody };
    /// The same of LLaVA's own layout, in whose prompts the line ends behind each picture.
    pub const LLAVA_ORIGINAL: PictureText = PictureText { text: None, line_end: LineEnd::Template };
    /// The runtime writes what stands around it and its tiles.
    pub const IDEFICS3: PictureText = PictureText { text: Some("<image>"), line_end: LineEnd::Nobody };
    /// The runtime writes two line ends before and behind it, as transformers' processor does.
    pub const GEMMA3: PictureText = PictureText { text: Some("<start_of_image>"), line_end: LineEnd::Nobody };
    /// The runtime writes the two outer tokens.
    pub const QWEN: PictureText =
        PictureText { text: Some("<|vision_start|><|image_pad|><|vision_end|>"), line_end: LineEnd::Nobody };
    /// Of transformers' repositories; the runtime writes `<img>` and `</img>` around.
    pub const INTERNVL: PictureText = PictureText { text: Some("<IMG_CONTEXT>"), line_end: LineEnd::Template };
    /// Of the original ones.
    pub const INTERNVL_CHAT: PictureText = PictureText { text: Some("<image>"), line_end: LineEnd::Template };
}

/// A chat template that cannot be found or applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
    #[error("the chat template cannot be applied: {0}")]
    Template(String),
    #[error("the chat template {0}: no prompt needs that")]
    Exhausts(String),
    #[error("the chat template drops the {0}'s text")]
    Drops(String),
    #[error("the chat template rewrites earlier answers: their tokens cannot be told from the prompt's")]
    Rewrites,
}

impl PromptError {
    fn exhausts(&self) -> bool {
        matches!(self, PromptError::Exhausts(_))
    }
}

/// What else shapes a prompt, beside the template's source.
#[derive(Debug, Clone, Default)]
pub struct Context {
    /// What a template can name beside the messages: `bos_token`, `eos_token`, `tools`, ...
    pub variables: serde_json::Map<String, serde_json::Value>,
    /// Whether the tokenizer itself puts the bos token in front.
    pub adds_bos: bool,
    /// Contents are strings, as llama.cpp has them: a template that takes only lists gets the string as its one part.
    /// Otherwise they are lists, as transformers' processors have them, but for a template that takes only strings.
    pub strings: bool,
    /// What stands for a picture in contents that are strings.
    pub image: String,
    /// What stands there between pictures and the text behind them.
    pub behind_image: String,
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    context: Context,
    form: Form,
    compiled: engine::Compiled,
}

/// A conversation as text, with the places of the assistant's answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// Bytes of the answers, in order, each with the eos token where that follows at once.
    pub answers: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Compiles `source`, and finds the form in which it takes contents.
    ///
    /// # Errors
    /// What is not Jinja as transformers takes it, or makes no prompt of a plain question in either form.
    pub fn new(source: String, context: Context) -> Result<Self, PromptError> {
        let compiled = engine::compile(&source)?;
        let prefer = if context.strings { Form::Text } else { Form::Parts };
        let mut this = ChatTemplate { source, context, form: prefer, compiled };
        if let Err(error) = this.probe(prefer) {
            if error.exhausts() {
                return Err(error);
            }
            // A template that takes neither is reported with what it says to the form that was preferred.
            this.probe(prefer.other()).map_err(|other| if other.exhausts() { other } else { error })?;
            this.form = prefer.other();
        }
        Ok(this)
    }

    /// Whether the text of a question given in `form` comes out as it went in.
    fn probe(&self, form: Form) -> Result<(), PromptError> {
        const TEXT: &str = "What is it?";
        let mut message = Message::new("user", 0, TEXT).value(form, &self.context);
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
        engine::render(&self.compiled, Value::from_serialize(values))
    }

    /// The conversation as text; with `add_generation_prompt` the assistant's next turn is opened.
    ///
    /// # Errors
    /// The template raises an exception, works or writes without end, or leaves a user's words out.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, PromptError> {
        let given = |form: &dyn Fn(&Message) -> Form| -> Result<String, PromptError> {
            let values: Vec<_> = messages.iter().map(|m| m.value(form(m), &self.context)).collect();
            self.apply(values.into(), add_generation_prompt)
        };
        let text = given(&|_| self.form).or_else(|error| {
            if self.form == Form::Text || error.exhausts() {
                return Err(error);
            }
            // A template may take lists from users and want a string from the system (InternVL3's does).
            given(&|m| if m.parts.contains(&Part::Image) { Form::Parts } else { Form::Text }).map_err(|_| error)
        })?;
        for message in messages.iter().filter(|m| m.role == "user") {
            // Some templates strip the text; what is left of it must be there.
            let taken = |part: &Part| if let Part::Text(words) = part { text.contains(words.trim()) } else { true };
            if !message.parts.iter().all(taken) {
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

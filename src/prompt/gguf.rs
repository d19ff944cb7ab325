//! The chat template that goes into a GGUF: the checkpoint's own, where llama.cpp makes the same prompts of it.
//!
//! llama.cpp gives a template every message's content as one string in which its media mark stands for each picture;
//! to templates that leave strings out it gives a list with that string as its one text part. It never passes parts of
//! type `image`. A template that places pictures by such parts therefore gets a head that makes them of the string, and
//! a foot that puts the mark where the template wrote its own. What follows a picture in the GGUF's prompt is the
//! runtime's to complete: for LLaVA-OneVision a line end, unless the prompt has it.
use super::{ChatTemplate, Context, Form, LineEnd, Message, PictureText, PromptError, lookup};
use std::path::Path;

/// llama.cpp's mark for a picture.
pub const MARK: &str = "<__media__>";

/// A template, and what the user should know about it.
#[derive(Debug, Clone)]
pub struct Adapted {
    pub source: String,
    pub note: Option<String>,
}

/// Makes typed parts of the strings that llama.cpp passes. Some of its programs put a number of their own into the mark
/// (`<__media_17__>`), so that it is taken from the string. `WHICH` says which strings; contents that are lists stay.
const HEAD: &str = "\
{#- Message contents that are strings become lists of parts: llama.cpp marks pictures inside of strings. -#}\n\
{%- set picture = namespace(mark='', messages=[]) -%}\n\
{%- for message in messages -%}\n\
  {%- set turn = namespace(message=message) -%}\n\
  {%- if message['content'] is string and (WHICH) -%}\n\
    {%- set made = namespace(parts=[], text='') -%}\n\
    {%- for piece in message['content'].split('<__media') -%}\n\
      {%- set made.text = piece -%}\n\
      {%- if not loop.first -%}\n\
        {%- set made.text = '<__media' + piece -%}\n\
        {%- if '__>' in piece -%}\n\
          {%- set picture.mark = '<__media' + piece.split('__>')[0] + '__>' -%}\n\
          {%- set made.parts = made.parts + [{'type': 'image'}] -%}\n\
          {%- set made.text = piece.split('__>', 1)[1] -%}\n\
        {%- endif -%}\n\
      {%- endif -%}\n\
      {%- if made.text -%}\n\
        {%- set made.parts = made.parts + [{'type': 'text', 'text': made.text}] -%}\n\
      {%- endif -%}\n\
    {%- endfor -%}\n\
    {%- if not made.parts -%}\n\
      {%- set made.parts = [{'type': 'text', 'text': ''}] -%}\n\
    {%- endif -%}\n\
    {%- set turn.message = dict(message, content=made.parts) -%}\n\
  {%- endif -%}\n\
  {%- set picture.messages = picture.messages + [turn.message] -%}\n\
{%- endfor -%}\n\
{%- set messages = picture.messages -%}\n\
{%- set prompt -%}\n{{ '' }}";

/// The template behind [`HEAD`]; `image` is what it writes for a picture.
fn wrap(original: &ChatTemplate, image: &str) -> String {
    let source = original.source();
    // Without a picture a template that takes strings has them.
    let which = if original.probe(Form::Text).is_ok() { "'<__media' in message['content']" } else { "true" };
    let head = HEAD.replace("WHICH", which);
    // Jinja drops one line end at a template's end, which is not this one's end any more.
    let source = source.strip_suffix('\n').unwrap_or(source);
    let image = image.replace('\\', "\\\\").replace('\'', "\\'").replace('\n', "\\n");
    format!(
        "{head}{source}{{{{ '' }}}}{{% endset -%}}\n\
         {{{{ prompt | replace('{image}', picture.mark) if picture.mark else prompt }}}}"
    )
}

/// Ends the line behind each picture of llama.cpp's strings, for templates that take strings.
const LINE_ENDS: &str = "\
{#- llama.cpp puts text right behind its marks for pictures: here the next line begins. -#}\n\
{%- set picture = namespace(messages=[]) -%}\n\
{%- for message in messages -%}\n\
  {%- set turn = namespace(message=message) -%}\n\
  {%- if message['content'] is string and '<__media' in message['content'] -%}\n\
    {%- set made = namespace(text='') -%}\n\
    {%- for piece in message['content'].split('<__media') -%}\n\
      {%- if loop.first -%}\n\
        {%- set made.text = piece -%}\n\
      {%- elif '__>' in piece -%}\n\
        {%- set parts = piece.split('__>', 1) -%}\n\
        {%- set end = '' if parts[1].startswith('\\n') else '\\n' -%}\n\
        {%- set made.text = made.text + '<__media' + parts[0] + '__>' + end + parts[1] -%}\n\
      {%- else -%}\n\
        {%- set made.text = made.text + '<__media' + piece -%}\n\
      {%- endif -%}\n\
    {%- endfor -%}\n\
    {%- set turn.message = dict(message, content=made.text) -%}\n\
  {%- endif -%}\n\
  {%- set picture.messages = picture.messages + [turn.message] -%}\n\
{%- endfor -%}\n\
{%- set messages = picture.messages -%}\n\
{{- '' -}}";

/// Conversations that both must word alike: turns, system turns and pictures in several places.
fn conversations() -> Vec<Vec<Message>> {
    let m = Message::new;
    let (system, answer) = (m("system", 0, "Be brief."), m("assistant", 0, "A red star."));
    let (question, picture) = (m("user", 0, "What is it?"), m("user", 1, "What is in the picture?"));
    let two = m("user", 2, "Which is larger?");
    vec![
        vec![question.clone()],
        vec![picture.clone()],
        vec![two.clone()],
        vec![system.clone(), question.clone()],
        vec![system.clone(), picture.clone()],
        vec![picture.clone(), answer.clone(), question.clone()],
        vec![system, question, answer.clone(), two, answer, picture],
    ]
}

/// What the runtime makes of a prompt with marks: for LLaVA-OneVision a line end behind each picture with text behind it.
fn completed(prompt: &str) -> String {
    let mut pieces = prompt.split(MARK);
    let mut out = pieces.next().unwrap_or_default().to_string();
    for piece in pieces {
        out.push_str(MARK);
        if !piece.is_empty() && !piece.starts_with('\n') {
            out.push('\n');
        }
        out.push_str(piece);
    }
    out
}

/// Whether a GGUF file's template may be given to llama.cpp, whose own engine knows no bounds of memory and time.
///
/// # Errors
/// [`PromptError::Exhausts`] alone: what else our engine does not take, llama.cpp's may.
pub fn check(source: &str) -> Result<(), PromptError> {
    let exhausts = |error: PromptError| if error.exhausts() { Err(error) } else { Ok(()) };
    let context = Context { strings: true, image: MARK.into(), ..Context::default() };
    let template = match ChatTemplate::new(source.into(), context) {
        Ok(template) => template,
        Err(error) => return exhausts(error),
    };
    conversations().iter().try_for_each(|messages| template.render(messages, true).map(drop).or_else(exhausts))
}

/// Whether llama.cpp makes of `source` what transformers makes of `original`, `image` standing for a picture.
///
/// # Errors
/// In words: where they differ.
fn same(original: &ChatTemplate, source: &str, image: &str, line_end: LineEnd) -> Result<(), String> {
    let context =
        Context { strings: true, image: MARK.into(), behind_image: String::new(), ..original.context.clone() };
    let runtime = ChatTemplate::new(source.into(), context).map_err(|e| e.to_string())?;
    for messages in conversations() {
        for add in [false, true] {
            // What transformers cannot word (two users in a row, say) need not be worded.
            let Ok(want) = original.render(&messages, add) else { continue };
            let want = want.replace(image, MARK);
            let got = runtime.render(&messages, add).map_err(|e| e.to_string())?;
            let got = if line_end == LineEnd::Runtime { completed(&got) } else { got };
            if got != want {
                return Err(format!("{got:?}, not {want:?}"));
            }
        }
    }
    Ok(())
}

/// The template of the checkpoint in `dir` for a GGUF, or `other` where it has none. `picture` is what it writes for one.
///
/// # Errors
/// A template file that cannot be read.
pub fn read(dir: &Path, picture: PictureText, other: Option<&str>) -> Result<Option<Adapted>, PromptError> {
    let own = lookup::source(dir)?;
    let is_other = own.is_none();
    let Some(source) = own.or_else(|| other.map(String::from)) else { return Ok(None) };
    let mut adapted = match ChatTemplate::of(dir, source.clone(), picture) {
        Ok(original) => {
            let image = &original.context.image;
            let image = if picture.line_end == LineEnd::Template { image.trim_end_matches('\n') } else { image };
            adapt(&original, image, picture.line_end)
        }
        Err(problem) => Adapted { source, note: Some(format!("{problem}; it is in the file as it is")) },
    };
    if is_other {
        let note = adapted.note.map(|note| format!("; {note}")).unwrap_or_default();
        adapted.note = Some(format!("the checkpoint has no chat template: llava-hf's for such models is taken{note}"));
    }
    Ok(Some(adapted))
}

/// The template as it is where llama.cpp words conversations with it as transformers does, else wrapped so that it does.
/// `image` is what it writes for a picture.
pub fn adapt(original: &ChatTemplate, image: &str, line_end: LineEnd) -> Adapted {
    let source = original.source().to_owned();
    if same(original, &source, image, line_end).is_ok() {
        return Adapted { source, note: None };
    }
    let ended = format!("{LINE_ENDS}{source}");
    if line_end == LineEnd::Template && original.form() == Form::Text && same(original, &ended, image, line_end).is_ok()
    {
        let note =
            "llama.cpp puts text right behind a picture: lines in front of the chat template begin the next line there";
        return Adapted { source: ended, note: Some(note.into()) };
    }
    let wrapped = wrap(original, image);
    match same(original, &wrapped, image, line_end) {
        Ok(()) => Adapted {
            source: wrapped,
            note: Some(
                "the chat template places pictures by parts, which llama.cpp does not pass: lines in front of it make \
                 them of llama.cpp's strings, and the prompts are transformers'"
                    .into(),
            ),
        },
        Err(difference) => Adapted {
            source,
            note: Some(format!("llama.cpp words prompts otherwise than transformers: {difference}; check the answers")),
        },
    }
}

//! The chat template that goes into the GGUF.
use super::GgufError;
use super::vocab::optional_json;
use crate::checkpoint::Checkpoint;
use serde_json::Value;

/// A template, and what the user should know about it.
pub(super) struct Template {
    pub text: String,
    pub note: Option<String>,
}

/// Turns of the published llava-hf template, for message contents that are one string in which the picture stands
/// as llama.cpp's media marker. That template writes a picture as `<image>` before the text and a line end behind it;
/// the runtime inserts that line end with the picture.
const PICTURE_FIRST: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}\
    {% if message['role'] != 'assistant' and not message['content'].startswith('<__media') %}{{ '\\n' }}{% endif %}\
    {{ message['content'] }}{{ '<|im_end|>' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// The processor's template, else the tokenizer's.
///
/// # Errors
/// A template file that cannot be read.
pub(super) fn read(checkpoint: &Checkpoint) -> Result<Option<Template>, GgufError> {
    let path = checkpoint.dir().join("chat_template.jinja");
    let file = if path.exists() {
        Some(std::fs::read_to_string(&path).map_err(|source| GgufError::Read { path, source })?)
    } else {
        None
    };
    let text = file.or_else(|| {
        ["chat_template.json", "processor_config.json", "tokenizer_config.json"].iter().find_map(|file| {
            match optional_json(checkpoint.dir(), file).get("chat_template")? {
                Value::String(text) => Some(text.clone()),
                // Several named templates.
                Value::Array(list) => list
                    .iter()
                    .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
                    .and_then(|t| Some(t.get("template")?.as_str()?.to_string())),
                _ => None,
            }
        })
    });
    Ok(text.map(adapt))
}

/// llama.cpp gives a template the content as one string, with a marker where the picture is.
fn adapt(text: String) -> Template {
    let compact: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    let takes_strings = compact.contains("content']isstring") || compact.contains(".contentisstring");
    if compact.contains("selectattr('type','equalto','image')") && !takes_strings {
        return Template { text: PICTURE_FIRST.into(), note: None };
    }
    let note = (!takes_strings && compact.contains("['type']")).then(|| {
        "the chat template takes message contents only as lists of parts; check the prompt that the runtime makes of it"
            .into()
    });
    Template { text, note }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::{Environment, context};

    fn render(template: &str, content: &str) -> String {
        let messages = vec![context! { role => "user", content => content }];
        let mut env = Environment::new();
        // `startswith`, which Python strings have and llama.cpp's engine knows.
        env.set_unknown_method_callback(|_, value, method, args| match method {
            "startswith" => {
                let prefix = args[0].as_str().unwrap_or_default();
                Ok(value.as_str().unwrap_or_default().starts_with(prefix).into())
            }
            _ => Err(minijinja::ErrorKind::UnknownMethod.into()),
        });
        env.render_str(template, context! { messages, add_generation_prompt => true }).unwrap()
    }

    #[test]
    fn the_published_template_is_replaced_by_one_for_strings() {
        let published = "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}";
        let t = adapt(published.into());
        // The processor's own prompt, with the marker and the runtime's line end for `<image>\n`.
        assert_eq!(
            render(&t.text, "<__media__>What is this?"),
            "<|im_start|>user <__media__>What is this?<|im_end|><|im_start|>assistant\n"
        );
        assert_eq!(render(&t.text, "Hello"), "<|im_start|>user \nHello<|im_end|><|im_start|>assistant\n");
    }

    #[test]
    fn templates_that_take_strings_stay() {
        let text = "{% if m['content'] is string %}{{ m['content'] }}{% endif %}";
        let t = adapt(text.into());
        assert_eq!((t.text.as_str(), t.note), (text, None));
        assert!(adapt("{% for c in m['content'] %}{% if c['type'] == 'image' %}".into()).note.is_some());
    }
}

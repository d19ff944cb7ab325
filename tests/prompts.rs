//! Prompts as transformers words them (tests/golden/prompts.json), by this program and by llama.cpp from the template
//! that goes into the GGUF.
mod common;

use common::{root, runtime_dir};
use mbq_convert::prompt::gguf::{self, MARK, adapt};
use mbq_convert::prompt::{ChatTemplate, Context, Form, LineEnd, Message, Part};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

fn goldens() -> Value {
    serde_json::from_slice(&std::fs::read(root().join("tests/golden/prompts.json")).unwrap()).unwrap()
}

fn context(golden: &Value, image: &str) -> Context {
    let mut variables = golden["special"].as_object().unwrap().clone();
    variables.extend(["tools", "documents"].map(|name| (name.to_string(), Value::Null)));
    Context { variables, adds_bos: false, strings: false, image: image.into(), behind_image: "\n".into() }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// The goldens' conversations, and whether the assistant's turn is opened.
fn talks(golden: &Value) -> Vec<(Vec<Message>, bool)> {
    let part = |v: &Value| v.as_str().map_or(Part::Image, |text| Part::Text(text.into()));
    let turn = |t: &Value| Message {
        role: text(&t["role"]).into(),
        parts: t["parts"].as_array().unwrap().iter().map(part).collect(),
    };
    let talk = |v: &Value| (v[0].as_array().unwrap().iter().map(turn).collect(), v[1].as_bool().unwrap());
    golden["talks"].as_array().unwrap().iter().map(talk).collect()
}

#[test]
fn published_templates_give_transformers_prompts() {
    let golden = goldens();
    let mut compared = 0;
    for t in golden["templates"].as_array().unwrap() {
        let name = text(&t["name"]);
        let template = ChatTemplate::new(text(&t["source"]).into(), context(&golden, text(&t["image"])));
        let prompts = t["prompts"].as_array().unwrap();
        let Ok(template) = template else {
            assert!(prompts.iter().all(Value::is_null), "{name}: {}", template.unwrap_err());
            continue;
        };
        assert_eq!(template.form() == Form::Parts, t["form"] == "parts", "{name}");
        for ((messages, generate), want) in talks(&golden).iter().zip(prompts) {
            let got = template.render(messages, *generate);
            assert_eq!(got.as_deref().ok(), want.as_str(), "{name}: {messages:?}: {got:?}");
            compared += 1;
        }
    }
    assert!(compared > 150, "{compared}");
}

#[test]
fn constructs_give_what_jinja2_gives() {
    let golden = goldens();
    let talks = talks(&golden);
    for pair in golden["constructs"].as_array().unwrap() {
        // A template is tried with one message, whose words it must repeat; a line end behind a block is dropped.
        let source = text(&pair[0]);
        let source = format!(
            "{{% if messages | length > 1 %}}\n{}{{% endif %}}{{{{ '\\t\\t' + messages[-1].content[0].text }}}}",
            source.strip_suffix('\n').unwrap_or(source)
        );
        let template = ChatTemplate::new(source, context(&golden, "<image>")).unwrap();
        let got = template.render(&talks[3].0, true);
        let got = got.as_deref().map(|text| text.rsplit_once("\t\t").unwrap().0);
        assert_eq!(got.ok(), pair[1].as_str(), "{}: {got:?}", pair[0]);
    }
}

/// The content that llama.cpp's tools pass: one string with their mark for each picture.
fn string(message: &Message) -> Value {
    let part = |part: &Part| if let Part::Text(text) = part { text.clone() } else { MARK.into() };
    json!({"role": message.role, "content": message.parts.iter().map(part).collect::<String>()})
}

/// A line end behind each picture that text follows, as the runtime puts it for LLaVA-OneVision.
fn completed(prompt: &str) -> String {
    let mut pieces = prompt.split(MARK);
    let first = pieces.next().unwrap().to_string();
    pieces.fold(first, |out, piece| {
        let end = if piece.is_empty() || piece.starts_with('\n') { "" } else { "\n" };
        out + MARK + end + piece
    })
}

#[test]
fn llama_cpp_words_them_alike_from_the_gguf() {
    let golden = goldens();
    let Some(runtime) = runtime_dir() else { return };
    let (mut requests, mut wanted) = (Vec::new(), Vec::new());
    for t in golden["templates"].as_array().unwrap() {
        let (name, image) = (text(&t["name"]), text(&t["image"]));
        let Ok(original) = ChatTemplate::new(text(&t["source"]).into(), context(&golden, image)) else {
            continue;
        };
        // The runtime does so for LLaVA-OneVision, whose fine-tunes have text models' templates, which take strings.
        let line_end = t["form"] == "text" || name.contains("onevision") || name.starts_with("template_");
        let adapted = adapt(&original, image, if line_end { LineEnd::Runtime } else { LineEnd::Nobody });
        eprintln!("{name}: {:?}", adapted.note);
        assert!(adapted.note.is_none_or(|note| note.contains("the prompts are transformers'")), "{name}");
        for ((messages, generate), want) in talks(&golden).iter().zip(t["prompts"].as_array().unwrap()) {
            let Some(want) = want.as_str() else { continue };
            let special = &golden["special"];
            requests.push(json!({"source": adapted.source, "bos": special["bos_token"], "eos": special["eos_token"],
                "messages": messages.iter().map(string).collect::<Vec<_>>(), "generate": generate}));
            wanted.push((name, want.replace(image, MARK), line_end));
        }
    }
    let got = llama_prompts(&runtime, &requests);
    assert_eq!(got.len(), wanted.len());
    assert!(got.len() >= 170, "{}", got.len());
    for (got, (name, want, line_end)) in got.iter().zip(&wanted) {
        let got = got.as_str().map(|got| if *line_end { completed(got) } else { got.into() });
        assert_eq!(got.as_ref(), Some(want), "{name}");
    }
}

/// For templates that take strings, where the runtime does not end a picture's line: the template in the GGUF does.
#[test]
fn lines_end_behind_pictures() {
    let golden = goldens();
    let Some(runtime) = runtime_dir() else { return };
    let (mut requests, mut wanted) = (Vec::new(), Vec::new());
    for t in golden["templates"].as_array().unwrap().iter().filter(|t| t["form"] == "text") {
        let mut context = context(&golden, "<image>\n");
        context.behind_image.clear();
        let Ok(original) = ChatTemplate::new(text(&t["source"]).into(), context) else { continue };
        let adapted = adapt(&original, "<image>", LineEnd::Template);
        assert!(adapted.note.is_some_and(|note| note.contains("begin the next line")), "{}", t["name"]);
        for (messages, generate) in talks(&golden) {
            let Ok(want) = original.render(&messages, generate) else { continue };
            let special = &golden["special"];
            requests.push(json!({"source": adapted.source, "bos": special["bos_token"], "eos": special["eos_token"],
                "messages": messages.iter().map(string).collect::<Vec<_>>(), "generate": generate}));
            wanted.push(want.replace("<image>", MARK));
        }
    }
    assert!(wanted.len() >= 20 && wanted.iter().any(|want| want.contains(MARK)), "{}", wanted.len());
    assert_eq!(llama_prompts(&runtime, &requests), wanted);
}

/// What llama.cpp's engine makes of `requests`, through a program compiled against the runtime.
fn llama_prompts(runtime: &Path, requests: &[Value]) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let (list, program) = (folder.path().join("requests.json"), folder.path().join("llama_prompts"));
    std::fs::write(&list, serde_json::to_vec(requests).unwrap()).unwrap();
    let tree = Path::new(env!("OUT_DIR")).join("llama.cpp");
    let output = Command::new("c++")
        .args(["-std=c++17", "-O0", "-w"])
        .args(["common", "include", "ggml/include", "vendor"].map(|dir| format!("-I{}", tree.join(dir).display())))
        .arg(root().join("tests/prompts/llama_prompts.cpp"))
        .arg(format!("-L{}", runtime.display()))
        .arg(format!("-Wl,-rpath,{},--allow-shlib-undefined", runtime.display()))
        .args(["-lllama-common", "-lllama", "-o"])
        .arg(&program)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = Command::new(&program).arg(&list).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn plain(source: &str) -> Result<ChatTemplate, mbq_convert::prompt::PromptError> {
    ChatTemplate::new(source.into(), context(&goldens(), "<image>"))
}

#[test]
fn endless_templates_end() {
    for (source, problem) in [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not come to an end"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "is nested too deep"),
        ("{% set s = 'x' * 1000000 %}{% for a in range(99999) %}{{ s }}{% endfor %}", "writes more than"),
        // llama.cpp is not given them either.
        ("{% set n = namespace(t='a') %}{% for a in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}", "16 MiB"),
    ] {
        for error in [plain(source).unwrap_err(), gguf::check(source).unwrap_err()] {
            assert!(error.to_string().contains(problem), "{error}");
        }
    }
    gguf::check("{% no Jinja that minijinja knows %}").unwrap();
}

#[test]
fn faults_are_errors() {
    let fails = |source: &str| plain(source).unwrap_err().to_string();
    assert!(fails("{% for %}").contains("cannot be applied"));
    assert!(fails("no text").contains("drops the user's text"));
    assert!(fails("{{ raise_exception('only tools') }}").contains("only tools"));
    assert!(fails("{% generation %}").contains("cannot be applied"));
}

#[test]
fn answers_are_found() {
    // The published template opens an awaited answer otherwise than it words a given one, and repeats nothing.
    let golden = goldens();
    let published = |t: &&Value| text(&t["name"]).ends_with("ov-hf/chat_template.quoted.json");
    let source = text(&golden["templates"].as_array().unwrap().iter().find(published).unwrap()["source"]).to_owned();
    let template = plain(&source).unwrap();
    let m = Message::new;
    let talk = [
        m("user", 1, "red"),
        m("assistant", 0, "red"),
        m("user", 0, "And?"),
        m("assistant", 0, "red "),
        m("user", 0, "Red?"),
    ];
    let prompt = template.conversation(&talk).unwrap();
    assert_eq!(
        prompt.text,
        "<|im_start|>user <image>\nred<|im_end|><|im_start|>assistant \nred<|im_end|><|im_start|>user \nAnd?<|im_end|>\
         <|im_start|>assistant \nred <|im_end|><|im_start|>user \nRed?<|im_end|><|im_start|>assistant\n"
    );
    let answers: Vec<&str> = prompt.answers.iter().map(|place| &prompt.text[place.clone()]).collect();
    assert_eq!(answers, ["red<|im_end|>", "red <|im_end|>"]);
    assert_eq!(prompt.answers[0].start, prompt.text.find("\nred<|im_end|><|im_start|>user \nAnd").unwrap() + 1);

    // One that drops earlier answers says so.
    let forgetful = plain("{% for m in messages if m.role == 'user' %}{{ m.content[0].text }}{% endfor %}").unwrap();
    let error = forgetful.conversation(&talk[2..]).unwrap_err().to_string();
    assert!(error.contains("drops the assistant's text"), "{error}");
}

#[test]
fn the_lookup_is_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let write = |file: &str, text: String| {
        let path = dir.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let says = |who: &str| format!("{who} {{{{ messages[0].content[0].text }}}}");
    let found = || match ChatTemplate::read(dir.path()) {
        Ok(template) => template.source().split(' ').next().unwrap().to_owned(),
        Err(e) => e.to_string(),
    };
    assert!(found().contains("no chat template"), "{}", found());
    let named = json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": says("list")}]);
    write("tokenizer_config.json", json!({"chat_template": named, "eos_token": {"content": "</s>"}}).to_string());
    assert_eq!(found(), "list");
    write("tokenizer_config.json", json!({"chat_template": [{"name": "rag", "template": "x"}]}).to_string());
    assert!(found().contains("rag") && found().contains("default"), "{}", found());
    write("additional_chat_templates/rag.jinja", says("rag"));
    assert!(found().contains("chat_template.jinja is missing"), "{}", found());
    write("chat_template.jinja", says("jinja"));
    assert_eq!(found(), "jinja");
    std::fs::remove_dir_all(dir.path().join("additional_chat_templates")).unwrap();
    for (damaged, problem) in [("\"x\"", "no JSON object"), ("{\"template\": \"x\"}", "has no key `chat_template`")] {
        write("chat_template.json", damaged.into());
        assert!(found().contains("chat_template.json") && found().contains(problem), "{}", found());
    }
    write("chat_template.json", json!({"chat_template": says("json")}).to_string());
    assert_eq!(found(), "json");
    write("processor_config.json", json!({"chat_template": says("processor")}).to_string());
    assert_eq!(found(), "processor");
    write("processor_config.json", json!({"image_token": 5}).to_string());
    assert!(found().contains("processor_config.json") && found().contains("`image_token` is no token"), "{}", found());
    write("processor_config.json", "{".into());
    assert!(found().contains("processor_config.json") && found().contains("not valid JSON"), "{}", found());
}

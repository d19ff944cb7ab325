//! `mbq-convert serve`, driven over plain sockets with the demo model.
mod common;

use common::root;
use common::served::{Served, about, demo, picture, program, read, text};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::time::{Duration, Instant};

/// Starts a server, or ends the test where there is no runtime.
macro_rules! serve {
    ($($arg:expr),*) => {
        match Served::start(&[$($arg),*]) {
            Some(served) => served,
            None => return,
        }
    };
}

/// What `chat` answers greedily.
fn chat(image: Option<&str>, question: &str) -> String {
    let mut command = program("chat");
    command.arg(demo().unwrap());
    if let Some(image) = image {
        command.arg("--image").arg(root().join("demo").join(image));
    }
    let output =
        command.args(["-p", question, "--", "--temp", "0", "-n", "32", "-t", "1", "-c", "1024"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Pictures and questions of the demo.
fn questions() -> Vec<(String, String, String)> {
    let text = std::fs::read_to_string(root().join("demo/eval/questions.jsonl")).unwrap();
    let question = |line: &str| {
        let q: Value = serde_json::from_str(line).unwrap();
        let [image, question, answer] = ["image", "question", "answer"].map(|key| q[key].as_str().unwrap().to_owned());
        (format!("eval/{image}"), question, answer)
    };
    text.lines().map(question).collect()
}

/// An answer that goes on to `tokens`, whatever the model says.
fn endless(question: &str, tokens: usize) -> Value {
    let mut body = text(question);
    body["ignore_eos"] = true.into();
    body["max_tokens"] = tokens.into();
    body
}

#[test]
fn answers_are_those_of_chat() {
    let served = serve!();
    for (image, question, _) in &questions()[..6] {
        assert_eq!(served.chat(&about(image, question)).text(), chat(Some(image), question), "{image}");
    }
    let question = "What is a star?";
    assert_eq!(served.chat(&text(question)).text(), chat(None, question));
    let reply = served.chat(&about("pictures/red-star.png", "What is in the picture?")).json();
    assert_eq!(reply["object"], "chat.completion");
    assert_eq!(reply["choices"][0]["message"], json!({"role": "assistant", "content": "a red star", "refusal": null}));
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    let usage = &reply["usage"];
    assert_eq!(
        usage["total_tokens"],
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap()
    );
}

#[test]
fn a_stream_has_the_same_answer_in_events() {
    let served = serve!();
    let mut body = about("pictures/red-star.png", "What is in the picture?");
    let whole = served.chat(&body).json();
    body["stream"] = true.into();
    let plain = served.chat(&body).events();
    body["stream_options"] = json!({"include_usage": true});
    let events = served.chat(&body).events();
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    assert_eq!(plain.len() + 1, events.len(), "the usage is an event of its own");
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let content: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(content, whole["choices"][0]["message"]["content"].as_str().unwrap());
    let [.., end, usage] = chunks.as_slice() else { panic!("{chunks:?}") };
    assert_eq!((&end["choices"][0]["finish_reason"], &end["choices"][0]["delta"]), (&json!("stop"), &json!({})));
    assert_eq!((&usage["choices"], &usage["usage"]["total_tokens"]), (&json!([]), &whole["usage"]["total_tokens"]));
    assert!(chunks.iter().all(|c| c["object"] == "chat.completion.chunk" && c["id"] == chunks[0]["id"]));
}

#[test]
fn four_at_once_answer_as_one_alone() {
    let served = serve!();
    let bodies: Vec<Value> = questions()[..12].iter().map(|(image, question, _)| about(image, question)).collect();
    let mut bodies = bodies;
    bodies.extend((0..4).map(|i| endless(&format!("Tell me of {i} stars."), 100)));
    let alone: Vec<String> = bodies.iter().map(|body| served.chat(body).text()).collect();
    let fresh = serve!();
    let together: Vec<String> = std::thread::scope(|scope| {
        let (fresh, bodies) = (&fresh, &bodies);
        let client = |k: usize| move || bodies[k..].iter().step_by(4).map(|b| fresh.chat(b).text()).collect::<Vec<_>>();
        let clients: Vec<_> = (0..4).map(|k| scope.spawn(client(k))).collect();
        let parts: Vec<Vec<String>> = clients.into_iter().map(|c| c.join().unwrap()).collect();
        (0..bodies.len()).map(|i| parts[i % 4][i / 4].clone()).collect()
    });
    assert_eq!(together, alone);
}

#[test]
fn a_second_turn_reads_only_what_is_new() {
    let served = serve!("--slots", "2");
    let mut body = about("pictures/red-star.png", "What is in the picture?");
    let first = served.chat(&body);
    // Another conversation takes the other slot.
    served.chat(&text("Hello"));
    let messages = body["messages"].as_array_mut().unwrap();
    messages.push(json!({"role": "assistant", "content": first.text()}));
    messages.push(json!({"role": "user", "content": "What color is it?"}));
    let second = served.chat(&body);
    let cached = second.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let before = first.json()["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(cached >= before - 1, "{cached} of {before}");
    let fresh = serve!();
    assert_eq!(second.text(), fresh.chat(&body).text());
    // The same picture behind another text: its embedding is known, its place in the cache is new.
    let content = json!([{"type": "text", "text": "Look."}, picture("pictures/red-star.png"), {"type": "text", "text": "What color is it?"}]);
    let moved = json!({"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8});
    assert_eq!(served.chat(&moved).text(), fresh.chat(&moved).text());
}

#[test]
fn sampling_and_ends_are_as_asked() {
    let served = serve!();
    let mut hot = endless("Tell me of stars.", 40);
    hot["temperature"] = 2.into();
    hot["top_k"] = 0.into();
    hot["seed"] = 7.into();
    let first = served.chat(&hot).text();
    assert_eq!(served.chat(&hot).text(), first, "a seed repeats the answer");
    hot["seed"] = 8.into();
    assert_ne!(served.chat(&hot).text(), first);
    hot["top_k"] = 1.into();
    hot["temperature"] = 1.into();
    let likeliest = served.chat(&hot);
    assert_eq!(likeliest.text(), served.chat(&endless("Tell me of stars.", 40)).text());
    assert_eq!(likeliest.json()["choices"][0]["finish_reason"], "length");
    assert_eq!(likeliest.json()["usage"]["completion_tokens"], 40);
    let mut stopped = about("pictures/red-star.png", "What is in the picture?");
    stopped["stop"] = json!([" star"]);
    // It is not the model's own end that it ends by.
    stopped["ignore_eos"] = true.into();
    let reply = served.chat(&stopped);
    assert_eq!((reply.text().as_str(), &reply.json()["choices"][0]["finish_reason"]), ("a red", &json!("stop")));
}

#[test]
fn a_client_that_leaves_frees_its_slot() {
    let served = serve!("--slots", "1", "--queue", "1");
    let mut body = endless("Tell me of stars.", 3900);
    body["stream"] = true.into();
    let request = served.request("POST", "/v1/chat/completions", &[], body.to_string().as_bytes());
    for _ in 0..3 {
        let mut stream = served.connect();
        stream.write_all(&request).unwrap();
        let mut some = [0; 600];
        stream.read_exact(&mut some).unwrap();
        drop(stream);
    }
    // Without a stream, and while it waits.
    body["stream"] = false.into();
    let request = served.request("POST", "/v1/chat/completions", &[], body.to_string().as_bytes());
    let mut waits = served.connect();
    waits.write_all(&request).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    drop(waits);
    // Four answers of 3900 tokens each would take far longer.
    let mut tries = 0;
    loop {
        let reply = served.chat(&about("pictures/red-star.png", "What is in the picture?"));
        if reply.status == 200 {
            assert_eq!(reply.text(), "a red star");
            break;
        }
        assert_eq!(reply.refusal(), (503, "server_busy".into()));
        tries += 1;
        assert!(tries < 50, "the slot is not freed");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn who_finds_no_place_is_told_to_come_again() {
    let served = serve!("--slots", "1", "--queue", "0");
    let mut body = endless("Tell me of stars.", 3900);
    body["stream"] = true.into();
    let mut busy = served.connect();
    busy.write_all(&served.request("POST", "/v1/chat/completions", &[], body.to_string().as_bytes())).unwrap();
    busy.read_exact(&mut [0; 600]).unwrap();
    let reply = served.chat(&text("Hello"));
    assert_eq!(reply.refusal(), (503, "server_busy".into()));
    assert!(reply.head.to_lowercase().contains("retry-after: "), "{}", reply.head);
    assert_eq!(served.get("/health").status, 200, "other addresses answer");
}

#[cfg(unix)]
#[test]
fn it_ends_with_a_word_to_everybody() {
    let mut served = serve!("--slots", "1");
    let mut body = endless("Tell me of stars.", 3900);
    body["stream"] = true.into();
    let request = served.request("POST", "/v1/chat/completions", &[], body.to_string().as_bytes());
    let mut writing = served.connect();
    writing.write_all(&request).unwrap();
    let mut some = [0; 600];
    writing.read_exact(&mut some).unwrap();
    let mut waiting = served.connect();
    waiting.write_all(&request).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let killed = std::process::Command::new("kill").args(["-TERM", &served.child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let start = Instant::now();
    let status = loop {
        if let Some(status) = served.child.try_wait().unwrap() {
            break status;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(0));
    let mut rest = String::new();
    writing.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("server_stopping") && rest.contains("data: [DONE]") && rest.ends_with("0\r\n\r\n"), "{rest}");
    assert_eq!(read(waiting).refusal(), (503, "server_stopping".into()));
}

#[test]
fn prompts_and_pictures_that_do_not_fit_are_refused() {
    let served = serve!("--context", "256");
    let reply = served.chat(&text(&"word ".repeat(400)));
    assert_eq!(reply.refusal(), (400, "context_length_exceeded".into()));
    let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("256") && message.contains("tokens"), "{message}");
    let long = served.chat(&text(&"word ".repeat(1_000_000)));
    assert_eq!(long.refusal().1, "context_length_exceeded");
    assert!(long.body.contains("at least"), "it is not tokenised to find that out: {}", long.body);
    let filled = served.chat(&endless("Tell me of stars.", 100_000)).json();
    assert_eq!(filled["usage"]["total_tokens"], 256, "an answer ends with the context");
    assert_eq!(filled["choices"][0]["finish_reason"], "length");
    let broken = json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}});
    let body = json!({"messages": [{"role": "user", "content": [broken]}]});
    assert_eq!(served.chat(&body).refusal(), (400, "invalid_image".into()));
    // A header that promises 60000 x 60000 pixels.
    let mut huge = vec![0x42, 0x4d, 0, 0, 0, 0, 0, 0, 0, 0, 54, 0, 0, 0, 40, 0, 0, 0];
    huge.extend(60000u32.to_le_bytes().iter().chain(&60000u32.to_le_bytes()).chain(&[1, 0, 24, 0]));
    huge.resize(54, 0);
    use base64::Engine;
    let url = format!("data:image/bmp;base64,{}", base64::engine::general_purpose::STANDARD.encode(huge));
    let body = json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]});
    assert_eq!(served.chat(&body).refusal(), (400, "invalid_image".into()));
    assert_eq!(served.chat(&text("Hello")).status, 200);
}

#[test]
fn files_are_read_only_where_it_is_allowed() {
    let allowed = root().join("demo/pictures");
    let ask = |served: &Served, url: &str| {
        let image = json!({"type": "image_url", "image_url": {"url": url}});
        let content = json!([image, {"type": "text", "text": "What is in the picture?"}]);
        served.chat(&json!({"messages": [{"role": "user", "content": content}], "temperature": 0}))
    };
    let file = format!("file://{}/red-star.png", allowed.display());
    let served = serve!("--allow-files", allowed.to_str().unwrap());
    assert_eq!(ask(&served, &file).text(), "a red star");
    assert_eq!(ask(&served, "red-star.png").text(), "a red star");
    let outside = ask(&served, "../eval/images/000.png");
    assert_eq!(outside.status, 400);
    assert!(outside.body.contains("not in the folder"), "{}", outside.body);
    assert_eq!(ask(&serve!(), &file).status, 400, "not unless it is allowed");
}

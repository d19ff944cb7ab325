//! What `mbq-convert serve` refuses: other sites, long bodies, what is not OpenAI's protocol, and nonsense.
mod common;

use common::served::{Served, about, text};
use mbq_convert::random::Rng;
use serde_json::{Value, json};
use std::io::Write;

macro_rules! serve {
    ($($arg:expr),*) => {
        match Served::start(&[$($arg),*]) {
            Some(served) => served,
            None => return,
        }
    };
}

const CHAT: &str = "/v1/chat/completions";

#[test]
fn other_names_sites_and_types_are_refused() {
    let served = serve!();
    let body = text("Hello").to_string();
    let post = |headers: &[(&str, &str)]| served.send("POST", CHAT, headers, body.as_bytes());
    assert_eq!(post(&[]).status, 200);
    let own = format!("http://{}", served.address);
    assert_eq!(post(&[("Origin", own.as_str())]).status, 200);
    assert_eq!(post(&[("Origin", "https://evil.example")]).refusal(), (403, "wrong_origin".into()));
    assert_eq!(post(&[("Host", "evil.example")]).refusal(), (403, "wrong_host".into()));
    assert_eq!(served.send("GET", "/v1/models", &[("Host", "evil.example")], b"").refusal().0, 403);
    assert_eq!(served.send("GET", "/", &[("Host", "evil.example:8080")], b"").refusal().0, 403);
    assert_eq!(post(&[("Content-Type", "text/plain")]).refusal(), (415, "unsupported_media_type".into()));
    assert_eq!(post(&[("Content-Type", "application/json; charset=utf-8")]).status, 200);
    for reply in [post(&[]), served.get("/"), served.send("OPTIONS", CHAT, &[("Origin", "https://evil.example")], b"")]
    {
        assert!(!reply.head.to_lowercase().contains("access-control"), "{}", reply.head);
        assert!(reply.head.to_lowercase().contains("x-content-type-options: nosniff"), "{}", reply.head);
    }
    let named = serve!("--allow-host", "box.lan");
    assert_eq!(named.send("GET", "/v1/models", &[("Host", "box.lan")], b"").status, 200);
}

#[test]
fn a_key_is_wanted_where_there_is_one() {
    let served = serve!("--api-key", "secret");
    assert_eq!(served.get("/v1/models").refusal(), (401, "invalid_api_key".into()));
    assert_eq!(served.chat(&text("Hello")).refusal(), (401, "invalid_api_key".into()));
    let with = |key: &str| served.send("GET", "/v1/models", &[("Authorization", key)], b"").status;
    assert_eq!((with("Bearer secret"), with("Bearer Secret"), with("secret")), (200, 401, 401));
    assert_eq!((served.get("/").status, served.get("/health").status), (200, 200), "the page asks for the key");
}

#[test]
fn the_model_and_the_page_are_shown() {
    let served = serve!("--context", "1024");
    let models = served.get("/v1/models").json();
    let model = &models["data"][0];
    assert_eq!((&models["object"], &model["object"], &model["id"]), (&json!("list"), &json!("model"), &json!("model")));
    let meta = &model["meta"];
    assert_eq!(served.get("/v1/models/%ff").refusal().0, 400);
    assert_eq!((&meta["architecture"], &meta["n_ctx"], &meta["slots"]), (&json!("qwen2"), &json!(1024), &json!(4)));
    assert!(meta["size"].as_u64() > Some(100_000) && meta["bits_per_weight"].as_f64() > Some(3.0), "{meta}");
    assert!(meta["types"].as_array().unwrap().contains(&json!("mbq3")), "{meta}");
    assert_eq!(served.get("/v1/models/model").json(), *model);
    assert_eq!(served.get("/v1/models/gpt-4o").refusal(), (404, "model_not_found".into()));
    let page = served.get("/");
    assert!(page.head.contains("default-src 'self'") && page.body.contains("<title>"), "{}", page.head);
    assert_eq!(served.get("/nothing").refusal(), (404, "not_found".into()));
    assert_eq!(served.get("/../Cargo.toml").status, 404);
    assert_eq!(served.get(CHAT).refusal(), (405, "method_not_allowed".into()));
}

#[test]
fn what_is_asked_wrongly_is_refused_with_its_name() {
    let served = serve!();
    let with = |field: &str, value: Value| {
        let mut body = text("Hello");
        body[field] = value;
        let reply = served.chat(&body);
        (reply.refusal().1, reply.json()["error"]["param"].as_str().unwrap_or_default().to_owned())
    };
    for (field, value, code) in [
        ("model", json!("gpt-4o"), "model_not_found"),
        ("tools", json!([{"type": "function"}]), "unsupported_parameter"),
        ("response_format", json!({"type": "json_object"}), "unsupported_parameter"),
        ("n", json!(2), "unsupported_parameter"),
        ("logprobs", json!(true), "unsupported_parameter"),
        ("temprature", json!(1), "unknown_parameter"),
        ("temperature", json!(9), "invalid_value"),
        ("messages", json!([]), "invalid_value"),
    ] {
        assert_eq!(with(field, value), (code.into(), field.into()));
    }
    let systems = json!({"messages": [{"role": "user", "content": "<__media__>"}]});
    assert_eq!(served.chat(&systems).refusal().0, 400);
    let mut accepted = text("Hello");
    accepted["user"] = "me".into();
    accepted["metadata"] = json!({"a": "b"});
    accepted["model"] = "model".into();
    assert_eq!(served.chat(&accepted).status, 200);
}

#[test]
fn long_bodies_are_refused_unread() {
    let served = serve!("--max-body", "1M");
    // 2 GB are announced; none of it is sent, and none is waited for.
    let reply = served.send("POST", CHAT, &[("Content-Length", "2000000000")], b"");
    assert_eq!(reply.refusal(), (413, "request_too_large".into()));
    let mut chunks = Vec::new();
    (0..20).for_each(|_| chunks.extend([b"20000\r\n".as_slice(), &[b' '; 0x20000], b"\r\n"].concat()));
    let mut stream = served.connect();
    let head = served.request("POST", CHAT, &[("Transfer-Encoding", "chunked")], b"");
    stream.write_all(&head).unwrap();
    // It closes before all of it is there.
    let _ = stream.write_all(&chunks);
    let reply = common::served::read(stream);
    assert!(reply.status == 413 || reply.status == 0, "{reply:?}");
    assert_eq!(served.chat(&text("Hello")).status, 200);
}

/// One of several ways to spoil a request.
fn mutated(rng: &mut Rng, served: &Served, valid: &[Value]) -> Vec<u8> {
    let body = valid[rng.below(valid.len())].to_string().into_bytes();
    let path = [CHAT, CHAT, CHAT, CHAT, CHAT, CHAT, "/v1/models", "/%00"][rng.below(8)];
    let method = ["POST", "POST", "POST", "POST", "POST", "POST", "GET", "BREW"][rng.below(8)];
    let mut bytes = match rng.below(3) {
        // The body alone: JSON that is nearly right, with a length that is.
        0 | 1 => {
            let mut body = body;
            (0..1 + rng.below(4)).for_each(|_| spoil(rng, &mut body));
            served.request(method, path, &[], &body)
        }
        // Anything.
        _ => {
            let mut all = served.request(method, path, &[], &body);
            (0..1 + rng.below(6)).for_each(|_| spoil(rng, &mut all));
            all
        }
    };
    if rng.below(8) == 0 {
        bytes.truncate(rng.below(bytes.len().max(1)));
    }
    bytes
}

fn spoil(rng: &mut Rng, bytes: &mut Vec<u8>) {
    const WORDS: [&str; 16] = [
        "null",
        "-1",
        "1e999",
        "\"",
        "{",
        "}",
        "[[[[",
        "\\ud800",
        "\\u0000",
        "\r\n",
        "data:",
        "image_url",
        "messages",
        "\"role\":\"tool\"",
        "99999999999999999999",
        "<__media__>",
    ];
    if bytes.is_empty() {
        return;
    }
    let at = rng.below(bytes.len());
    match rng.below(5) {
        0 => bytes[at] = rng.next_u64() as u8,
        1 => drop(bytes.drain(at..(at + 1 + rng.below(40)).min(bytes.len()))),
        2 => drop(bytes.splice(at..at, WORDS[rng.below(WORDS.len())].bytes())),
        3 => {
            let part = bytes[at..(at + rng.below(200)).min(bytes.len())].to_vec();
            bytes.splice(at..at, part);
        }
        _ => bytes[at] ^= 1 << rng.below(8),
    }
}

/// `MBQ_MUTATIONS` is how many; the server's memory before and after is told.
#[test]
fn nonsense_does_not_end_it() {
    let mut served = serve!("--context", "1024", "--slots", "2");
    let count = std::env::var("MBQ_MUTATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    let mut plain = text("Hello");
    plain["max_tokens"] = 2.into();
    let mut seen = about("pictures/red-star.png", "What is in the picture?");
    seen["max_tokens"] = 2.into();
    let many = json!({"model": "model", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user",
        "content": [{"type": "text", "text": "Hi"}]}], "temperature": 0.5, "top_p": 0.9, "stop": ["a"], "seed": 1,
        "max_completion_tokens": 2, "stream": true, "stream_options": {"include_usage": true}, "user": "x"});
    let valid = [plain, seen.clone(), many];
    let mut rng = Rng::new(1);
    let mut statuses = std::collections::BTreeMap::<u16, usize>::new();
    let warm: Vec<u8> = mutated(&mut Rng::new(2), &served, &valid);
    served.raw(&warm);
    let before = resident(&served);
    for i in 0..count {
        let request = mutated(&mut rng, &served, &valid);
        let mut stream = served.connect();
        let _ = stream.write_all(&request);
        // What is cut off gets no answer while it may go on; an answer that takes longer loses its reader.
        stream.set_read_timeout(Some(std::time::Duration::from_millis(250))).unwrap();
        let reply = common::served::read(stream);
        *statuses.entry(reply.status).or_default() += 1;
        assert!(reply.status < 500, "{i}: {reply:?}: {}", String::from_utf8_lossy(&request));
        assert!(served.child.try_wait().unwrap().is_none(), "{i} ended it: {}", String::from_utf8_lossy(&request));
    }
    eprintln!("{count} requests, by status {statuses:?}; resident {before:?} -> {:?} kB", resident(&served));
    assert_eq!(served.chat(&seen).text(), served.chat(&seen).text());
    seen["max_tokens"] = 32.into();
    assert_eq!(served.chat(&seen).text(), "a red star");
}

/// Kilobytes of memory that the server takes, where the system tells.
fn resident(served: &Served) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", served.child.id())).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Parsed, a list of zeros takes forty times its bytes: it is counted first. Commas in texts are no values.
#[test]
fn a_body_of_too_many_values_is_refused() {
    let served = serve!();
    let mut body = text("Hello");
    body["metadata"] = json!(vec![0; 100_001]);
    let reply = served.chat(&body);
    assert_eq!(reply.status, 400);
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("values"), "{}", reply.json());
    let mut body = text("Hello");
    body["metadata"] = json!({ "note": ",[\\\",{".repeat(50_000) });
    assert_eq!(served.chat(&body).status, 200);
}

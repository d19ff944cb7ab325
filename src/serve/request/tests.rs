use super::*;
use serde_json::json;

fn parse(body: Value) -> Result<ChatRequest, ApiError> {
    let pictures = Pictures { files: None, vision: true };
    ChatRequest::parse(body.to_string().as_bytes(), &pictures)
}

/// A request with more fields.
fn with(more: Value) -> Result<ChatRequest, ApiError> {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    parse(body)
}

fn says(messages: Value) -> Result<ChatRequest, ApiError> {
    parse(json!({"messages": messages}))
}

/// Field and code of a refusal.
fn refused(result: Result<ChatRequest, ApiError>) -> (String, &'static str) {
    let error = result.unwrap_err();
    assert_eq!(error.status.as_u16(), 400);
    (error.param.unwrap_or_default(), error.code.unwrap())
}

#[test]
fn messages_keep_their_order_and_places() {
    let request = says(json!([
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "text", "text": "Which?"},
            {"type": "image_url", "image_url": {"url": "data:;base64,AAEC", "detail": "high"}},
            {"type": "image_url", "image_url": "data:;base64,AAED"},
        ]},
        {"role": "assistant", "content": "This.", "refusal": null, "annotations": [], "tool_calls": [], "audio": null},
        {"role": "user", "content": "Why?", "name": null},
    ]))
    .unwrap();
    let roles: Vec<_> = request.messages.iter().map(|m| m.role.as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user"]);
    assert_eq!(request.messages[1].parts, [Part::Text("Which?".into()), Part::Image, Part::Image]);
    let bytes = |last| PictureSource::Bytes(vec![0, 1, last]);
    assert_eq!(request.pictures, [bytes(2), bytes(3)]);
    assert!(!request.stream && !request.include_usage && request.max_tokens.is_none() && request.stop.is_empty());
}

#[test]
fn fields_are_read() {
    let request = with(json!({
        "model": "", "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.25, "seed": -1, "presence_penalty": -2,
        "frequency_penalty": 1.5, "stop": "\n", "max_tokens": 5, "max_completion_tokens": 7, "stream": true,
        "stream_options": {"include_usage": true, "include_obfuscation": false},
    }))
    .unwrap();
    let want = Sampling {
        temperature: 0.0,
        top_k: 3,
        top_p: 0.5,
        min_p: 0.25,
        presence_penalty: -2.0,
        frequency_penalty: 1.5,
        seed: u64::MAX,
    };
    assert_eq!(request.sampling, want);
    assert_eq!((request.model, request.stop, request.max_tokens), (None, vec!["\n".to_string()], Some(7)));
    assert!(request.stream && request.include_usage);
    assert_eq!(with(json!({"stop": ["a", "b"], "max_tokens": 5})).unwrap().max_tokens, Some(5));
    let usual = with(json!({"seed": null, "temperature": null})).unwrap().sampling;
    assert_eq!(Sampling { seed: 0, ..usual }, Sampling::default());
}

#[test]
fn what_changes_nothing_is_taken() {
    for more in [
        json!({"user": "me", "metadata": {"a": "b"}, "store": false, "service_tier": "auto", "safety_identifier": "x"}),
        json!({"prompt_cache_key": "x", "prediction": {"type": "content"}, "parallel_tool_calls": true}),
        json!({"n": 1, "logprobs": false, "top_logprobs": 0, "logit_bias": {}, "tools": [], "tool_choice": "auto"}),
        json!({"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium", "audio": null}),
    ] {
        assert!(with(more.clone()).is_ok(), "{more}");
    }
}

#[test]
fn what_would_change_the_answer_is_refused_by_name() {
    for (field, value) in [
        ("tools", json!([{"type": "function"}])),
        ("tool_choice", json!("required")),
        ("functions", json!([{}])),
        ("response_format", json!({"type": "json_schema", "json_schema": {}})),
        ("response_format", json!({"type": "json_object"})),
        ("logprobs", json!(true)),
        ("top_logprobs", json!(5)),
        ("logit_bias", json!({"50256": -100})),
        ("modalities", json!(["text", "audio"])),
        ("reasoning_effort", json!("low")),
        ("web_search_options", json!({})),
        ("n", json!(2)),
    ] {
        assert_eq!(refused(with(json!({field: value}))), (field.into(), "unsupported_parameter"));
    }
    assert_eq!(refused(with(json!({"temprature": 0}))), ("temprature".into(), "unknown_parameter"));
}

#[test]
fn values_that_cannot_be_are_refused_by_name() {
    for (field, value) in [
        ("temperature", json!(2.1)),
        ("temperature", json!("hot")),
        ("top_p", json!(-0.1)),
        ("top_k", json!(1.5)),
        ("seed", json!(1e300)),
        ("presence_penalty", json!(3)),
        ("max_tokens", json!(0)),
        ("max_completion_tokens", json!(-1)),
        ("stream", json!("yes")),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!([""])),
        ("stop", json!(7)),
        ("model", json!(1)),
        ("stream_options", json!({"include_usage": true})),
    ] {
        assert_eq!(refused(with(json!({field: value}))), (field.into(), "invalid_value"), "{value}");
    }
    let options = with(json!({"stream": true, "stream_options": {"usage": 1}}));
    assert_eq!(refused(options), ("stream_options.usage".into(), "unknown_parameter"));
}

#[test]
fn messages_that_cannot_be_are_refused_by_their_place() {
    let text = |text: &str| json!([{"role": "user", "content": text}]);
    let parts = |part: Value| json!([{"role": "user", "content": [part]}]);
    for (messages, place, code) in [
        (json!([]), "messages", "invalid_value"),
        (json!("Hi"), "messages", "invalid_value"),
        (json!(["Hi"]), "messages[0]", "invalid_value"),
        (json!([{"content": "Hi"}]), "messages[0].role", "missing_required_parameter"),
        (json!([{"role": "king", "content": "Hi"}]), "messages[0].role", "invalid_value"),
        (json!([{"role": "tool", "content": "Hi"}]), "messages[0].role", "unsupported_parameter"),
        (json!([{"role": "user"}]), "messages[0].content", "missing_required_parameter"),
        (json!([{"role": "user", "content": 7}]), "messages[0].content", "invalid_value"),
        (json!([{"role": "user", "content": []}]), "messages[0].content", "invalid_value"),
        (json!([{"role": "user", "content": "Hi", "name": "Bob"}]), "messages[0].name", "unsupported_parameter"),
        (text("a <__media__> b"), "messages[0].content", "invalid_value"),
        (text("a <__media_7__> b"), "messages[0].content", "invalid_value"),
        (parts(json!({"type": "text"})), "messages[0].content[0].text", "missing_required_parameter"),
        (parts(json!({"type": "video"})), "messages[0].content[0].type", "invalid_value"),
        (parts(json!({"type": "input_audio"})), "messages[0].content[0]", "unsupported_parameter"),
        (parts(json!({"type": "text", "text": "a", "b": 1})), "messages[0].content[0].b", "unknown_parameter"),
        (
            parts(json!({"type": "image_url", "image_url": {}})),
            "messages[0].content[0].image_url.url",
            "missing_required_parameter",
        ),
        (
            parts(json!({"type": "image_url", "image_url": "x"})),
            "messages[0].content[0].image_url.url",
            "invalid_value",
        ),
    ] {
        assert_eq!(refused(says(messages)), (place.into(), code));
    }
    let shown = json!([{"role": "assistant", "content": [{"type": "image_url", "image_url": "data:;base64,AA"}]}]);
    assert_eq!(refused(says(shown)).0, "messages[0].content[0]");
}

#[test]
fn what_is_no_json_is_refused() {
    let pictures = Pictures { files: None, vision: true };
    let deep = "[".repeat(100_000);
    for body in ["", "{", "[]", "7", "{\"messages\": [}", "\u{feff}{}", &deep] {
        assert_eq!(ChatRequest::parse(body.as_bytes(), &pictures).unwrap_err().status.as_u16(), 400);
    }
    assert!(ChatRequest::parse(&[0xff, 0xfe], &pictures).is_err());
}

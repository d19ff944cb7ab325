use super::*;
use crate::prompt::Part;

fn list(text: impl AsRef<[u8]>) -> (tempfile::TempDir, Result<List, String>) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a.png", "b.png"] {
        std::fs::write(dir.path().join(name), b"x").unwrap();
    }
    let path = dir.path().join("list");
    std::fs::write(&path, text).unwrap();
    let list = List::read(&path, None).map_err(|e| e.to_string());
    (dir, list)
}

/// The entries as "role: text with [picture]s | …".
fn told(text: impl AsRef<[u8]>) -> Result<Vec<String>, String> {
    let (dir, list) = list(text);
    let list = list?;
    let tell = |index: usize| {
        let conversation = list.conversation(index)?;
        let mut pictures = conversation.pictures.iter();
        let mut part = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Image => match pictures.next() {
                Some(Picture::File(path)) => {
                    format!("[{}]", path.strip_prefix(dir.path()).unwrap_or(path).display())
                }
                Some(Picture::Bytes(bytes)) => format!("{bytes:?}"),
                None => "[?]".into(),
            },
        };
        let mut messages = Vec::new();
        for m in &conversation.messages {
            let parts: Vec<String> = m.parts.iter().map(&mut part).collect();
            messages.push(format!("{}: {}", m.role, parts.join(" ")));
        }
        assert!(pictures.next().is_none(), "a picture without a place");
        Ok(messages.join(" | "))
    };
    (0..list.len()).map(tell).collect()
}

const TURNS: &str = r#"[{"from":"human","value":"<image>\nQ"},{"from":"gpt","value":" A "}]"#;

#[test]
fn layouts() {
    let one = "user: [a.png] Q | assistant: A";
    let part = r#"{"role":"assistant","content":[{"type":"text","text":"A"}]}"#;
    let openai = |image: &str| {
        format!(r#"{{"messages":[{{"role":"user","content":[{image},{{"type":"text","text":"Q"}}]}},{part}]}}"#)
    };
    let plain = r#"[{"role":"user","content":"<image>Q"},{"role":"assistant","content":"A"}]"#;
    for text in [
        format!(r#"{{"image":"a.png","conversations":{TURNS}}}"#),
        format!(r#"[{{"image":["a.png"],"conversations":{TURNS}}}]"#),
        format!("\u{feff}[{{\"image\":\"a.png\",\"conversations\":{TURNS}}}]"),
        format!(r#"{{"images":["a.png"],"messages":{plain},"system":"","tools":[],"videos":null}}"#),
        format!(r#"{{"images":[{{"path":"a.png"}}],"conversations":{TURNS}}}"#),
        openai(r#"{"type":"image","image":"a.png"}"#),
        openai(r#"{"type":"image_url","image_url":{"url":"a.png","detail":"low"}}"#),
        openai(r#"{"type":"image_url","image_url":"a.png"}"#),
        r#"{"image":"a.png","question":"Q","answer":"A"}"#.into(),
        r#"{"image":"a.png","question":"<image>Q","answer":"A"}"#.into(),
    ] {
        assert_eq!(told(&text), Ok(vec![one.to_string()]), "{text}");
    }
    let lines = "{\"image\":\"a.png\",\"caption\":\"C\"}\n\n{\"image\":null,\"question\":\"Q\",\"answer\":\"A\"}\r\n";
    let caption = format!("user: [a.png] {CAPTION_QUESTION} | assistant: C");
    assert_eq!(told(lines), Ok(vec![caption, "user: Q | assistant: A".into()]));
}

#[test]
fn text_alone() {
    let turns = r#"[{"from":"human","value":"Q"},{"from":"gpt","value":"A"}]"#;
    for image in ["", r#""image":null,"#, r#""image":[],"#, r#""images":[],"#, r#""image":"","#] {
        let text = format!(r#"{{{image}"conversations":{turns}}}"#);
        assert_eq!(told(&text), Ok(vec!["user: Q | assistant: A".into()]), "{text}");
    }
}

/// System turns, later turns and all pictures count, each picture where it stands.
#[test]
fn turns_and_pictures() {
    let two = r#"{"image":["a.png","b.png"],"conversations":[{"from":"system","value":"S"},
        {"from":"human","value":"Is <image> like"},{"from":"gpt","value":"A"},
        {"from":"human","value":"<image>\n?"},{"from":"gpt","value":"B"},{"from":"human","value":"C"}]}"#;
    let want = "system: S | user: Is [a.png] like | assistant: A | user: [b.png] ? | assistant: B";
    assert_eq!(told(two), Ok(vec![want.into()]));
    // Without a place the pictures come first.
    let none = r#"{"images":["a.png","b.png"],"system":"S","messages":[{"role":"user","content":"Q"},
        {"role":"assistant","content":"A"}]}"#;
    assert_eq!(told(none), Ok(vec!["system: S | user: [a.png] [b.png] Q | assistant: A".into()]));
    // TRL's form: parts without a source take the listed pictures.
    let trl = r#"{"images":["a.png"],"conversations":null,"messages":[{"role":"user","content":[{"type":"image","text":null},
        {"type":"text","text":"Q","image":null}]},
        {"role":"assistant","content":[{"type":"text","text":"A"}]}]}"#;
    assert_eq!(told(trl), Ok(vec!["user: [a.png] Q | assistant: A".into()]));
}

#[test]
fn where_pictures_come_from() {
    let entry = |url: &str| format!(r#"{{"image":"{url}","question":"Q","answer":"A"}}"#);
    assert_eq!(told(entry("data:image/png;base64,AQID")), Ok(vec!["user: [1, 2, 3] Q | assistant: A".into()]));
    let (dir, _) = list("");
    // A list reaches what lies below its folder, or below --image-root, and nothing else.
    let absolute = dir.path().join("a.png").display().to_string();
    for path in [absolute.clone(), format!("file://{absolute}"), "../a.png".into(), "file:///dev/zero".into()] {
        let error = told(entry(&path)).unwrap_err();
        assert!(error.contains("lies outside") && error.contains("--image-root"), "{path}: {error}");
    }
    for (url, want) in [
        ("data:image/png,x", "base64"),
        ("data:image/png;base64,?", "base64"),
        ("https://x.org/a.png", "https://x.org/a.png is not downloaded"),
        (".", "does not exist"),
    ] {
        let error = told(entry(url)).unwrap_err();
        assert!(error.contains(want), "{url}: {error}");
    }
    let outside = dir.path().join("lists");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("l.json"), entry("a.png")).unwrap();
    let list = List::read(&outside.join("l.json"), Some(dir.path())).unwrap();
    assert_eq!(list.conversation(0).unwrap().pictures, [Picture::File(dir.path().join("a.png"))]);
    for path in [absolute.clone(), format!("file://{absolute}"), "lists/../a.png".into()] {
        std::fs::write(outside.join("l.json"), entry(&path)).unwrap();
        let list = List::read(&outside.join("l.json"), Some(dir.path())).unwrap();
        assert!(matches!(&list.conversation(0).unwrap().pictures[..], [Picture::File(_)]), "{path}");
    }
}

/// Neither pictures nor captions are read through links that leave the folder.
#[cfg(unix)]
#[test]
fn links_out_of_a_folder_are_refused() {
    let (dir, _) = list("a caption that is nobody's business");
    let folder = dir.path().join("pictures");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("own.png"), b"x").unwrap();
    for (to, link) in
        [("../a.png", "link.png"), ("own.png", "inner.png"), ("own.png", "told.png"), ("../list", "told.txt")]
    {
        std::os::unix::fs::symlink(to, folder.join(link)).unwrap();
    }
    let list = List::read(&folder, None).unwrap();
    let of = |index: usize| list.conversation(index).map(drop).map_err(|e| e.contains("lies outside"));
    let all: Vec<_> = (0..list.len()).map(|i| (list.name(i).rsplit('/').next().unwrap().to_string(), of(i))).collect();
    let (no, yes) = (Err(true), Ok(()));
    let want = [("inner.png", yes), ("link.png", no), ("own.png", yes), ("told.png", no)];
    assert_eq!(all, want.map(|(name, outcome)| (name.to_string(), outcome)));
}

#[test]
fn faults_say_what() {
    let utf16: Vec<u8> = "\u{feff}[]".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (text, want) in [
        (&b""[..], "no image-text pairs"),
        (b"[]", "no image-text pairs"),
        (b"[", "not JSON"),
        (b"{\"image\":\"a.png\",\"caption\":\"x\"}\nnonsense", "line 2"),
        (&utf16, "UTF-16"),
        (b"\xffx", "UTF-8"),
        (br#"{"image":"a.png","question":"Q"}"#, "`answer` is missing"),
        (br#"{"image":"a.png","answer":"  "}"#, "the answer is empty"),
        (br#"{"answer":"x"}"#, "`image`"),
        (br#"{"image":7,"answer":"x"}"#, "a picture is no path"),
        (br#"{"image":"c.png","answer":"x"}"#, "c.png does not exist"),
        (br#"{"image":"a.png","question":"<image><image>","answer":"x"}"#, "<image> stands 2 times for 1 pictures"),
        (br#"{"question":"<image> Q","answer":"x"}"#, "<image> stands 1 times for 0 pictures"),
        (br#"{"question":"Q","answer":"<image>"}"#, "a picture in an answer"),
        (br#"{"question":" ","answer":"A"}"#, "a question is empty"),
        (br#"{"conversations":[{"from":"human","value":"Q"}]}"#, "gpt"),
        (br#"{"conversations":[{"from":"gpt","value":"A"}]}"#, "begins with an answer"),
        (br#"{"conversations":[{"from":"observation","value":"Q"}]}"#, "turn 1: the role `observation`"),
        (br#"{"messages":[{"role":"user","content":[{"type":"input_audio"}]}]}"#, "type `input_audio`"),
        (br#"{"messages":[{"role":"user","content":null}]}"#, "turn 1: neither `content` nor `value`"),
        (br#"{"videos":["v.mp4"],"messages":[]}"#, "`videos` is not understood"),
    ] {
        let error = told(text).unwrap_err();
        assert!(error.contains(want), "{error}");
    }
}

/// What is not drawn is not looked at.
#[test]
fn undrawn_entries_may_be_broken() {
    let (_dir, list) = list("{\"image\":\"a.png\",\"caption\":\"C\"}\n{\"image\":\"gone.png\",\"caption\":\"C\"}\n7\n");
    let list = list.unwrap();
    assert_eq!(list.len(), 3);
    assert!(list.conversation(0).is_ok() && list.conversation(1).is_err() && list.conversation(2).is_err());
    assert!(list.name(2).ends_with("list: entry 3"));
}

#[test]
fn folders() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in [("b.PNG", "x"), ("b.txt", "\u{feff}A cat.\n"), ("a.jpg", "x"), ("notes.md", "")] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let list = List::read(dir.path(), None).unwrap();
    assert_eq!(list.len(), 2);
    assert!(list.conversation(0).unwrap().messages.is_empty(), "the model is asked");
    assert_eq!(list.conversation(1).unwrap().messages[1].text(), "A cat.");
}

#[test]
fn draws_are_seeded_and_ordered() {
    let (a, b) = (draw(50, 10, 1), draw(50, 10, 1));
    assert_eq!(a, b);
    assert!(a.windows(2).all(|w| w[0] < w[1]) && a.len() == 10);
    assert_ne!(a, draw(50, 10, 2));
    assert_eq!(draw(3, 10, 1), [0, 1, 2]);
}

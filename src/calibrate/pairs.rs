//! Image-text pairs: ShareGPT4V/LLaVA JSON or JSONL, JSONL of questions, or a folder of pictures with captions.
use super::CalibrateError;
use crate::Error;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A picture, if there is one, what is asked, and the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    pub image: Option<PathBuf>,
    pub question: String,
    pub answer: String,
}

/// What is asked of a picture that comes with a caption alone.
const CAPTION_QUESTION: &str = "Describe the image.";
const PICTURES: [&str; 6] = ["png", "jpg", "jpeg", "webp", "bmp", "gif"];

fn fail(path: &Path, problem: impl std::fmt::Display) -> Error {
    CalibrateError::File { path: path.into(), problem: problem.to_string() }.into()
}

/// Reads the pairs of `path`, a file or a folder, in its order (a folder's by name). Relative pictures are looked for
/// under `image_root`, else beside the file.
///
/// # Errors
/// The file is empty or malformed, an entry has neither picture nor question, or no answer, a picture does not exist.
pub fn read(path: &Path, image_root: Option<&Path>) -> Result<Vec<Pair>, Error> {
    let pairs = if path.is_dir() { folder(path)? } else { file(path, image_root)? };
    if pairs.is_empty() {
        return Err(fail(path, "no image-text pairs in it"));
    }
    for pair in &pairs {
        if let Some(image) = pair.image.as_ref().filter(|image| !image.is_file()) {
            return Err(fail(path, format!("picture {} does not exist; see --image-root", image.display())));
        }
    }
    Ok(pairs)
}

fn folder(path: &Path) -> Result<Vec<Pair>, Error> {
    let mut pairs = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| fail(path, e))? {
        let image = entry.map_err(|e| fail(path, e))?.path();
        let extension = image.extension().and_then(|e| e.to_str()).unwrap_or_default().to_lowercase();
        if !PICTURES.contains(&extension.as_str()) {
            continue;
        }
        let text = image.with_extension("txt");
        let answer = std::fs::read_to_string(&text).map_err(|e| fail(&text, format!("caption of a picture: {e}")))?;
        let answer = answer.trim().to_string();
        if answer.is_empty() {
            return Err(fail(&text, "the caption is empty"));
        }
        pairs.push(Pair { image: Some(image), question: CAPTION_QUESTION.into(), answer });
    }
    pairs.sort_by(|a, b| a.image.cmp(&b.image));
    Ok(pairs)
}

fn file(path: &Path, image_root: Option<&Path>) -> Result<Vec<Pair>, Error> {
    let text = std::fs::read_to_string(path).map_err(|e| fail(path, e))?;
    let root = image_root.or(path.parent()).unwrap_or(Path::new(""));
    let entries: Vec<(usize, Value)> = if text.trim_start().starts_with('[') {
        let list: Vec<Value> = serde_json::from_str(&text).map_err(|e| fail(path, format!("not JSON: {e}")))?;
        list.into_iter().enumerate().map(|(i, v)| (i + 1, v)).collect()
    } else {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let parse = |(i, line): (usize, &str)| {
            let value = serde_json::from_str(line).map_err(|e| fail(path, format!("line {}: not JSON: {e}", i + 1)))?;
            Ok::<_, Error>((i + 1, value))
        };
        lines.map(parse).collect::<Result<_, _>>()?
    };
    entries
        .into_iter()
        .map(|(at, entry)| pair(&entry, root).map_err(|what| fail(path, format!("entry {at}: {what}"))))
        .collect()
}

fn pair(entry: &Value, root: &Path) -> Result<Pair, String> {
    let text = |v: Option<&Value>, what: &str| -> Result<String, String> {
        let text = v.and_then(Value::as_str).ok_or(format!("{what} is missing or no string"))?;
        Ok(text.replace("<image>", "").trim().to_string())
    };
    // LLaVA's files hold conversations without a picture too.
    let image = match entry.get("image") {
        None if entry.get("conversations").or(entry.get("question")).is_some() => None,
        image => Some(root.join(image.and_then(Value::as_str).ok_or("`image` is missing or no string")?)),
    };
    let (question, answer) = match entry.get("conversations") {
        Some(turns) => {
            let turns = turns.as_array().ok_or("`conversations` is no list")?;
            let turn = |who: [&str; 2]| {
                turns.iter().find(|t| t.get("from").and_then(Value::as_str).is_some_and(|f| who.contains(&f)))
            };
            let question = text(turn(["human", "user"]).and_then(|t| t.get("value")), "the human turn")?;
            (question, text(turn(["gpt", "assistant"]).and_then(|t| t.get("value")), "the answer (a `gpt` turn)")?)
        }
        None => {
            let question = entry.get("question").map(|q| text(Some(q), "`question`")).transpose()?;
            let answer = entry.get("answer").or(entry.get("caption"));
            (question.unwrap_or_else(|| CAPTION_QUESTION.into()), text(answer, "`answer`")?)
        }
    };
    if answer.is_empty() {
        return Err("the answer is empty".into());
    }
    Ok(Pair { image, question, answer })
}

/// `n` of the pairs, drawn with `seed` and kept in their order; all of them when there are no more than n.
pub fn choose(pairs: Vec<Pair>, n: usize, seed: u64) -> Vec<Pair> {
    if pairs.len() <= n {
        return pairs;
    }
    // splitmix64 gives each pair a key; the n smallest keys are drawn.
    let key = |i: usize| {
        let mut z = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    order.sort_by_key(|&i| key(i));
    let mut kept = order[..n].to_vec();
    kept.sort_unstable();
    kept.into_iter().map(|i| pairs[i].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_read(name: &str, text: &str) -> Result<Vec<Pair>, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.png"), b"x").unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        read(&path, None).map_err(|e| e.to_string())
    }

    #[test]
    fn formats() {
        let llava = r#"[{"image":"a.png","conversations":[{"from":"human","value":"<image>\nWhat?"},{"from":"gpt","value":" A cat. "}]}]"#;
        let pairs = try_read("a.json", llava).unwrap();
        assert_eq!((pairs[0].question.as_str(), pairs[0].answer.as_str()), ("What?", "A cat."));
        let lines =
            "{\"image\":\"a.png\",\"question\":\"Q\",\"answer\":\"A\"}\n\n{\"image\":\"a.png\",\"caption\":\"C\"}\n";
        let pairs = try_read("a.jsonl", lines).unwrap();
        assert_eq!((pairs.len(), pairs[1].answer.as_str(), pairs[1].question.as_str()), (2, "C", CAPTION_QUESTION));
    }

    #[test]
    fn without_a_picture() {
        let text = r#"[{"conversations":[{"from":"human","value":"Q"},{"from":"gpt","value":"A"}]},{"question":"R","answer":"B"}]"#;
        let pairs = try_read("a.json", text).unwrap();
        let found: Vec<_> = pairs.iter().map(|p| (p.image.is_none(), p.question.as_str(), p.answer.as_str())).collect();
        assert_eq!(found, [(true, "Q", "A"), (true, "R", "B")]);
    }

    #[test]
    fn faults_name_the_place() {
        for (text, want) in [
            ("", "no image-text pairs"),
            ("[", "not JSON"),
            ("{\"image\":\"a.png\",\"answer\":\"x\"}\nnonsense", "line 2"),
            ("{\"image\":\"a.png\",\"question\":\"Q\"}", "entry 1: `answer`"),
            ("{\"image\":\"a.png\",\"answer\":\"  \"}", "the answer is empty"),
            ("{\"answer\":\"x\"}", "`image`"),
            ("{\"image\":\"b.png\",\"answer\":\"x\"}", "does not exist"),
            ("[{\"image\":\"a.png\",\"conversations\":[{\"from\":\"human\",\"value\":\"Q\"}]}]", "gpt"),
        ] {
            let error = try_read("pairs", text).unwrap_err();
            assert!(error.contains(want) && error.contains("pairs"), "{error}");
        }
    }

    #[test]
    fn choice_is_seeded_and_ordered() {
        let pair =
            |i: usize| Pair { image: Some(format!("{i:03}").into()), question: String::new(), answer: "a".into() };
        let all: Vec<Pair> = (0..50).map(pair).collect();
        let (a, b) = (choose(all.clone(), 10, 1), choose(all.clone(), 10, 1));
        assert_eq!(a, b);
        assert!(a.windows(2).all(|w| w[0].image < w[1].image) && a.len() == 10);
        assert_ne!(a, choose(all, 10, 2));
    }
}

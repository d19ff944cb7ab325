//! The questions of an evaluation: a JSON Lines file, checked whole before anything runs.
//!
//! One object a line. `question` and `answer` are strings; `image` (a path below the image root)
//! is absent for a text-only question; `kind` groups accuracy; `id` names the question. In place
//! of `question`, `prompt` gives raw text that the answer continues: no chat template is applied
//! and no end-of-turn token is expected after the answer.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::image::{self, LocateError, load_rgb};

/// Where llama.cpp's multimodal library puts a picture; a text holding it would shift every picture.
pub use crate::prompt::gguf::MARK as MEDIA_MARKER;

/// How the text of a question becomes a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuestionForm {
    /// One user turn of the model's chat template; the answer ends with the end-of-turn token.
    Chat,
    /// The text as it stands; the answer continues it.
    Raw,
}

/// One question.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// From the file, or the line number.
    pub id: String,
    /// The picture, with the image root in front.
    pub image: Option<PathBuf>,
    pub form: QuestionForm,
    pub text: String,
    /// The given answer, stripped of white space at both ends for [`QuestionForm::Chat`].
    pub answer: String,
    /// "all" where the file names none.
    pub kind: String,
}

/// All questions of a file.
#[derive(Debug, Clone)]
pub struct Questions {
    pub list: Vec<Question>,
    /// SHA-256 of the question file.
    pub digest: [u8; 32],
}

/// Why a question file is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} holds no question: give one JSON object a line, {{\"image\": …, \"question\": …, \"answer\": …}}")]
    Empty { path: PathBuf },
    #[error("{path}, line {line}: {what}")]
    Line { path: PathBuf, line: usize, what: String },
    #[error(
        "{path}, line {line}: picture {image}: {what}; paths are relative to --image-root ({missing} of the file's \
         pictures cannot be used)"
    )]
    Image { path: PathBuf, line: usize, image: PathBuf, what: String, missing: usize },
}

#[derive(Deserialize)]
struct QuestionEntry {
    id: Option<serde_json::Value>,
    image: Option<PathBuf>,
    question: Option<String>,
    prompt: Option<String>,
    answer: Option<String>,
    kind: Option<String>,
}

impl Questions {
    /// Reads and checks `path`: every line, every picture. `limit` keeps the first so many.
    ///
    /// # Errors
    /// The first fault, with its line: no question at all, malformed JSON, a missing or empty field, an id
    /// given twice, a text that holds the media marker, a picture that is missing, outside `image_root` or not readable.
    pub fn read(path: &Path, image_root: &Path, limit: Option<usize>) -> Result<Self, DataError> {
        let bytes = std::fs::read(path).map_err(|source| DataError::Read { path: path.into(), source })?;
        let digest = Sha256::digest(&bytes).into();
        let text = String::from_utf8(bytes).map_err(|e| DataError::Line {
            path: path.into(),
            line: 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count(),
            what: "not UTF-8 text".into(),
        })?;
        let mut list = Vec::new();
        let mut lines = Vec::new();
        let mut seen = HashSet::new();
        for (index, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            if limit.is_some_and(|n| list.len() >= n) {
                break;
            }
            let fault = |what: String| DataError::Line { path: path.into(), line: index + 1, what };
            let entry: QuestionEntry = serde_json::from_str(line).map_err(|e| {
                fault(format!("{e}; expected one JSON object with question, answer and (optional) image"))
            })?;
            let question = entry.check(index + 1, image_root).map_err(fault)?;
            if !seen.insert(question.id.clone()) {
                return Err(fault(format!("id {:?} is given twice", question.id)));
            }
            list.push(question);
            lines.push(index + 1);
        }
        if list.is_empty() {
            return Err(DataError::Empty { path: path.into() });
        }
        check_images(path, &list, &lines)?;
        Ok(Self { list, digest })
    }

    /// Number of questions of each kind.
    pub fn kinds(&self) -> BTreeMap<&str, usize> {
        let mut kinds = BTreeMap::new();
        for question in &self.list {
            *kinds.entry(question.kind.as_str()).or_default() += 1;
        }
        kinds
    }

    /// Whether any question has a picture.
    pub fn has_images(&self) -> bool {
        self.list.iter().any(|q| q.image.is_some())
    }
}

impl QuestionEntry {
    fn check(self, line: usize, image_root: &Path) -> Result<Question, String> {
        let id = match self.id {
            None => format!("line {line}"),
            Some(serde_json::Value::String(s)) if !s.is_empty() => s,
            Some(serde_json::Value::Number(n)) => n.to_string(),
            Some(_) => return Err("id must be a string or a number".into()),
        };
        let (form, text) = match (self.question, self.prompt) {
            (Some(q), None) => (QuestionForm::Chat, q),
            (None, Some(p)) => (QuestionForm::Raw, p),
            (None, None) => return Err("field question (or prompt, for raw text) is missing".into()),
            (Some(_), Some(_)) => return Err("give question or prompt, not both".into()),
        };
        let answer = self.answer.ok_or("field answer is missing")?;
        let answer = if form == QuestionForm::Chat { answer.trim().to_owned() } else { answer };
        if text.trim().is_empty() {
            return Err("the question is empty".into());
        }
        if answer.is_empty() {
            return Err("the answer is empty".into());
        }
        if text.contains(MEDIA_MARKER) || answer.contains(MEDIA_MARKER) {
            return Err(format!("the text holds {MEDIA_MARKER}, which stands for a picture"));
        }
        let image = match self.image {
            Some(_) if form == QuestionForm::Raw => {
                return Err("a raw prompt cannot have a picture; use question".into());
            }
            Some(path) if path.as_os_str().is_empty() => {
                return Err("field image is empty; leave it out for text".into());
            }
            // A missing picture is counted with the others below.
            Some(path) => match image::inside(image_root, &path) {
                Err(LocateError::Missing { .. }) => Some(image_root.join(path)),
                found => Some(found.map_err(|e| e.to_string())?),
            },
            None => None,
        };
        let kind = self.kind.filter(|k| !k.is_empty()).unwrap_or_else(|| "all".into());
        Ok(Question { id, image, form, text, answer, kind })
    }
}

/// Every picture must be readable: a fault found after hours of work would be found too late.
fn check_images(path: &Path, list: &[Question], lines: &[usize]) -> Result<(), DataError> {
    let mut pictures: BTreeMap<&Path, usize> = BTreeMap::new();
    for (question, line) in list.iter().zip(lines) {
        if let Some(image) = question.image.as_deref() {
            pictures.entry(image).or_insert(*line);
        }
    }
    let fault = |(image, line): (&Path, usize)| {
        let what = if image.exists() { load_rgb(image).err()?.to_string() } else { "the file does not exist".into() };
        Some((line, image.to_owned(), what))
    };
    let faults: Vec<_> = pictures.into_par_iter().filter_map(fault).collect();
    let missing = faults.len();
    match faults.into_iter().min() {
        Some((line, image, what)) => Err(DataError::Image { path: path.into(), line, image, what, missing }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Questions, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let pixel = ::image::RgbImage::from_pixel(2, 3, ::image::Rgb([1, 2, 3]));
        pixel.save(dir.path().join("a.png")).unwrap();
        std::fs::write(dir.path().join("bad.png"), b"no picture").unwrap();
        let path = dir.path().join("q.jsonl");
        std::fs::write(&path, text).unwrap();
        Questions::read(&path, dir.path(), None)
    }

    #[test]
    fn reads_pictures_text_and_raw_prompts() {
        let q = read(concat!(
            "{\"image\": \"a.png\", \"question\": \"What?\", \"answer\": \" red \", \"kind\": \"color\"}\n\n",
            "{\"id\": 7, \"question\": \"One and one?\", \"answer\": \"two\", \"extra\": [1]}\n",
            "{\"prompt\": \"Once upon\", \"answer\": \" a time\"}\n",
        ))
        .unwrap();
        assert_eq!(q.list.len(), 3);
        assert_eq!(q.list[0].id, "line 1");
        assert_eq!(q.list[0].answer, "red");
        assert!(q.list[0].image.as_ref().unwrap().ends_with("a.png"));
        assert_eq!((q.list[1].id.as_str(), q.list[1].kind.as_str()), ("7", "all"));
        assert_eq!((q.list[2].form, q.list[2].answer.as_str()), (QuestionForm::Raw, " a time"));
        assert_eq!(q.kinds()["color"], 1);
    }

    #[test]
    fn every_fault_names_its_line() {
        let good = "{\"question\": \"q\", \"answer\": \"a\"}\n";
        for (text, expected) in [
            ("", "holds no question"),
            ("\n \n", "holds no question"),
            ("{\"question\": \"q\", \"answer\": \"a\"\n", "line 1: EOF"),
            ("[1]\n", "line 1: "),
            (&format!("{good}{{\"answer\": \"a\"}}\n"), "line 2: field question"),
            (&format!("{good}{{\"question\": \"q\"}}\n"), "line 2: field answer"),
            (&format!("{good}{{\"question\": \" \", \"answer\": \"a\"}}\n"), "line 2: the question is empty"),
            (&format!("{good}{{\"question\": \"q\", \"answer\": \" \"}}\n"), "line 2: the answer is empty"),
            (&format!("{good}{{\"question\": 3, \"answer\": \"a\"}}\n"), "line 2: invalid type"),
            (
                "{\"id\": 1, \"question\": \"q\", \"answer\": \"a\"}\n{\"id\": \"1\", \"question\": \"q\", \"answer\": \"a\"}\n",
                "given twice",
            ),
            ("{\"question\": \"a <__media__>\", \"answer\": \"a\"}\n", "stands for a picture"),
            ("{\"image\": \"b.png\", \"question\": \"q\", \"answer\": \"a\"}\n", "b.png: the file does not exist"),
            (
                "{\"image\": \"bad.png\", \"question\": \"q\", \"answer\": \"a\"}\n",
                "bad.png: not a readable picture: it is text",
            ),
            ("{\"image\": \"a.png\", \"prompt\": \"q\", \"answer\": \"a\"}\n", "a raw prompt"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{text:?}: {message}");
        }
    }
}

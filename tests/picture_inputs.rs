//! Pictures as people have them, through the program: what chat, evaluation and calibration make of them.
mod common;

use common::{convert, root, runtime_dir};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The demo model in f16 beside a folder of pictures of its red star, and files that are none.
struct Bench {
    dir: tempfile::TempDir,
    model: PathBuf,
    runtime: PathBuf,
}

fn bench() -> Option<Bench> {
    let runtime = runtime_dir()?;
    let dir = tempfile::tempdir().unwrap();
    let model = convert(&root().join("demo/model"), "f16", dir.path());
    for file in fs::read_dir(root().join("tests/golden/pictures/star")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    for name in ["star.png", "a, red star.png", "-star.png"] {
        fs::copy(root().join("demo/pictures/red-star.png"), dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("empty.png"), "").unwrap();
    fs::write(dir.path().join("huge.png"), huge()).unwrap();
    Some(Bench { dir, model, runtime })
}

/// A PNG whose header promises 60,000 x 60,000 pixels.
fn huge() -> Vec<u8> {
    let mut png = fs::read(root().join("demo/pictures/red-star.png")).unwrap();
    png[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]);
    let crc = !png[12..29].iter().fold(!0u32, |crc, &b| {
        (0..8).fold(crc ^ u32::from(b), |c, _| (c >> 1) ^ if c & 1 == 1 { 0xEDB8_8320 } else { 0 })
    });
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    png
}

/// Files that must be refused, and a word that says what they are.
const REFUSED: [(&str, &str); 6] = [
    ("trunc.jpg", "cut off"),
    ("trunc.png", "cut off"),
    ("fake.heic", "HEIC"),
    ("html.jpg", "HTML"),
    ("empty.png", "an empty file"),
    ("huge.png", "60000 x 60000 pixels"),
];

impl Bench {
    fn program(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mbq-convert"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.output().unwrap()
    }

    fn chat(&self, args: &[&str], more: &[&str]) -> Output {
        let (model, runtime) = (self.model.to_str().unwrap(), self.runtime.to_str().unwrap());
        let rest = ["--", "--temp", "0", "-n", "32", "--no-warmup", "-t", "1"];
        self.program(&[&["chat", model, "--runtime", runtime], args, &rest, more].concat())
    }

    /// Exit status 1 and a message of one line with all `words`.
    fn refuses(&self, output: &Output, words: &[&str]) {
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {message}");
        assert!(words.iter().all(|w| message.contains(w)), "{words:?} not in: {message}");
        assert!(!message.contains("ASSERT"), "{message}");
    }

    fn eval(&self, questions: &str, more: &[&str]) -> Output {
        fs::create_dir_all(self.dir.path().join("data")).unwrap();
        fs::write(self.dir.path().join("data/q.jsonl"), questions).unwrap();
        let (model, runtime) = (self.model.to_str().unwrap(), self.runtime.to_str().unwrap());
        let mmproj = mbq_convert::runtime::find_mmproj(&self.model).unwrap();
        let fixed = ["eval", model, "--reference", model, "--mmproj", mmproj.to_str().unwrap(), "--quiet"];
        let data = ["--data", "data/q.jsonl", "--cache", "cache", "--runtime", runtime, "--threads", "1"];
        self.program(&[&fixed, &data[..], more].concat())
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn chat_takes_pictures_of_any_name_and_format() {
    let Some(bench) = bench() else { return };
    for image in ["star.png", "a, red star.png", "-star.png", "star.webp", "anim.webp"] {
        let output = bench.chat(&["--image", image, "-p", "What is in the picture?"], &[]);
        assert!(output.status.success(), "{image}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout).trim(), "a red star", "{image}");
    }
    for (image, word) in REFUSED {
        let output = bench.chat(&["--image", "star.png", "--image", image, "-p", "What?"], &[]);
        bench.refuses(&output, &[image, word]);
    }
}

#[test]
fn chat_answers_without_a_picture_and_counts_its_tokens() {
    let Some(bench) = bench() else { return };
    let output = bench.chat(&["-p", "What color is the star?"], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let answer = text(&output.stdout);
    assert!(!answer.trim().is_empty() && !answer.contains("chat mode"), "{answer}");

    let long = "What is in the picture? ".repeat(60);
    let output = bench.chat(&["--image", "star.png", "-p", &long], &["-c", "256"]);
    bench.refuses(&output, &["tokens, pictures included", "the context holds 256", "-c "]);
    let output = bench.chat(&["--image", "star.png", "--image", "star.webp", "-p", "What is in the picture?"], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!text(&output.stdout).trim().is_empty());
    assert!(!text(&output.stderr).contains("DEPRECATED"), "{}", text(&output.stderr));
}

#[test]
fn evaluation_sees_the_same_pictures() {
    let Some(bench) = bench() else { return };
    let ask = |image: &str| {
        format!(
            "{{\"image\": \"../{image}\", \"question\": \"What is in the picture?\", \"answer\": \"a red star\"}}\n"
        )
    };
    let good: String = ["star.png", "a, red star.png", "star.webp", "anim.webp"].map(ask).concat();
    let output = bench.eval(&good.replace("../", ""), &["--image-root", ".", "--json", "-"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(accuracy(&output.stdout), (4, 4));
    for (image, word) in REFUSED {
        let output = bench.eval(&ask(image).replace("../", ""), &["--image-root", "."]);
        bench.refuses(&output, &["q.jsonl, line 1", image, word]);
    }
    // A stranger's file does not reach out of its folder.
    let absolute = ask("star.png").replace("..", bench.dir.path().to_str().unwrap());
    for questions in [ask("star.png"), absolute] {
        let output = bench.eval(&questions, &["--html", "report.html"]);
        bench.refuses(&output, &["q.jsonl, line 1", "outside", "--image-root"]);
        assert!(!bench.dir.path().join("report.html").exists());
    }
}

#[test]
fn calibration_refuses_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    for (image, word) in REFUSED {
        let source = root().join("tests/golden/pictures/star").join(image);
        match image {
            "huge.png" => fs::write(dir.path().join(image), huge()).unwrap(),
            "empty.png" => fs::write(dir.path().join(image), "").unwrap(),
            _ => drop(fs::copy(source, dir.path().join(image)).unwrap()),
        }
        let message = mbq_convert::image::load_rgb(&dir.path().join(image)).unwrap_err().to_string();
        assert!(message.contains(image) && message.contains(word), "{message}");
        let pairs = dir.path().join("pairs.jsonl");
        fs::write(&pairs, format!("{{\"image\": \"{image}\", \"question\": \"What?\", \"answer\": \"a red star\"}}\n"))
            .unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_mbq-convert"))
            .arg(root().join("demo/model"))
            .args(["--quiet", "--calib", pairs.to_str().unwrap(), "-o"])
            .arg(dir.path().join("o.gguf"))
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(image), "{}", text(&output.stderr));
    }
}

/// A question in the shared testbed about a photo that is stored upside down: right only if it is turned upright.
#[test]
fn photos_are_seen_upright() {
    let Some(shared) = std::env::var_os("MBQ_SHARED").map(PathBuf::from) else {
        eprintln!("skipped: MBQ_SHARED is not set");
        return;
    };
    let Some(runtime) = runtime_dir() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = convert(&shared.join("testbed/model"), "f16", dir.path());
    assert_eq!(photos(&shared, &model, &runtime, dir.path()), (16, 16));
}

/// Right answers to exif.jsonl, and its questions.
fn photos(shared: &Path, model: &Path, runtime: &Path, dir: &Path) -> (u64, u64) {
    let json = dir.join("report.json");
    let mmproj = mbq_convert::runtime::find_mmproj(model).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_mbq-convert"))
        .arg("eval")
        .arg(model)
        .args(["--quiet", "--threads", "1", "--max-tokens", "16", "--reference"])
        .arg(model)
        .arg("--mmproj")
        .arg(mmproj)
        .arg("--data")
        .arg(shared.join("cases/pictures/exif.jsonl"))
        .arg("--cache")
        .arg(dir.join("cache"))
        .arg("--runtime")
        .arg(runtime)
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    accuracy(&fs::read(&json).unwrap())
}

/// Right answers and questions, from an evaluation's JSON.
fn accuracy(report: &[u8]) -> (u64, u64) {
    let report: serde_json::Value = serde_json::from_slice(report).unwrap();
    let accuracy = &report["candidates"][0]["accuracy"];
    (accuracy["correct"].as_u64().unwrap(), accuracy["questions"].as_u64().unwrap())
}

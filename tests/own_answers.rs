//! The model's own answers to general questions about the calibration pictures: those that llama.cpp's own tool gives, one
//! question at a time, and part of what is calibrated on.
mod common;

use common::{root, runtime_dir};
use mbq_convert::runtime;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// Runs the program on the demo model; what it said.
fn convert(out: &Path, more: &[&str]) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mbq-convert"));
    let done = command.arg(root().join("demo/model")).arg("-o").arg(out).args(more).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    if done.status.success() { Ok(said) } else { Err(said) }
}

fn calibration(model: &Path) -> Value {
    let bytes = std::fs::read(model.with_extension("mbq.json")).unwrap();
    serde_json::from_slice::<Value>(&bytes).unwrap()["calibration"].take()
}

/// A folder with two pictures, the first with a caption.
fn pictures(dir: &Path) -> String {
    std::fs::create_dir(dir.join("pictures")).unwrap();
    for name in ["blue-heart", "red-star"] {
        let file = format!("{name}.png");
        std::fs::copy(root().join("demo/pictures").join(&file), dir.join("pictures").join(&file)).unwrap();
    }
    std::fs::write(dir.join("pictures/blue-heart.txt"), "A blue heart.").unwrap();
    dir.join("pictures").to_str().unwrap().into()
}

#[test]
fn answers_are_the_models_own() {
    let Some(runtime_dir) = runtime_dir() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (folder, out, exact) = (pictures(dir.path()), dir.path().join("o.gguf"), dir.path().join("q8.gguf"));
    convert(&out, &["--calib", &folder]).unwrap();
    let q8 = ["--method", "rtn", "--type", "q8_0", "--embedding-type", "q8_0"];
    convert(&exact, &q8).unwrap();
    let tool = runtime::tool(&runtime_dir, "llama-mtmd-cli").unwrap();
    let record = calibration(&out);
    let own = record["own_answers"].as_object().unwrap();
    assert_eq!(own.len(), 2);
    let mut asked = Vec::new();
    for (picture, turns) in own {
        for turn in turns.as_array().unwrap() {
            let (question, answer) = (turn[0].as_str().unwrap(), turn[1].as_str().unwrap());
            let mut command = Command::new(&tool);
            command.arg("-m").arg(&exact).arg("--mmproj").arg(runtime::find_mmproj(&exact).unwrap());
            command.arg("--image").arg(picture).args(["-p", question, "--jinja", "--temp", "0", "--verbosity", "1"]);
            let done = command.args(["-t", "1", "-c", "1024", "-n", "32", "--no-warmup"]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&done.stdout).trim(), answer, "{picture}: {question}");
            asked.push(question);
        }
    }
    // The picture without a caption is described first; the next picture is asked the next questions.
    assert_eq!(asked.len(), 13);
    assert_eq!(asked[6], "Describe the image.");
    assert!(asked[..6].iter().all(|question| !asked[7..].contains(question)));
}

#[test]
fn without_them_a_picture_needs_a_caption() {
    if runtime_dir().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (folder, out) = (pictures(dir.path()), dir.path().join("o.gguf"));
    let off = ["--calib", &folder, "--set", "own-answers=off"];
    let said = convert(&out, &off).unwrap_err();
    assert!(said.contains("red-star.png") && said.contains("no caption"), "{said}");
    std::fs::write(dir.path().join("pictures/red-star.txt"), "A red star.").unwrap();
    convert(&out, &off).unwrap();
    let alone = calibration(&out);
    assert!(alone["own_answers"].is_null());
    convert(&out, &["--calib", &folder]).unwrap();
    let tokens = |record: &Value| record["tokens"].as_u64().unwrap();
    // Twelve turns of text, no further picture (36 tokens each).
    let more = tokens(&calibration(&out)) - tokens(&alone);
    assert!((12 * 8..12 * 36).contains(&more), "{more}");
    // The published methods are as they are published.
    convert(&out, &["--calib", &folder, "--method", "gptq"]).unwrap();
    assert_eq!(tokens(&calibration(&out)), tokens(&alone));
}

//! The demo model all the way: converted by the program, then asked about 200 figures by llama.cpp.
mod common;

use common::{convert, root, runtime_dir};
use mbq_convert::runtime;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// The greedy answer of llama-mtmd-cli.
fn answer(tool: &Path, model: &Path, question: &Value) -> String {
    let image = root().join("demo/eval").join(question["image"].as_str().unwrap());
    let output = Command::new(tool)
        .arg("-m")
        .arg(model)
        .arg("--mmproj")
        .arg(runtime::find_mmproj(model).unwrap())
        .arg("--image")
        .arg(image)
        .args(["-p", question["question"].as_str().unwrap()])
        .args(["--temp", "0", "--verbosity", "1", "-t", "1", "-c", "1024", "-n", "32", "--no-warmup"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Converts to `kind` and wants `least` of the 200 questions answered exactly.
fn answers(kind: &str, least: usize) {
    let Some(runtime_dir) = runtime_dir() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = convert(&root().join("demo/model"), kind, folder.path());
    let tool = runtime::tool(&runtime_dir, "llama-mtmd-cli").unwrap();
    let text = std::fs::read_to_string(root().join("demo/eval/questions.jsonl")).unwrap();
    let questions: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(questions.len(), 200);
    let (first, second) = questions.split_at(100);
    let count = |part: &[Value]| part.iter().filter(|q| answer(&tool, &model, q) == q["answer"]).count();
    let right = std::thread::scope(|scope| {
        let other = scope.spawn(|| count(second));
        count(first) + other.join().unwrap()
    });
    eprintln!("{kind}: {right} of 200");
    assert!(right >= least, "{kind}: {right} of 200");
}

#[test]
fn f16_answers_95_of_100_figures() {
    answers("f16", 190);
}

#[test]
fn mbq3_answers_90_of_100_figures() {
    answers("mbq3", 180);
}

//! The demo model all the way: converted by the program, then asked about 200 figures by llama.cpp.
mod common;

use common::{convert, root, runtime_dir};
use mbq_convert::runtime;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

/// The greedy answer of llama-mtmd-cli.
fn answer(tool: &Path, model: &Path, question: &Value) -> String {
    let output = ask(tool, model, question);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn ask(tool: &Path, model: &Path, question: &Value) -> Output {
    let image = root().join("demo/eval").join(question["image"].as_str().unwrap());
    Command::new(tool)
        .arg("-m")
        .arg(model)
        .arg("--mmproj")
        .arg(runtime::find_mmproj(model).unwrap())
        .arg("--image")
        .arg(image)
        .args(["-p", question["question"].as_str().unwrap()])
        .args(["--temp", "0", "--verbosity", "1", "-t", "1", "-c", "1024", "-n", "32", "--no-warmup"])
        .output()
        .unwrap()
}

fn questions() -> Vec<Value> {
    let text = std::fs::read_to_string(root().join("demo/eval/questions.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Converts to `kind` and wants `least` of the 200 questions answered exactly.
fn answers(kind: &str, least: usize) {
    let Some(runtime_dir) = runtime_dir() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = convert(&root().join("demo/model"), kind, folder.path());
    let tool = runtime::tool(&runtime_dir, "llama-mtmd-cli").unwrap();
    let questions = questions();
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

/// Stock types whose errors are compensated, calibrated on some of the demo's pairs: every linear gains, and llama.cpp
/// answers from the files.
#[test]
fn compensated_stock_types_answer_figures() {
    let Some(runtime_dir) = runtime_dir() else { return };
    let tool = runtime::tool(&runtime_dir, "llama-mtmd-cli").unwrap();
    for kind in ["q4_k", "q3_k_m", "iq4_xs", "iq3_s"] {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model.gguf");
        let done = Command::new(env!("CARGO_BIN_EXE_mbq-convert"))
            .arg(root().join("demo/model"))
            .args(["--type", kind, "--quiet", "--samples", "8", "--calib"])
            .arg(root().join("demo/calib/pairs.json"))
            .arg("-o")
            .arg(&model)
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let record = std::fs::read(model.with_extension("mbq.json")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        assert_eq!(record["calibration"]["method"], "mbq", "{kind}");
        for block in record["calibration"]["compensated"].as_array().unwrap() {
            let linears = block["linears"].as_array().unwrap();
            assert_eq!(linears.len(), 7, "{kind}");
            assert!(linears.iter().all(|l| l["gain"].as_f64().unwrap() < 0.9), "{kind}: {linears:?}");
        }
        let right = questions()[..10].iter().filter(|q| answer(&tool, &model, q) == q["answer"]).count();
        assert!(right >= 9, "{kind}: {right} of 10");
    }
}

/// A portable runtime holds CPU code for many processors. Each that this one can run answers alone; the others are
/// refused, not crashed into.
#[test]
fn every_cpu_variant_answers() {
    let Some(runtime_dir) = runtime_dir() else { return };
    let files: Vec<_> = std::fs::read_dir(&runtime_dir).unwrap().map(|f| f.unwrap().path()).collect();
    let is_variant = |path: &Path| path.file_name().is_some_and(|n| n.to_string_lossy().contains("ggml-cpu-"));
    let (variants, others): (Vec<_>, Vec<_>) = files.iter().partition(|path| is_variant(path));
    if variants.is_empty() {
        eprintln!("skipped: {} was built for one processor (MBQ_PORTABLE=1 builds all)", runtime_dir.display());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let model = convert(&root().join("demo/model"), "mbq3", folder.path());
    let questions = questions();
    let mut ran = 0;
    for variant in &variants {
        let alone = tempfile::tempdir().unwrap();
        for file in others.iter().chain([variant]) {
            std::fs::copy(file, alone.path().join(file.file_name().unwrap())).unwrap();
        }
        let tool = runtime::tool(alone.path(), "llama-mtmd-cli").unwrap();
        let first = ask(&tool, &model, &questions[0]);
        if !first.status.success() {
            assert_eq!(first.status.code(), Some(1), "{variant:?}: {}", String::from_utf8_lossy(&first.stderr));
            continue;
        }
        ran += 1;
        eprintln!("{}", variant.display());
        for question in &questions[..6] {
            assert_eq!(answer(&tool, &model, question), question["answer"], "{variant:?}");
        }
    }
    assert!(ran > 0, "none of {} variants runs here", variants.len());
}

//! A slice of tests/bench/mutants.py: real inputs, damaged field by field, end in success or in a clear error.
mod common;
mod tiny;

use common::{convert, root, runtime_dir};
use std::path::Path;
use std::process::Command;
use tiny::{Naming, checkpoint, llava, text};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for path in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// Checkpoints, pairs, pictures and questions, as tests/bench/mutants.sh gathers more of.
fn gather(folder: &Path) {
    let made = tempfile::tempdir().unwrap();
    copy(&checkpoint(made.path(), Naming::Published, 1), &folder.join("onevision"));
    copy(&checkpoint(&made.path().join("shards"), Naming::Nested, 2), &folder.join("shards"));
    copy(&llava::checkpoint(&made.path().join("llava"), true, Naming::Published, 1), &folder.join("llava"));
    copy(&root().join("demo/model"), &folder.join("demo"));
    for (name, kind) in [("onevision", "f16"), ("llava", "f16"), ("demo", "mbq3")] {
        let pair = folder.join(format!("{name}-pair"));
        std::fs::create_dir(&pair).unwrap();
        convert(&folder.join(name), kind, &pair);
    }
    copy(&root().join("tests/golden/pictures/load"), &folder.join("pictures"));
    std::fs::remove_file(folder.join("pictures/expected.json")).unwrap();
    let question =
        r#"{"image": "rgb.png", "question": "What is in the picture?", "answer": "a star", "kind": "shape"}"#;
    std::fs::write(folder.join("questions.jsonl"), format!("{question}\n{question}\n")).unwrap();
}

#[test]
fn a_slice_of_mutants() {
    let folder = tempfile::tempdir().unwrap();
    gather(folder.path());
    let mut kinds = vec![("convert,inspect,requantize,publish", "60")];
    kinds.extend(runtime_dir().map(|_| ("chat,eval,serve", "12")));
    for (kinds, count) in kinds {
        let mut command = Command::new("python3");
        command.arg(root().join("tests/bench/mutants.py")).arg(env!("CARGO_BIN_EXE_mbq-convert")).arg(folder.path());
        command.args(["--only", kinds, "--count", count]);
        match command.output() {
            Ok(done) => assert!(done.status.success(), "{}{}", text(&done.stdout), text(&done.stderr)),
            Err(e) => return eprintln!("skipped: python3: {e}"),
        }
    }
}

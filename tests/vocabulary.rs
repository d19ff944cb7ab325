//! Text becomes the same token ids in llama.cpp, from our GGUF, as in transformers.
mod common;

use common::{convert, root, runtime_dir};
use mbq_convert::runtime::engine::{Compute, Model, Runtime};
use serde_json::Value;
use std::path::Path;

/// Compares all strings of the golden for the tokenizer `name`, whose checkpoint is at `checkpoint`.
fn compare(name: &str, checkpoint: &Path) {
    let Some(runtime_dir) = runtime_dir() else { return };
    let golden = std::fs::read_to_string(root().join("tests/golden/nasty_strings.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let strings = golden["strings"].as_array().unwrap();
    let expected = golden["ids"][name].as_array().unwrap();
    assert!(strings.len() >= 500 && strings.len() == expected.len());

    let folder = tempfile::tempdir().unwrap();
    let path = convert(checkpoint, "q4_0", folder.path());
    let runtime = Runtime::open(&runtime_dir).unwrap();
    let model =
        Model::load(&runtime, &path, Compute { threads: 1, gpu_layers: 0, batch: 512, exact: false }, false).unwrap();
    for (string, ids) in strings.iter().zip(expected) {
        let text = string.as_str().unwrap();
        let got = model.tokenize(text, false, true).unwrap();
        assert_eq!(serde_json::json!(got), *ids, "{text:?}");
    }
}

#[test]
fn nasty_strings_with_the_demo_tokenizer() {
    compare("demo", &root().join("demo/model"));
}

#[test]
fn nasty_strings_with_the_testbed_tokenizer() {
    let Some(shared) = std::env::var_os("MBQ_SHARED") else {
        eprintln!("skipped: MBQ_SHARED does not name the folder of the testbed");
        return;
    };
    compare("testbed", &Path::new(&shared).join("testbed/model"));
}

//! A GGUF pair as the input: the same files come out as from the checkpoint that it was made from.
mod tiny;

use mbq_convert::ggml::{GgmlType, dequantize, quantize_rows};
use mbq_convert::gguf::{GgufFile, Header};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tiny::{Naming, checkpoint, convert, listing, text};

/// The made-up checkpoint, whose weights f16 holds exactly, and its F16 pair.
fn pair(parent: &Path) -> (PathBuf, PathBuf) {
    let model = checkpoint(parent, Naming::Published, 1);
    let f16 = parent.join("f16/model.gguf");
    std::fs::create_dir(parent.join("f16")).unwrap();
    let done = convert(&model, &f16, &["--type", "f16"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    (model, f16)
}

/// `out.gguf` and its mmproj, made from `model` in a folder named `name`.
fn made(parent: &Path, name: &str, model: &Path, args: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let out = parent.join(name).join("out.gguf");
    std::fs::create_dir(parent.join(name)).unwrap();
    let done = convert(model, &out, args);
    assert!(done.status.success(), "{args:?}: {}", text(&done.stderr));
    let read = |path: PathBuf| std::fs::read(path).unwrap();
    (read(out.clone()), read(out.with_file_name("mmproj-out-f16.gguf")))
}

#[test]
fn a_pair_gives_the_bytes_that_its_checkpoint_gives() {
    let dir = tempfile::tempdir().unwrap();
    let (model, f16) = pair(dir.path());
    for ty in ["mbq3", "q4_0", "q4_k", "q3_k_m", "bf16", "f16"] {
        let direct = made(dir.path(), &format!("{ty}-direct"), &model, &["--type", ty]);
        let through = made(dir.path(), &format!("{ty}-through"), &f16, &["--type", ty]);
        assert!(direct == through, "{ty}");
    }
}

/// The file cut into shards, tensor by tensor, as llama-gguf-split does it.
fn split(path: &Path, to: &Path, parts: usize) -> PathBuf {
    let file = GgufFile::open(path).unwrap();
    let size = file.tensors.len().div_ceil(parts);
    let name = |i: usize| to.join(format!("split-{:05}-of-{parts:05}.gguf", i + 1));
    for (i, tensors) in file.tensors.chunks(size).enumerate() {
        let mut metadata = if i == 0 { file.metadata.clone() } else { Default::default() };
        metadata.set("split.no", i as u16).set("split.count", parts as u16);
        metadata.set("split.tensors.count", file.tensors.len() as i32);
        let mut header = Header::new(metadata);
        tensors.iter().for_each(|t| header.add_tensor(&t.name, t.ty().unwrap(), &t.shape).unwrap());
        let mut bytes = header.encode();
        for tensor in tensors {
            bytes.extend(file.data(tensor));
            bytes.resize(bytes.len().next_multiple_of(header.alignment() as usize), 0);
        }
        std::fs::write(name(i), bytes).unwrap();
    }
    name(0)
}

#[test]
fn shards_are_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let (_, f16) = pair(dir.path());
    let shards = dir.path().join("shards");
    std::fs::create_dir(&shards).unwrap();
    let first = split(&f16, &shards, 3);
    std::fs::copy(f16.with_file_name("mmproj-model-f16.gguf"), shards.join("mmproj-split-f16.gguf")).unwrap();
    let whole = made(dir.path(), "whole", &f16, &["--type", "q8_0"]);
    let from_shards = made(dir.path(), "from-shards", &first, &["--type", "q8_0"]);
    assert!(whole == from_shards);
    // The last one gone, or another's name given, is said.
    let last = shards.join("split-00003-of-00003.gguf");
    let fails = |model: &Path| text(&convert(model, &dir.path().join("no.gguf"), &[]).stderr);
    assert!(fails(&last).contains("give the first"), "{}", fails(&last));
    std::fs::remove_file(&last).unwrap();
    assert!(fails(&first).contains("split-00003-of-00003.gguf"), "{}", fails(&first));
}

fn run(args: &[&std::ffi::OsStr]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mbq-convert")).args(args).output().unwrap()
}

#[test]
fn what_is_no_source_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (model, f16) = pair(dir.path());
    let mmproj = f16.with_file_name("mmproj-model-f16.gguf");
    let fails = |args: &[&std::ffi::OsStr]| {
        let done = run(args);
        assert!(!done.status.success(), "{args:?}");
        text(&done.stderr)
    };
    let quantised = dir.path().join("q4.gguf");
    assert!(convert(&model, &quantised, &["--type", "q4_0"]).status.success());
    let message = fails(&[quantised.as_os_str(), "--method".as_ref(), "rtn".as_ref()]);
    assert!(message.contains("quantised already") && message.contains("F16"), "{message}");
    let message = fails(&[mmproj.as_os_str(), "--method".as_ref(), "rtn".as_ref()]);
    assert!(message.contains("is a projector"), "{message}");
    let message = fails(&[f16.as_os_str(), "--mmproj".as_ref(), f16.as_os_str()]);
    assert!(message.contains("is no projector"), "{message}");
    let message = fails(&[model.as_os_str(), "--mmproj".as_ref(), mmproj.as_os_str()]);
    assert!(message.contains("--mmproj goes with a GGUF model"), "{message}");
    assert!(!listing(dir.path()).iter().any(|f| f.ends_with(".part")));
}

/// Keys and tensors that this program has no use for stay what they were.
#[test]
fn everything_else_is_copied() {
    let dir = tempfile::tempdir().unwrap();
    let (_, f16) = pair(dir.path());
    let file = GgufFile::open(&f16).unwrap();
    let mut metadata = file.metadata.clone();
    metadata.set("somebody.else", "ä\0b").set_array("somebody.list", &[1u8, 2][..]);
    let mut header = Header::new(metadata);
    file.tensors.iter().for_each(|t| header.add_tensor(&t.name, t.ty().unwrap(), &t.shape).unwrap());
    header.add_tensor("somebody.ids", GgmlType::I32, &[3]).unwrap();
    let mut bytes = header.encode();
    for tensor in &file.tensors {
        bytes.extend(file.data(tensor));
        bytes.resize(bytes.len().next_multiple_of(32), 0);
    }
    bytes.extend([7u8; 12]);
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    let path = f16.with_file_name("other.gguf");
    std::fs::write(&path, bytes).unwrap();
    let out = dir.path().join("out.gguf");
    let mmproj = f16.with_file_name("mmproj-model-f16.gguf");
    let done = convert(&path, &out, &["--type", "q4_k", "--mmproj", mmproj.to_str().unwrap()]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let made = GgufFile::open(&out).unwrap();
    for (key, value) in file.metadata.iter().filter(|(key, _)| *key != "general.file_type") {
        assert_eq!(made.metadata.get(key), Some(value), "{key}");
    }
    let written = GgufFile::open(&path).unwrap();
    for key in ["somebody.else", "somebody.list"] {
        assert_eq!(made.metadata.get(key), written.metadata.get(key), "{key}");
    }
    assert_eq!(made.data(made.tensor("somebody.ids").unwrap()), [7; 12]);
    for t in file.tensors.iter().filter(|t| t.shape.len() == 1) {
        assert_eq!(made.data(made.tensor(&t.name).unwrap()), file.data(t), "{}", t.name);
    }
}

/// Weights of every type that is taken, a block type among them, are those that the file holds.
#[test]
fn every_source_type_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), Naming::Published, 1);
    let direct = made(dir.path(), "direct", &model, &["--type", "q4_0"]);
    for ty in ["f32", "bf16", "q8_0"] {
        let source = dir.path().join(format!("{ty}/model.gguf"));
        std::fs::create_dir(dir.path().join(ty)).unwrap();
        let done = convert(&model, &source, &["--type", ty, "--embedding-type", ty, "--output-type", ty]);
        assert!(done.status.success(), "{}", text(&done.stderr));
        let through = made(dir.path(), &format!("{ty}-through"), &source, &["--type", "q4_0"]);
        if ty != "q8_0" {
            // The made-up weights fit both.
            assert!(through == direct, "{ty}");
            continue;
        }
        let path = dir.path().join("q8_0-through/out.gguf");
        let (from, to) = (GgufFile::open(&source).unwrap(), GgufFile::open(&path).unwrap());
        let mut compared = 0;
        for t in to.tensors.iter().filter(|t| t.ty() == Some(GgmlType::Q4_0)) {
            let values = dequantize(GgmlType::Q8_0, from.data(from.tensor(&t.name).unwrap())).unwrap();
            assert!(to.data(t) == quantize_rows(GgmlType::Q4_0, &values, t.shape[0], None).unwrap(), "{}", t.name);
            compared += 1;
        }
        assert_eq!(compared, 7 * 3);
    }
}

/// A text model that this program does not know is rounded, and says so when it is to be calibrated.
#[test]
fn an_unknown_architecture_is_rounded() {
    let dir = tempfile::tempdir().unwrap();
    let (_, f16) = pair(dir.path());
    let file = GgufFile::open(&f16).unwrap();
    let mut metadata = file.metadata.clone();
    metadata.set("general.architecture", "starcoder2");
    let mut header = Header::new(metadata);
    file.tensors.iter().for_each(|t| header.add_tensor(&t.name, t.ty().unwrap(), &t.shape).unwrap());
    let mut bytes = header.encode();
    for tensor in &file.tensors {
        bytes.extend(file.data(tensor));
        bytes.resize(bytes.len().next_multiple_of(32), 0);
    }
    std::fs::write(&f16, bytes).unwrap();
    let out = dir.path().join("out.gguf");
    let done = run(&[f16.as_os_str(), "-o".as_ref(), out.as_os_str()]);
    let message = text(&done.stderr);
    assert!(!done.status.success(), "{message}");
    for words in ["starcoder2", "cannot be calibrated", "qwen3vl", "--method rtn"] {
        assert!(message.contains(words), "{words}: {message}");
    }
    let done = convert(&f16, &out, &["--type", "q4_0"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert_eq!(GgufFile::open(&out).unwrap().tensor("blk.0.attn_q.weight").unwrap().ty(), Some(GgmlType::Q4_0));
}

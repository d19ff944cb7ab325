//! `--split-max-size`: the files of a split model are one model, whoever opens the first.
mod common;
mod tiny;

use common::runtime_dir;
use mbq_convert::gguf::{GgufFile, Header, Metadata, ShardName, Value};
use std::path::{Path, PathBuf};
use tiny::{Naming, checkpoint, convert, listing, program, text};

/// The made-up model's files in a new folder `name` below `parent`.
fn made(parent: &Path, name: &str, model: &Path, args: &[&str]) -> PathBuf {
    let dir = parent.join(name);
    std::fs::create_dir(&dir).unwrap();
    let done = convert(model, &dir.join("out.gguf"), args);
    assert!(done.status.success(), "{}", text(&done.stderr));
    dir
}

/// The first of `count` files in `dir`.
fn first(dir: &Path, count: usize) -> PathBuf {
    ShardName::path(&dir.join("out.gguf"), 1, count)
}

#[test]
fn a_split_model_holds_what_the_whole_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), Naming::Published, 1);
    for (kind, size) in [("mbq3", "200K"), ("q4_k", "300K"), ("f16", "1M")] {
        let whole = made(dir.path(), kind, &model, &["--type", kind]);
        let split = made(dir.path(), &format!("{kind}-split"), &model, &["--type", kind, "--split-max-size", size]);
        let names = listing(&split);
        let count = names.len() - 2;
        assert!(count > 2, "{names:?}");
        let shards: Vec<String> = (1..=count).map(|i| format!("out-{i:05}-of-{count:05}.gguf")).collect();
        assert_eq!(
            names,
            [&["mmproj-out-f16.gguf".to_string()], &shards[..count], &["out.mbq.json".to_string()]].concat()
        );
        let largest = shards.iter().map(|name| split.join(name).metadata().unwrap().len()).max().unwrap();
        let limit = size.replace('K', "000").replace('M', "000000").parse().unwrap();
        assert!(largest <= limit && largest > limit * 3 / 4, "{kind}: {largest}");
        let (a, b) = (GgufFile::open(&whole.join("out.gguf")).unwrap(), GgufFile::open(&first(&split, count)).unwrap());
        assert_eq!(a.tensors.len(), b.tensors.len());
        for (x, y) in a.tensors.iter().zip(&b.tensors) {
            assert_eq!((&x.name, x.type_id, &x.shape), (&y.name, y.type_id, &y.shape));
            assert!(a.data(x) == b.data(y), "{}", x.name);
        }
        // The first has all metadata, and all say where they stand.
        let mut keys: Metadata = b.metadata.clone();
        keys.remove(|key| key.starts_with("split."));
        assert_eq!(keys, a.metadata);
        for (i, name) in shards.iter().enumerate() {
            let alone = std::fs::read(split.join(name)).unwrap();
            let path = dir.path().join("alone.gguf");
            std::fs::write(&path, renumbered(&alone)).unwrap();
            let keys = GgufFile::open(&path).unwrap().metadata;
            assert_eq!(keys.get("split.no"), Some(&Value::U16(i as u16)));
            assert_eq!(keys.get("split.tensors.count"), Some(&Value::I32(a.tensors.len() as i32)));
            assert!(i == 0 || keys.iter().count() == 3);
        }
        // As a source it is what the whole is, and the record knows every file.
        if kind == "f16" {
            let again = made(dir.path(), "again", &first(&split, count), &["--type", "q8_0"]);
            let direct = made(dir.path(), "direct", &whole.join("out.gguf"), &["--type", "q8_0"]);
            let read = |dir: &Path| std::fs::read(dir.join("out.gguf")).unwrap();
            assert!(read(&again) == read(&direct));
        }
        let done = program().arg("inspect").arg(first(&split, count)).arg("--verify").output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stdout));
        let digests = text(&done.stdout).lines().filter(|line| line.starts_with("sha256 ")).count();
        assert_eq!(digests, count + 1);
    }
}

/// The file with `split.count` 1, so that it opens alone.
fn renumbered(bytes: &[u8]) -> Vec<u8> {
    let key = b"split.count";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    let mut bytes = bytes.to_vec();
    bytes[at..at + 2].copy_from_slice(&1u16.to_le_bytes());
    bytes
}

#[test]
fn what_fits_is_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), Naming::Published, 1);
    let whole = made(dir.path(), "whole", &model, &[]);
    let split = made(dir.path(), "split", &model, &["--split-max-size", "4G"]);
    assert_eq!(listing(&split), ["mmproj-out-f16.gguf", "out.gguf", "out.mbq.json"]);
    let read = |dir: &Path| std::fs::read(dir.join("out.gguf")).unwrap();
    assert!(read(&whole) == read(&split));
    // A tensor that is larger than the size has a file of its own, which is told.
    let done = convert(&model, &dir.path().join("small.gguf"), &["--split-max-size", "20K"]);
    assert!(
        done.status.success() && text(&done.stderr).contains("more than --split-max-size"),
        "{}",
        text(&done.stderr)
    );
    for bad in ["4X", "0", "-1", "4.5G", "99999999999G"] {
        let done = convert(&model, &dir.path().join("no.gguf"), &[&format!("--split-max-size={bad}")]);
        assert_eq!(done.status.code(), Some(2), "{bad}");
    }
}

/// Every command that reads models refuses the set whose first file is at `path` with these words.
fn refused(path: &Path, words: &[&str]) {
    let mmproj = path.with_file_name("mmproj-out-f16.gguf");
    let commands: [&[&str]; 4] = [&["inspect"], &["chat"], &["imatrix"], &["eval", "--reference"]];
    for command in commands {
        let mut program = program();
        program.args(command).arg(path);
        match command[0] {
            "eval" => program.arg(path).args(["--data", "none.jsonl"]),
            _ => program.arg("--mmproj").arg(&mmproj),
        };
        let runtime = path.with_file_name("runtime");
        std::fs::create_dir_all(&runtime).unwrap();
        std::fs::write(runtime.join(mbq_convert::runtime::library_file("mtmd")), "").unwrap();
        let done = program.arg("--runtime").arg(runtime).output().unwrap();
        let said = text(&done.stderr);
        assert!(!done.status.success());
        words.iter().for_each(|word| assert!(said.contains(word), "{command:?}: {word}: {said}"));
    }
    let done = convert(path, &path.with_file_name("no.gguf"), &[]);
    let said = text(&done.stderr);
    words.iter().for_each(|word| assert!(said.contains(word), "{word}: {said}"));
}

#[test]
fn shards_that_are_missing_or_of_another_set() {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), Naming::Published, 1);
    let split = |name: &str, args: &[&str]| made(dir.path(), name, &model, &[&["--type", "f16"], args].concat());
    let (a, b) = (split("a", &["--split-max-size", "1M"]), split("b", &["--split-max-size", "700K"]));
    let (count, other) = (listing(&a).len() - 2, listing(&b).len() - 2);
    assert_ne!(count, other);
    let path = |dir: &Path, i: usize, n: usize| ShardName::path(&dir.join("out.gguf"), i, n);
    let second = path(&a, 2, count);
    let whole = std::fs::read(&second).unwrap();
    // Of another count; another number's; with a tensor that stands elsewhere; cut off; gone.
    std::fs::copy(path(&b, 2, other), &second).unwrap();
    refused(&first(&a, count), &["out-00002-of-", "it is one of another set"]);
    std::fs::copy(path(&a, 3, count), &second).unwrap();
    refused(&first(&a, count), &["out-00002-of-", "it says that it is shard 3, its name says 2"]);
    let third = GgufFile::open(&first_of_two(&a, count)).unwrap();
    std::fs::write(&second, again(&third, &whole)).unwrap();
    refused(&first(&a, count), &["out-00002-of-", "stands in", "they are of two sets"]);
    std::fs::write(&second, &whole[..whole.len() - 32]).unwrap();
    refused(&first(&a, count), &["out-00002-of-", "it is cut off"]);
    std::fs::remove_file(&second).unwrap();
    refused(&first(&a, count), &[&format!("split into {count} files, of which"), "out-00002-of-", "is missing"]);
    refused(&path(&a, 3, count), &["give the first, named …-00001-of-"]);
}

/// The first shard of the set in `dir` as a file of its own.
fn first_of_two(dir: &Path, count: usize) -> PathBuf {
    let path = dir.join("single.gguf");
    std::fs::write(&path, renumbered(&std::fs::read(first(dir, count)).unwrap())).unwrap();
    path
}

/// The shard `bytes` with a tensor of `file` in place of its own.
fn again(file: &GgufFile, bytes: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard.gguf");
    std::fs::write(&path, renumbered(bytes)).unwrap();
    let mut metadata = GgufFile::open(&path).unwrap().metadata;
    metadata.set("split.count", file_count(bytes));
    let tensor = &file.tensors[0];
    let mut header = Header::new(metadata);
    header.add_tensor(&tensor.name, tensor.ty().unwrap(), &tensor.shape).unwrap();
    [header.encode(), file.data(tensor).to_vec()].concat()
}

fn file_count(bytes: &[u8]) -> u16 {
    let key = b"split.count";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// llama.cpp opens the first file and answers as with the whole, to the last bit.
#[test]
fn the_runtime_opens_the_first() {
    let Some(runtime) = runtime_dir() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), Naming::Published, 1);
    for kind in ["mbq3", "q4_0"] {
        let whole = made(dir.path(), kind, &model, &["--type", kind]);
        let split = made(dir.path(), &format!("{kind}-split"), &model, &["--type", kind, "--split-max-size", "200K"]);
        let count = listing(&split).len() - 2;
        let data = dir.path().join("data.jsonl");
        std::fs::write(&data, "{\"prompt\": \"hello t\", \"answer\": \"hell he\"}\n").unwrap();
        let done = program()
            .arg("eval")
            .arg(first(&split, count))
            .arg("--reference")
            .arg(whole.join("out.gguf"))
            .args(["--json", "-", "-q", "--resamples", "10", "--data"])
            .arg(&data)
            .arg("--cache")
            .arg(dir.path().join("cache"))
            .arg("--runtime")
            .arg(&runtime)
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
        let candidate = &report["candidates"][0];
        assert_eq!(candidate["model"]["weights"], report["reference"]["weights"]);
        let given = &candidate["text"]["given"];
        assert_eq!(given["agreement"]["value"], 1.0, "{given}");
        assert_eq!(given["perplexity"], given["perplexity_reference"], "{given}");
    }
}

/// The carried llama-gguf-split cuts the whole into the same files, to the last byte.
#[test]
fn the_files_are_those_of_llama_gguf_split() {
    let Some(runtime) = runtime_dir() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), Naming::Published, 1);
    let whole = made(dir.path(), "whole", &model, &["--type", "f16"]);
    let theirs = dir.path().join("theirs");
    std::fs::create_dir(&theirs).unwrap();
    let tool = mbq_convert::runtime::tool(&runtime, "llama-gguf-split").unwrap();
    let mut split = std::process::Command::new(tool);
    split.args(["--split", "--split-max-size", "1M"]).arg(whole.join("out.gguf")).arg(theirs.join("out"));
    let done = split.output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    let names = listing(&theirs);
    assert!(names.len() > 2, "{names:?}");
    // It counts tensors alone, we whole files: what its largest file has is our limit.
    let limit = names.iter().map(|name| theirs.join(name).metadata().unwrap().len()).max().unwrap().to_string();
    let ours = made(dir.path(), "ours", &model, &["--type", "f16", "--split-max-size", &limit]);
    for name in &names {
        assert!(std::fs::read(theirs.join(name)).unwrap() == std::fs::read(ours.join(name)).unwrap(), "{name}");
    }
}

//! `mbq-convert inspect`: what a file needs, and what `--verify` finds in damaged ones.
mod tiny;

use mbq_convert::gguf::GgufFile;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tiny::{HIDDEN, INNER, LAYERS, Naming, VOCAB, checkpoint, convert, program, text};

/// `out.gguf` of the made-up model, in MBQ3, in a folder of its own.
fn model(parent: &Path, args: &[&str]) -> PathBuf {
    let model = checkpoint(parent, Naming::Published, 1);
    let out = parent.join("out/out.gguf");
    std::fs::create_dir_all(out.parent().unwrap()).unwrap();
    let done = convert(&model, &out, args);
    assert!(done.status.success(), "{}", text(&done.stderr));
    out
}

fn inspect(file: &Path, args: &[&str]) -> (bool, String, String) {
    let done = program().arg("inspect").arg(file).args(args).output().unwrap();
    (done.status.success(), text(&done.stdout), text(&done.stderr))
}

fn json(file: &Path, args: &[&str]) -> Value {
    let (_, out, err) = inspect(file, &[&["--json"], args].concat());
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"))
}

/// Changes the bytes of a tensor at `at`.
fn patch(file: &Path, tensor: &str, at: usize, new: &[u8]) {
    let found = GgufFile::open(file).unwrap();
    let offset = found.tensor(tensor).unwrap().offset as usize + at;
    let mut bytes = std::fs::read(file).unwrap();
    bytes[offset..offset + new.len()].copy_from_slice(new);
    std::fs::write(file, bytes).unwrap();
}

/// `--verify` refuses the file with these words.
fn unsound(file: &Path, words: &[&str]) {
    let (sound, out, err) = inspect(file, &["--verify"]);
    assert!(!sound, "{out}");
    words.iter().for_each(|word| assert!(out.contains(word) && out.contains("not sound"), "{word}: {out}"));
    assert!(err.starts_with("error: "), "{err}");
}

#[test]
fn what_a_file_is_and_needs() {
    let dir = tempfile::tempdir().unwrap();
    let out = model(dir.path(), &[]);
    let found = json(&out, &["--context", "300"]);
    let keys: Vec<&str> = found.as_object().unwrap().keys().map(String::as_str).collect();
    let want = [
        "file",
        "gguf_version",
        "files",
        "architecture",
        "tensor_count",
        "weights",
        "bits_per_weight",
        "block_bits_per_weight",
        "types",
        "runtime",
        "mmproj",
        "memory",
        "metadata",
        "tensors",
        "verification",
    ];
    assert_eq!(keys, want);
    assert_eq!(found["metadata"]["general.file_type"], 192);
    assert_eq!(found["metadata"]["tokenizer.ggml.tokens"].as_array().unwrap().len(), VOCAB);
    assert_eq!(found["runtime"]["stock"], false);
    let reasons = found["runtime"]["reasons"].to_string();
    assert!(reasons.contains("21 tensors are mbq3") && reasons.contains("llava_onevision"), "{reasons}");
    assert!(found["mmproj"].as_str().unwrap().ends_with("mmproj-out-f16.gguf"));
    // The cache: 2 heads of 64 for keys, as many for values, in f16, in 512 cells, the next multiple of 256.
    let memory = &found["memory"];
    assert_eq!(memory["kv_cache"], LAYERS * 2 * (64 + 64) * 2 * 512);
    assert_eq!(memory["logits"], 300 * VOCAB * 4);
    let linears = LAYERS * (2 * HIDDEN * HIDDEN + 2 * 128 * HIDDEN + 3 * HIDDEN * INNER);
    let (mbq3, biases) = (linears / 128 * 52, LAYERS * (HIDDEN + 2 * 128) * 4);
    let norms = (2 * LAYERS + 1) * HIDDEN * 4;
    let ends = 2 * VOCAB * HIDDEN / 256 * 210;
    assert_eq!(memory["weights"], mbq3 + biases + norms + ends);
    let sum: u64 = ["weights", "kv_cache", "logits", "mmproj"].iter().map(|k| memory[*k].as_u64().unwrap()).sum();
    assert_eq!(memory["total"], sum);
    assert_eq!(memory["picture"]["per_tile"], 4);
    // Without --context the model's.
    assert_eq!(json(&out, &[])["memory"]["context"], 512);

    let (_, words, _) = inspect(&out, &[]);
    assert!(words.contains("needs mbq-convert's llama.cpp: 21 tensors are mbq3"), "{words}");
    assert!(!words.contains("blk.0.attn_q.weight"));
    assert!(inspect(&out, &["--tensors"]).1.contains("blk.0.attn_q.weight"));
    // An mmproj is described by itself, and is not a model.
    let mmproj = out.with_file_name("mmproj-out-f16.gguf");
    assert!(json(&mmproj, &[])["memory"].is_null());
    let (ok, _, err) = inspect(&mmproj, &["--mmproj", mmproj.to_str().unwrap()]);
    assert!(!ok && err.contains("is an mmproj itself"), "{err}");
    let (ok, _, err) = inspect(&out, &["--mmproj", out.to_str().unwrap()]);
    assert!(!ok && err.contains("is no mmproj"), "{err}");
}

#[test]
fn stock_types_need_no_patch() {
    let dir = tempfile::tempdir().unwrap();
    let out = model(dir.path(), &["--type", "q4_0"]);
    std::fs::remove_file(out.with_file_name("mmproj-out-f16.gguf")).unwrap();
    let found = json(&out, &[]);
    assert_eq!(found["runtime"], serde_json::json!({"stock": true, "reasons": []}));
    assert!(found["mmproj"].is_null() && found["memory"]["mmproj"].is_null());
    assert!(inspect(&out, &[]).1.contains("runs in any llama.cpp that knows qwen2"));
}

#[test]
fn what_was_written_is_sound() {
    let dir = tempfile::tempdir().unwrap();
    let out = model(dir.path(), &[]);
    let (sound, words, err) = inspect(&out, &["--verify"]);
    assert!(sound, "{words}{err}");
    assert!(words.contains("goes with mmproj-out-f16.gguf (pair "), "{words}");
    let found = json(&out, &["--verify"]);
    assert_eq!(found["verification"]["sound"], true);
    // The digests are the files' own, and stood in the record before anyone read the files.
    let record: Value = serde_json::from_slice(&std::fs::read(out.with_file_name("out.mbq.json")).unwrap()).unwrap();
    for (i, key) in ["model", "mmproj"].iter().enumerate() {
        assert_eq!(found["verification"]["digests"][i], record["summary"][key]["files"][0]);
    }
    let sum = std::process::Command::new("sha256sum").arg(&out).output();
    if let Ok(sum) = sum {
        assert!(text(&sum.stdout).starts_with(record["summary"]["model"]["files"][0]["sha256"].as_str().unwrap()));
    }
    // An mmproj finds the record that lists it.
    let mmproj = out.with_file_name("mmproj-out-f16.gguf");
    assert_eq!(json(&mmproj, &["--verify"])["verification"]["sound"], true);
    assert!(json(&mmproj, &["--verify"])["verification"]["record"].as_str().unwrap().ends_with("out.mbq.json"));
}

#[test]
fn damaged_numbers_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = model(dir.path(), &[]);
    let whole = std::fs::read(&out).unwrap();
    let restore = || std::fs::write(&out, &whole).unwrap();
    // The scale of the third block of a tensor of MBQ3, then an element of a norm.
    patch(&out, "blk.1.ffn_up.weight", 2 * 52, &[0x00, 0x7e]);
    unsound(&out, &["`blk.1.ffn_up.weight` (mbq3): 1 of 1024 blocks", "the first is block 2", "SHA-256"]);
    restore();
    patch(&out, "output_norm.weight", 4 * 5, &f32::INFINITY.to_le_bytes());
    unsound(&out, &["`output_norm.weight` (f32) holds NaN or infinity 1 times; first at element 5"]);
    restore();
    // Zero scales are told, and are no error by themselves: here only the digest is wrong.
    patch(&out, "blk.0.attn_q.weight", 0, &[0; 2]);
    unsound(
        &out,
        &["note: out.gguf: tensor `blk.0.attn_q.weight` (mbq3): 1 of 512 blocks have a scale of zero", "SHA-256"],
    );
    restore();
    patch(&out, "blk.0.attn_norm.weight", 0, &[0; HIDDEN * 4]);
    std::fs::remove_file(out.with_file_name("out.mbq.json")).unwrap();
    let (sound, words, _) = inspect(&out, &["--verify"]);
    assert!(sound && words.contains("`blk.0.attn_norm.weight` (f32) is zero throughout"), "{words}");
    assert!(words.contains("there is no record"), "{words}");
    // A file that was cut off.
    std::fs::write(&out, &whole[..whole.len() - 64]).unwrap();
    let (ok, _, err) = inspect(&out, &[]);
    assert!(!ok && err.contains("it is cut off; fetch or convert it again"), "{err}");
}

/// The offset of a tensor's data in the list of tensors, which follows its name, rank, dimensions and type.
fn listed_offset(bytes: &[u8], name: &str, rank: usize) -> usize {
    let needle = [&(name.len() as u64).to_le_bytes()[..], name.as_bytes()].concat();
    let at = bytes.windows(needle.len()).position(|w| w == needle).unwrap();
    at + needle.len() + 4 + 8 * rank + 4
}

#[test]
fn data_that_overlaps_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = model(dir.path(), &[]);
    let mut bytes = std::fs::read(&out).unwrap();
    let offset = |bytes: &[u8], name: &str| {
        let at = listed_offset(bytes, name, 1);
        (at, u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()))
    };
    let (at, before) = offset(&bytes, "blk.0.ffn_norm.weight");
    bytes[at..at + 8].copy_from_slice(&(before - 32).to_le_bytes());
    std::fs::write(&out, &bytes).unwrap();
    unsound(&out, &["`blk.0.ffn_norm.weight` begins at byte", "inside the data of `blk.0."]);
    bytes[at..at + 8].copy_from_slice(&(before + 1).to_le_bytes());
    std::fs::write(&out, &bytes).unwrap();
    unsound(&out, &["`blk.0.ffn_norm.weight` begins at byte", "which is no multiple of 32"]);
}

#[test]
fn records_and_mmprojs_of_others() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (out, rotated) = (model(dir.path(), &[]), model(other.path(), &["--rotate", "on"]));
    let record = out.with_file_name("out.mbq.json");
    let own = std::fs::read(&record).unwrap();
    std::fs::copy(rotated.with_file_name("out.mbq.json"), &record).unwrap();
    unsound(&out, &["the record out.mbq.json says", "the record is of pair"]);
    // An old record has no digests; a broken one is an error.
    let mut old: Value = serde_json::from_slice(&own).unwrap();
    for key in ["model", "mmproj"] {
        old["summary"][key].as_object_mut().unwrap().remove("files");
    }
    old.as_object_mut().unwrap().remove("origin");
    std::fs::write(&record, old.to_string()).unwrap();
    let (sound, words, err) = inspect(&out, &["--verify"]);
    assert!(sound && words.contains("an older version wrote it"), "{words}{err}");
    for (content, words) in [("{", "not a record of a conversion"), (r#"{"format": 2}"#, "record of format 2")] {
        std::fs::write(&record, content).unwrap();
        let (ok, _, err) = inspect(&out, &["--verify"]);
        assert!(!ok && err.contains(words), "{err}");
    }
    std::fs::write(&record, own).unwrap();
    let mmproj = rotated.with_file_name("mmproj-out-f16.gguf");
    let (sound, words, _) = inspect(&out, &["--verify", "--mmproj", mmproj.to_str().unwrap()]);
    assert!(!sound && words.contains("was made for another model"), "{words}");
}

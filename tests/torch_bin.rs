//! PyTorch's `.bin`: files of torch.save (tests/reference/torch_goldens.py), a whole model, and files that are refused.
mod common;
mod tiny;

use common::root;
use mbq_convert::checkpoint::{Checkpoint, Dtype};
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::path::Path;
use tiny::{Naming, Tensors, checkpoint, convert, tensors, text};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

fn golden(file: &str) -> Vec<u8> {
    std::fs::read(root().join("tests/golden/torch").join(file)).unwrap()
}

/// A folder with `pytorch_model.bin`, opened.
fn opened(bytes: &[u8]) -> Result<Checkpoint, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("pytorch_model.bin"), bytes).unwrap();
    Checkpoint::open(dir.path()).map_err(|e| e.to_string())
}

fn refused(bytes: &[u8], words: &[&str]) {
    let Err(message) = opened(bytes) else { panic!("{words:?} was let in") };
    for word in ["pytorch_model.bin"].iter().chain(words) {
        assert!(message.contains(word), "{word} is not in: {message}");
    }
}

#[test]
fn tensors_of_torch_save() {
    let expected: Json = serde_json::from_slice(&golden("expected.json")).unwrap();
    for (file, rows) in expected.as_object().unwrap() {
        let found = opened(&golden(file)).unwrap();
        assert_eq!(found.names().count(), rows.as_object().unwrap().len());
        for (name, row) in rows.as_object().unwrap() {
            let tensor = found.tensor(name).unwrap();
            assert_eq!(json!(tensor.shape), row[1], "{name}");
            let values = match tensor.dtype {
                Dtype::I64 => tensor.bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f32).collect(),
                _ => found.f32(name, tensor.shape).unwrap(),
            };
            let dtypes =
                [("float32", Dtype::F32), ("float16", Dtype::F16), ("bfloat16", Dtype::BF16), ("int64", Dtype::I64)];
            assert!(dtypes.contains(&(row[0].as_str().unwrap(), tensor.dtype)), "{name}");
            assert_eq!(json!(values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>()), row[2], "{name}");
        }
    }
}

#[test]
fn what_is_no_dictionary_of_tensors() {
    refused(&golden("command.bin"), &["posix.system", "not run"]);
    refused(&golden("transposed.bin"), &["`a`", "not contiguous", "[6, 4]"]);
    refused(&golden("epoch.bin"), &["`epoch`", "a number"]);
    refused(&golden("nested.bin"), &["`state_dict`", "a dictionary"]);
    refused(&golden("complex.bin"), &["torch.ComplexFloatStorage"]);
    refused(&golden("legacy.bin"), &["before 1.6", "save_pretrained"]);
}

/// Name and bytes of the entries of an archive.
type Entries = Vec<(String, Vec<u8>)>;

/// The entries of a golden's archive, with which `edit` does what it likes, in an archive again.
fn edited(file: &str, method: CompressionMethod, edit: &dyn Fn(&mut Entries)) -> Vec<u8> {
    let mut archive = ZipArchive::new(Cursor::new(golden(file))).unwrap();
    let mut entries = Vec::new();
    for i in 0..archive.len() {
        let mut entry = archive.by_index(i).unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        entries.push((entry.name().unwrap().into_owned(), bytes));
    }
    edit(&mut entries);
    archive_of(&entries, method)
}

fn archive_of(entries: &[(String, Vec<u8>)], method: CompressionMethod) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        zip.start_file(name.as_str(), SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// Every `from` in the bytes as `to`, of one length.
fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = bytes.to_vec();
    let places: Vec<usize> = (0..bytes.len() - from.len()).filter(|i| bytes[*i..].starts_with(from)).collect();
    assert!(!places.is_empty());
    places.iter().for_each(|at| bytes[*at..][..from.len()].copy_from_slice(to));
    bytes
}

/// module.bin with one entry changed.
fn of(name: &str, change: &dyn Fn(&mut Vec<u8>)) -> Vec<u8> {
    edited("module.bin", CompressionMethod::Stored, &|entries| {
        change(&mut entries.iter_mut().find(|(n, _)| n.ends_with(name)).unwrap().1);
    })
}

#[test]
fn archives_that_lie() {
    let stored = CompressionMethod::Stored;
    assert!(opened(&of("data/0", &|_| ())).is_ok());
    refused(&of("data/0", &|bytes| bytes.truncate(20)), &["`0.weight`", "6 values", "20 bytes"]);
    refused(&of("data/0", &|bytes| bytes.push(0)), &["`0.weight`", "25 bytes"]);
    refused(&of("byteorder", &|bytes| *bytes = b"big".to_vec()), &["little-endian"]);
    refused(&of("data.pkl", &|bytes| bytes.truncate(100)), &["pickle", "ends"]);
    refused(&of("data.pkl", &|bytes| bytes.push(b'.')), &["something is left"]);
    // INST, which calls.
    refused(&of("data.pkl", &|bytes| bytes.insert(2, b'i')), &["opcode 0x69", "not run"]);
    // A shape [3, 3] of a storage of 6: TUPLE2 of BININT1.
    let wide = |bytes: &mut Vec<u8>| *bytes = replaced(bytes, b"K\x02K\x03\x86", b"K\x03K\x03\x86");
    refused(&of("data.pkl", &wide), &["`0.weight`", "reaches beyond"]);
    let twice = |bytes: &mut Vec<u8>| *bytes = replaced(bytes, b"0.weight", b"1.weight");
    refused(&of("data.pkl", &twice), &["`1.weight`", "two names"]);
    let gone = edited("module.bin", stored, &|entries| entries.retain(|(name, _)| !name.ends_with("data/2")));
    refused(&gone, &["`1.weight`", "data/2 is missing"]);
    let more = edited("module.bin", stored, &|entries| entries.push(("module/data/9".into(), vec![0; 4])));
    refused(&more, &["module/data/9", "no tensor"]);
    refused(&edited("module.bin", CompressionMethod::Deflated, &|_| ()), &["compressed"]);
    // Two entries of one name, in the headers, too.
    refused(&replaced(&golden("module.bin"), b"module/data/3", b"module/data/2"), &["one name"]);
    let whole = golden("module.bin");
    for n in [0, 3, whole.len() / 2, whole.len() - 1] {
        refused(&whole[..n], &["truncated"]);
    }
}

/// A pickle as torch.save writes it, each tensor with a storage of its own.
fn saved(part: &BTreeMap<&str, &(Vec<usize>, Vec<f32>)>) -> Vec<u8> {
    let text = |t: &str| [&b"X"[..], &(t.len() as u32).to_le_bytes(), t.as_bytes()].concat();
    let int = |n: usize| [&b"J"[..], &(n as i32).to_le_bytes()].concat();
    let mut pickle = b"\x80\x02}(".to_vec();
    let mut entries = Vec::new();
    for (i, (name, (shape, values))) in part.iter().enumerate() {
        pickle.extend([text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(), text("storage")].concat());
        pickle.extend([b"ctorch\nFloatStorage\n".to_vec(), text(&i.to_string()), text("cpu")].concat());
        pickle.extend([int(values.len()), b"tQK\x00(".to_vec()].concat());
        shape.iter().for_each(|n| pickle.extend(int(*n)));
        pickle.extend(b"t(");
        (0..shape.len()).for_each(|d| pickle.extend(int(shape[d + 1..].iter().product())));
        pickle.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
        entries.push((format!("model/data/{i}"), values.iter().flat_map(|v| v.to_le_bytes()).collect()));
    }
    pickle.extend(b"u.");
    entries.insert(0, ("model/data.pkl".to_string(), pickle));
    archive_of(&entries, CompressionMethod::Stored)
}

/// Writes `tensors` as `.bin` in place of the folder's safetensors.
fn rewritten(dir: &Path, tensors: &Tensors, shards: usize) {
    for file in std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()) {
        if file.to_string_lossy().contains(".safetensors") {
            std::fs::remove_file(file).unwrap();
        }
    }
    let mut map = serde_json::Map::new();
    for shard in 0..shards {
        let file = match shards {
            1 => "pytorch_model.bin".to_string(),
            _ => format!("pytorch_model-{:05}-of-{shards:05}.bin", shard + 1),
        };
        let part = tensors.iter().enumerate().filter(|(i, _)| i % shards == shard);
        let part: BTreeMap<&str, _> = part.map(|(_, (name, t))| (name.as_str(), t)).collect();
        part.keys().for_each(|name| drop(map.insert(name.to_string(), file.clone().into())));
        std::fs::write(dir.join(file), saved(&part)).unwrap();
    }
    if shards > 1 {
        let index = json!({"metadata": {}, "weight_map": map});
        std::fs::write(dir.join("pytorch_model.bin.index.json"), index.to_string()).unwrap();
    }
}

#[test]
fn a_model_is_the_same_as_safetensors_and_as_bin() {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, 1);
    let write = |name: &str| {
        let out = parent.path().join(name);
        let done = convert(&model, &out.join("model.gguf"), &["--type", "q8_0"]);
        assert!(done.status.success(), "{}", text(&done.stderr));
        ["model.gguf", "mmproj-model-f16.gguf"].map(|file| std::fs::read(out.join(file)).unwrap())
    };
    ["a", "b", "c", "d"].iter().for_each(|name| std::fs::create_dir(parent.path().join(name)).unwrap());
    let safetensors = write("a");
    // safetensors go first, whatever lies beside them.
    std::fs::write(model.join("pytorch_model.bin"), "broken").unwrap();
    assert!(write("b") == safetensors);
    rewritten(&model, &tensors(), 1);
    assert!(write("c") == safetensors);
    std::fs::remove_file(model.join("pytorch_model.bin")).unwrap();
    rewritten(&model, &tensors(), 3);
    assert!(write("d") == safetensors);
    std::fs::remove_file(model.join("pytorch_model-00002-of-00003.bin")).unwrap();
    let done = convert(&model, &parent.path().join("model.gguf"), &[]);
    assert!(text(&done.stderr).contains("pytorch_model.bin.index.json: names shard"), "{}", text(&done.stderr));
}

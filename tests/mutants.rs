//! A slice of tests/bench/mutants.py: real inputs, damaged field by field, end in success or in a clear error.
mod common;
mod tiny;

use common::{convert, root, runtime_dir};
use mbq_convert::ggml::GgmlType;
use mbq_convert::gguf::{Array, GgufFile, Header, Value};
use mbq_convert::runtime::assumed;
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
        mutants(folder.path(), kinds, count);
    }
}

/// Runs a script of tests/bench; a machine may have no Python.
fn python(script: &str, arguments: &[&std::ffi::OsStr]) {
    match Command::new("python3").arg(root().join("tests/bench").join(script)).args(arguments).output() {
        Ok(done) => assert!(done.status.success(), "{}{}", text(&done.stdout), text(&done.stderr)),
        Err(e) => eprintln!("skipped: python3: {e}"),
    }
}

fn mutants(folder: &Path, kinds: &str, count: &str) {
    let program = env!("CARGO_BIN_EXE_mbq-convert").as_ref();
    python(
        "mutants.py",
        &[program, folder.as_ref(), "--only".as_ref(), kinds.as_ref(), "--count".as_ref(), count.as_ref()],
    );
}

/// The same of published metadata, with small sizes and zeros for weights. Skipped unless MBQ_SHARED names a folder with
/// `published/`.
#[test]
fn a_slice_of_published_metadata() {
    let Some(shared) = std::env::var_os("MBQ_SHARED") else {
        return eprintln!("skipped: MBQ_SHARED does not name the folder of published metadata");
    };
    let folder = tempfile::tempdir().unwrap();
    python("published.py", &[Path::new(&shared).join("published").as_ref(), folder.path().as_ref()]);
    mutants(folder.path(), "convert", "120");
}

/// A tower of one block, 8 wide, 2x2 patches of 4, changed by `edit`: what `assumed::check` says of it.
fn checked(edit: impl Fn(&mut Header), shapes: &[(&str, &[usize])]) -> Result<(), String> {
    checked_with(edit, shapes, &[])
}

/// The same with `more` tensors.
fn checked_with(edit: impl Fn(&mut Header), shapes: &[(&str, &[usize])], more: &[&str]) -> Result<(), String> {
    let mut header = Header::default();
    header.metadata.set("general.architecture", "clip").set("clip.projector_type", "mlp");
    header.metadata.set("clip.vision.attention.layer_norm_epsilon", 1e-6f32).set("clip.use_gelu", true);
    let counts = [
        ("image_size", 8),
        ("patch_size", 4),
        ("embedding_length", 8),
        ("feed_forward_length", 16),
        ("block_count", 1),
        ("attention.head_count", 2),
    ];
    for (key, n) in counts {
        header.metadata.set(&format!("clip.vision.{key}"), n as u32);
    }
    header.metadata.set_array("clip.vision.image_std", [0.5f32; 3].as_slice());
    edit(&mut header);
    let usual: [(&str, &[usize]); 4] = [
        ("v.blk.0.attn_q.weight", &[8, 8]),
        ("v.blk.0.ffn_up.weight", &[8, 16]),
        ("v.position_embd.weight", &[8, 4]),
        ("v.patch_embd.weight", &[4, 4, 3, 8]),
    ];
    for (name, shape) in usual {
        let shape = shapes.iter().find(|(n, _)| *n == name).map_or(shape, |(_, shape)| shape);
        header.add_tensor(name, GgmlType::F32, shape).unwrap();
    }
    for name in more {
        let shape: &[usize] = match *name {
            "v.blk.1.ffn_up.weight" => &[8, 16],
            name if name.ends_with("weight") => &[8, 8],
            _ => &[8],
        };
        let shape = shapes.iter().find(|(n, _)| n == name).map_or(shape, |(_, shape)| shape);
        header.add_tensor(name, GgmlType::F32, shape).unwrap();
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut bytes = header.encode();
    bytes.resize(bytes.len() + header.data_bytes() as usize, 0);
    std::fs::write(file.path(), bytes).unwrap();
    assumed::check(&GgufFile::open(file.path()).unwrap()).map_err(|e| e.to_string())
}

/// A type that there is none of, as the reader of GGUF files must not see it.
#[test]
fn types_beyond_255() {
    let mut header = Header::default();
    header.metadata.set("general.architecture", "qwen2");
    header.add_tensor("one.weight", GgmlType::F32, &[8]).unwrap();
    let mut bytes = header.encode();
    let name = bytes.windows(10).position(|at| at == b"one.weight").unwrap();
    // Behind the name: how many dimensions, one dimension, the type.
    bytes[name + 10 + 4 + 8..][..4].copy_from_slice(&300u32.to_le_bytes());
    bytes.resize(bytes.len() + header.data_bytes() as usize, 0);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let error = assumed::check(&GgufFile::open(file.path()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("one.weight") && error.contains("type 300"), "{error}");
}

#[test]
fn keys_that_clip_would_not_survive() {
    assert_eq!(checked(|_| (), &[]), Ok(()));
    let set = |key: &'static str, value: Value| {
        let with = |h: &mut Header| {
            h.metadata.set(key, value.clone());
        };
        let error = checked(with, &[]).unwrap_err();
        assert!(error.contains(key) || error.contains(key.trim_start_matches("clip.vision.")), "{key}: {error}");
    };
    set("clip.use_gelu", 1u32.into());
    set("clip.projector_type", 1u32.into());
    set("general.name", true.into());
    set("general.alignment", 8u32.into());
    set("clip.vision.image_size", 8i32.into());
    set("clip.vision.patch_size", 0u32.into());
    set("clip.vision.image_size", 3u32.into());
    set("clip.vision.image_size", (1u32 << 20).into());
    set("clip.vision.attention.head_count", 0u32.into());
    set("clip.vision.attention.head_count", 3u32.into());
    set("clip.vision.attention.layer_norm_epsilon", f32::NAN.into());
    set("clip.vision.attention.layer_norm_epsilon", (-1f32).into());
    set("clip.vision.image_std", Value::Array([0.5f32, 0.0, 0.5].as_slice().into()));
    set("clip.vision.image_grid_pinpoints", Value::Array([8i32, -8].as_slice().into()));
    set("qwen2.rope.freq_base", 0f32.into());
    set("clip.vision.spatial_merge_size", 0u32.into());
}

#[test]
fn keys_of_a_language_model_that_llama_would_not_survive() {
    let refused = |key: &str, value: Value| {
        let model = |h: &mut Header| {
            h.metadata.set("general.architecture", "qwen2").set("qwen2.block_count", 1u32);
            h.metadata.set("qwen2.embedding_length", 8u32).set("qwen2.attention.head_count", 2u32);
            h.metadata.set_array("tokenizer.ggml.tokens", Array::strings(&["a", "b"]));
            h.metadata.set(key, value.clone());
        };
        let error = checked(model, &[]).unwrap_err();
        assert!(error.contains(key), "{key}: {error}");
    };
    refused("tokenizer.ggml.eos_token_id", 2u32.into());
    refused("tokenizer.ggml.scores", Value::Array([0f32].as_slice().into()));
    refused("qwen2.block_count", u32::MAX.into());
    refused("qwen2.n_deepstack_layers", 1u32.into());
    refused("qwen2.rope.dimension_count", 6u32.into());
    refused("qwen2.rope.dimension_count", 3u32.into());
    let split = |model: &str, pre: Option<&str>| {
        let vocabulary = |h: &mut Header| {
            h.metadata.set("general.architecture", "llama").set("tokenizer.ggml.model", model);
            if let Some(pre) = pre {
                h.metadata.set("tokenizer.ggml.pre", pre);
            }
        };
        checked(vocabulary, &[])
    };
    assert_eq!([split("llama", None), split("gpt2", Some("default"))], [Ok(()), Ok(())]);
    assert!(split("gpt2", None).unwrap_err().contains("tokenizer.ggml.pre"));
}

#[test]
fn biases_that_only_some_have() {
    const SECOND: [&str; 2] = ["v.blk.1.attn_q.weight", "v.blk.1.ffn_up.weight"];
    let with = |more: &[&str]| checked_with(|_| (), &[], &[&SECOND, more].concat());
    assert_eq!(with(&["v.blk.0.attn_q.bias", "v.blk.1.attn_q.bias"]), Ok(()));
    assert!(with(&["v.blk.0.attn_q.bias"]).unwrap_err().contains("`v.blk.1.attn_q.bias` is missing"));
    let linears = ["mm.0.weight", "mm.2.weight", "mm.0.bias"];
    assert_eq!(with(&[&linears[..], &["mm.2.bias"]].concat()), Ok(()));
    assert_eq!(with(&linears[..2]), Ok(()));
    assert!(with(&linears).unwrap_err().contains("`mm.2.bias` is missing"));
}

#[test]
fn tensors_that_clip_does_not_read() {
    let with = |name: &str| checked_with(|_| (), &[], &[name]);
    for name in ["v.patch_embd.bias", "v.post_ln.bias", "mm.a.fc.weight", "t.blk.0.ln1.bias"] {
        assert_eq!(with(name), Ok(()), "{name}");
    }
    for name in [
        "v.patch_embd.biasx",
        "v.patch_embd.bia3",
        "w.patch_embd.bias",
        "v.blk.0.attn_r.bias",
        "mm.9.weight",
        "v.deepstack.0.fc3.bias",
    ] {
        assert!(with(name).unwrap_err().contains(&format!("`{name}` is none that llama.cpp reads")), "{name}");
    }
    let other = |h: &mut Header| {
        h.metadata.set("clip.projector_type", "pixtral");
    };
    assert_eq!(checked_with(other, &[], &["v.patch_embd.biasx"]), Ok(()), "another tower's names are not known");
}

#[test]
fn shapes_that_are_not_the_towers() {
    for (name, shape) in [
        ("v.blk.0.attn_q.weight", &[8usize, 4] as &[usize]),
        ("v.blk.0.ffn_up.weight", &[9, 16]),
        ("v.position_embd.weight", &[8, 3]),
        ("v.position_embd.weight", &[8, 16]),
        ("v.patch_embd.weight", &[2, 4, 3, 8]),
    ] {
        let error = checked(|_| (), &[(name, shape)]).unwrap_err();
        assert!(error.contains(name), "{error}");
    }
    // As older converters have it.
    assert_eq!(checked(|_| (), &[("v.blk.0.ffn_up.weight", &[16, 8])]), Ok(()));
    // Without the key clip.cpp merges nothing.
    let internvl = |merge: Option<u32>| {
        let header = |h: &mut Header| {
            h.metadata.set("clip.projector_type", "internvl");
            if let Some(merge) = merge {
                h.metadata.set("clip.vision.projector.scale_factor", merge);
            }
        };
        checked_with(header, &[("mm.model.mlp.0.weight", &[32])], &["mm.model.mlp.0.weight"])
    };
    assert_eq!(internvl(Some(2)), Ok(()));
    assert!(internvl(None).unwrap_err().contains("mm.model.mlp.0.weight"));
}

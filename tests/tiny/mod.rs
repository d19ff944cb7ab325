//! A small LLaVA-OneVision checkpoint made up on the spot, and the program to run on it.
#![allow(dead_code)] // Each test crate uses its own part.
pub mod card;
pub mod llava;

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub const HIDDEN: usize = 256;
pub const INNER: usize = 512;
pub const LAYERS: usize = 3;
pub const VOCAB: usize = 320;
const KV: usize = 128;
const VISION: usize = 64;

/// Names of the published files (transformers 4), or those that transformers 5 writes.
#[derive(Clone, Copy, PartialEq)]
pub enum Naming {
    Published,
    Nested,
}

/// Tensor name -> (shape, values).
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Values in (-1, 1) that depend on `seed` only, and that bf16 holds exactly.
pub fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as i64
    };
    (0..n).map(|_| half::bf16::from_f32((next() % 2001 - 1000) as f32 / 1000.0).to_f32()).collect()
}

/// Values that follow from a tensor's name, `around` a number with a spread of `scale`: what tests/reference gives it, too.
pub fn named(name: &str, shape: &[usize], scale: f32, around: f32) -> (Vec<usize>, Vec<f32>) {
    let seed = name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    let value = |v: f32| half::bf16::from_f32(v * scale + around).to_f32();
    (shape.to_vec(), values(shape.iter().product(), seed).into_iter().map(value).collect())
}

/// The same: gains, of which a name has one of `gains`, are around 1, everything else small.
pub fn small(name: &str, shape: &[usize], gains: &[&str]) -> (Vec<usize>, Vec<f32>) {
    let gain = name.ends_with("weight") && gains.iter().any(|part| name.contains(part));
    let (scale, around) = if gain { (0.1, 1.0) } else { (0.15, 0.0) };
    named(name, shape, scale, around)
}

pub fn tensors() -> Tensors {
    let mut all = Tensors::new();
    let mut add = |name: String, shape: &[usize]| drop(all.insert(name.clone(), named(&name, shape, 1.0, 0.0)));
    add("language_model.model.embed_tokens.weight".into(), &[VOCAB, HIDDEN]);
    add("language_model.lm_head.weight".into(), &[VOCAB, HIDDEN]);
    add("language_model.model.norm.weight".into(), &[HIDDEN]);
    for i in 0..LAYERS {
        let layer = |part: &str| format!("language_model.model.layers.{i}.{part}");
        add(layer("input_layernorm.weight"), &[HIDDEN]);
        add(layer("post_attention_layernorm.weight"), &[HIDDEN]);
        for (part, rows) in [("q", HIDDEN), ("k", KV), ("v", KV)] {
            add(layer(&format!("self_attn.{part}_proj.weight")), &[rows, HIDDEN]);
            add(layer(&format!("self_attn.{part}_proj.bias")), &[rows]);
        }
        add(layer("self_attn.o_proj.weight"), &[HIDDEN, HIDDEN]);
        add(layer("mlp.gate_proj.weight"), &[INNER, HIDDEN]);
        add(layer("mlp.up_proj.weight"), &[INNER, HIDDEN]);
        add(layer("mlp.down_proj.weight"), &[HIDDEN, INNER]);
    }
    let tower = |part: &str| format!("vision_tower.vision_model.{part}");
    add(tower("embeddings.patch_embedding.weight"), &[VISION, 3, 14, 14]);
    add(tower("embeddings.patch_embedding.bias"), &[VISION]);
    add(tower("embeddings.position_embedding.weight"), &[4, VISION]);
    for i in 0..2 {
        let layer = |part: &str| tower(&format!("encoder.layers.{i}.{part}"));
        for (part, rows, cols) in [
            ("self_attn.q_proj", VISION, VISION),
            ("self_attn.k_proj", VISION, VISION),
            ("self_attn.v_proj", VISION, VISION),
            ("self_attn.out_proj", VISION, VISION),
            ("mlp.fc1", 2 * VISION, VISION),
            ("mlp.fc2", VISION, 2 * VISION),
        ] {
            add(layer(&format!("{part}.weight")), &[rows, cols]);
            add(layer(&format!("{part}.bias")), &[rows]);
        }
        for norm in ["layer_norm1", "layer_norm2"] {
            add(layer(&format!("{norm}.weight")), &[VISION]);
            add(layer(&format!("{norm}.bias")), &[VISION]);
        }
    }
    add(tower("post_layernorm.weight"), &[VISION]);
    add(tower("post_layernorm.bias"), &[VISION]);
    for (name, cols) in [("linear_1", VISION), ("linear_2", HIDDEN)] {
        add(format!("multi_modal_projector.{name}.weight"), &[HIDDEN, cols]);
        add(format!("multi_modal_projector.{name}.bias"), &[HIDDEN]);
    }
    add("image_newline".into(), &[HIDDEN]);
    all
}

/// The name that transformers 5 gives the tensor.
fn nested(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("language_model.model.") {
        return format!("model.language_model.{rest}");
    }
    if let Some(rest) = name.strip_prefix("language_model.lm_head.") {
        return format!("lm_head.{rest}");
    }
    if let Some(rest) = name.strip_prefix("vision_tower.vision_model.") {
        return format!("model.vision_tower.{rest}");
    }
    format!("model.{name}")
}

/// A safetensors file of bf16 tensors, written by hand.
pub fn safetensors(tensors: &BTreeMap<&str, (&[usize], &[f32])>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (shape, values)) in tensors {
        let start = data.len();
        values.iter().for_each(|v| data.extend(half::bf16::from_f32(*v).to_le_bytes()));
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.to_string(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    [(header.len() as u64).to_le_bytes().to_vec(), header, data].concat()
}

pub fn config() -> Value {
    json!({
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]],
        "image_token_index": 300,
        "projector_hidden_act": "gelu",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": false,
        "text_config": {
            "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "rope_theta": 1000000.0,
            "max_position_embeddings": 512
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": VISION, "intermediate_size": 2 * VISION,
            "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh"
        }
    })
}

/// The characters that byte-level BPE writes the bytes 0..=255 as.
fn byte_characters() -> Vec<char> {
    let plain = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    (0..256u32)
        .map(|b| {
            let code = if plain(b) { b } else { next };
            next += u32::from(!plain(b));
            char::from_u32(code).unwrap()
        })
        .collect()
}

pub fn tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    for (id, c) in byte_characters().into_iter().enumerate() {
        vocab.insert(c.to_string(), id.into());
    }
    for (i, token) in ["he", "ll", "Ġt", "hell"].iter().enumerate() {
        vocab.insert(token.to_string(), (256 + i).into());
    }
    // Up to the added tokens: their ids follow the vocabulary's without a gap, whatever the file says.
    for id in 260..298 {
        vocab.insert(format!("unmergeable{id}"), id.into());
    }
    let regex = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(298, "<|im_start|>", true), added(299, "<|im_end|>", true), added(300, "<image>", true),
                         added(301, "<tool>", false)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}, byte_level]},
        "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": ["h e", "l l", "Ġ t", "he ll"]}
    })
}

fn added(id: usize, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": special})
}

/// The tokenizer with these special tokens, from id 298 on, in place of its own.
pub fn tokenizer_with(special: &[&str]) -> Value {
    let mut json = tokenizer();
    json["added_tokens"] = special.iter().enumerate().map(|(i, name)| added(298 + i, name, true)).collect();
    json
}

/// Writes the small files: everything but the weights.
pub fn write_configuration(dir: &Path) {
    let write = |file: &str, json: &Value| std::fs::write(dir.join(file), json.to_string()).unwrap();
    write("config.json", &config());
    write("tokenizer.json", &tokenizer());
    write("tokenizer_config.json", &json!({"eos_token": "<|im_end|>", "pad_token": {"content": "<|im_start|>"}}));
    write(
        "preprocessor_config.json",
        &json!({"image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]], "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.25, 0.5], "size": {"height": 28, "width": 28}, "resample": 3}),
    );
}

/// Writes a checkpoint of `shards` files below `parent`, in a directory called `tiny-model`.
pub fn checkpoint(parent: &Path, naming: Naming, shards: usize) -> PathBuf {
    checkpoint_with(parent, naming, shards, tensors())
}

pub fn checkpoint_with(parent: &Path, naming: Naming, shards: usize, tensors: Tensors) -> PathBuf {
    let dir = parent.join("tiny-model");
    std::fs::create_dir_all(&dir).unwrap();
    write_configuration(&dir);
    let stored: Tensors = match naming {
        Naming::Published => tensors,
        Naming::Nested => tensors.into_iter().map(|(name, t)| (nested(&name), t)).collect(),
    };
    write_weights(&dir, &stored, shards);
    dir
}

/// Writes the tensors into `shards` files, with an index where there are several.
pub fn write_weights(dir: &Path, stored: &Tensors, shards: usize) {
    let mut map = serde_json::Map::new();
    for shard in 0..shards {
        let file = match shards {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{shards:05}.safetensors", shard + 1),
        };
        let part = stored.iter().enumerate().filter(|(i, _)| i % shards == shard);
        let part: BTreeMap<_, _> = part.map(|(_, (n, (s, v)))| (n.as_str(), (s.as_slice(), v.as_slice()))).collect();
        part.keys().for_each(|name| drop(map.insert(name.to_string(), file.clone().into())));
        std::fs::write(dir.join(file), safetensors(&part)).unwrap();
    }
    if shards > 1 {
        let index = json!({"metadata": {}, "weight_map": map});
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

/// The program, with no hub or proxy settings of the caller's.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mbq-convert"));
    for (name, _) in std::env::vars_os() {
        let upper = name.to_string_lossy().to_uppercase();
        if upper.starts_with("HF_") || upper.ends_with("_PROXY") {
            command.env_remove(name);
        }
    }
    command
}

/// Copies a checkpoint into the folder that `MBQ_FIXTURES` names, where it is set: inputs for tests/bench/mutants.py.
fn keep(model: &Path) {
    let Some(folder) = std::env::var_os("MBQ_FIXTURES").map(PathBuf::from).filter(|_| model.is_dir()) else { return };
    let family = std::env::current_exe().unwrap().file_stem().unwrap().to_string_lossy().into_owned();
    let family = family.rsplit_once('-').unwrap().0;
    let kept =
        (1..).map(|n| folder.join(format!("{family}-{n}"))).find(|dir| std::fs::create_dir(dir).is_ok()).unwrap();
    for file in std::fs::read_dir(model).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        std::fs::copy(&file, kept.join(file.file_name().unwrap())).unwrap();
    }
}

pub fn convert(model: &Path, output: &Path, args: &[&str]) -> Output {
    keep(model);
    program().arg(model).arg("-o").arg(output).args(["--method", "rtn"]).args(args).output().unwrap()
}

/// `edit` of its JSON `file` makes the checkpoint `dir`, alone in its folder, one that is refused, with these words and no output.
pub fn refused(dir: &Path, file: &str, edit: impl Fn(&mut Value), words: &[&str]) {
    let path = dir.join(file);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    let parent = dir.parent().unwrap();
    let done = convert(dir, &parent.join("o.gguf"), &["--type", "f16"]);
    let message = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{words:?}: {message}");
    words.iter().for_each(|word| assert!(message.contains(word), "{word}: {message}"));
    assert_eq!(listing(parent), [dir.file_name().unwrap().to_str().unwrap()]);
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The names in a directory.
pub fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

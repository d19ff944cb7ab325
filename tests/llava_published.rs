//! The published metadata of LLaVA 1.5 and LLaVA-NeXT, 7B, is read without a refusal, and token ids of the published
//! tokenizer are transformers'. Skipped unless MBQ_SHARED names a folder with `published/`.
mod common;
mod tiny;

use common::{root, runtime_dir};
use mbq_convert::checkpoint::Checkpoint;
use mbq_convert::front::{FoundModel, Pair};
use mbq_convert::runtime::engine::{Compute, Model, Runtime};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn published() -> Option<PathBuf> {
    let shared = std::env::var_os("MBQ_SHARED").map(|shared| Path::new(&shared).join("published"));
    if shared.is_none() {
        eprintln!("skipped: MBQ_SHARED does not name the folder of published metadata");
    }
    shared
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The tensors' shapes, f16, in a file of which only the header takes room: the values are zero.
fn sparse_weights(path: &Path, shapes: &BTreeMap<String, Vec<usize>>) {
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in shapes {
        let size = 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}));
        at += size;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    std::fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_slice()].concat()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len((8 + header.len() + at) as u64).unwrap();
}

/// Shapes of a 7B, by the names in the published index; `inner` and `kv` are Llama's or Mistral's.
fn shapes(names: impl Iterator<Item = String>, inner: usize, kv: usize) -> BTreeMap<String, Vec<usize>> {
    let shape = |name: &str| match () {
        () if name.contains("embed_tokens") || name.contains("lm_head") => vec![32064, 4096],
        () if name.contains("patch_embedding") => vec![1024, 3, 14, 14],
        () if name.contains("position_embedding") => vec![577, 1024],
        () if name.contains("linear_1.weight") => vec![4096, 1024],
        () if name.contains("linear_2.weight") => vec![4096, 4096],
        () if name.starts_with("vision_tower") && name.ends_with("fc1.weight") => vec![4096, 1024],
        () if name.starts_with("vision_tower") && name.ends_with("fc2.weight") => vec![1024, 4096],
        () if name.starts_with("vision_tower") && name.ends_with("fc1.bias") => vec![4096],
        () if name.starts_with("vision_tower") && name.ends_with("_proj.weight") => vec![1024, 1024],
        () if name.starts_with("vision_tower") => vec![1024],
        () if name.contains("k_proj") || name.contains("v_proj") => vec![kv, 4096],
        () if name.contains("gate_proj") || name.contains("up_proj") => vec![inner, 4096],
        () if name.contains("down_proj") => vec![4096, inner],
        () if name.contains("_proj.weight") => vec![4096, 4096],
        () => vec![4096],
    };
    names.map(|name| (name.clone(), shape(&name))).collect()
}

fn opened(dir: &Path, check: impl Fn(&Pair)) {
    let model = FoundModel::Checkpoint { checkpoint: Checkpoint::open(dir).unwrap(), repository: None };
    check(&model.pair().unwrap());
}

fn copy(from: &Path, to: &Path, files: &[&str]) {
    for file in files {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

#[test]
fn llava_1_5() {
    let Some(published) = published() else { return };
    let source = published.join("llava-hf--llava-1.5-7b-hf");
    let folder = tempfile::tempdir().unwrap();
    let files = [
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.json",
        "generation_config.json",
    ];
    copy(&source, folder.path(), &files);
    copy(
        &source,
        folder.path(),
        &["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
    );
    let index = read(&source.join("model.safetensors.index.json"));
    let names = index["weight_map"].as_object().unwrap().keys().cloned();
    sparse_weights(&folder.path().join("model.safetensors"), &shapes(names, 11008, 4096));
    let check = |pair: &Pair| {
        let keys = &pair.text.metadata;
        let number = |key: &str| keys.get(key).and_then(|v| v.as_u64());
        // LlamaConfig's defaults, which the file leaves out.
        assert_eq!((number("llama.block_count"), number("llama.feed_forward_length")), (Some(32), Some(11008)));
        assert_eq!(
            (number("llama.context_length"), number("tokenizer.ggml.padding_token_id")),
            (Some(4096), Some(32001))
        );
        assert!(keys.get("tokenizer.chat_template").is_some());
        let mmproj = pair.mmproj.as_ref().unwrap();
        assert_eq!(mmproj.metadata.get("clip.vision.block_count").and_then(|v| v.as_u64()), Some(23));
    };
    opened(folder.path(), check);
    // As transformers 5 saves it.
    let saved = published.join("finetune--llava-1.5-7b-hf-saved-by-transformers-5");
    std::fs::remove_file(folder.path().join("preprocessor_config.json")).unwrap();
    copy(&saved, folder.path(), &["processor_config.json", "tokenizer_config.json", "chat_template.jinja"]);
    std::fs::remove_file(folder.path().join("chat_template.json")).unwrap();
    opened(folder.path(), check);
}

#[test]
fn llava_next() {
    let Some(published) = published() else { return };
    let source = published.join("llava-hf--llava-v1.6-mistral-7b-hf");
    let vicuna = published.join("llava-hf--llava-v1.6-vicuna-7b-hf");
    let one = published.join("llava-hf--llava-1.5-7b-hf");
    let index = read(&one.join("model.safetensors.index.json"));
    let names = || index["weight_map"].as_object().unwrap().keys().cloned().chain(["image_newline".to_string()]);
    for mistral in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let mut config = read(&source.join("config.quoted.json"));
        // The quotation has 2, with a note that the file has 24.
        config["vision_config"]["num_hidden_layers"] = 24.into();
        let template = if mistral { &source } else { &vicuna };
        if !mistral {
            config["text_config"] = read(&one.join("config.json"))["text_config"].clone();
        }
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        std::fs::copy(template.join("chat_template.quoted.jinja"), dir.join("chat_template.jinja")).unwrap();
        std::fs::copy(source.join("preprocessor_config.quoted.json"), dir.join("preprocessor_config.json")).unwrap();
        copy(&one, dir, &["tokenizer.json", "tokenizer_config.json"]);
        let (inner, kv) = if mistral { (14336, 1024) } else { (11008, 4096) };
        sparse_weights(&dir.join("model.safetensors"), &shapes(names(), inner, kv));
        opened(dir, |pair| {
            let number = |key: &str| pair.text.metadata.get(key).and_then(|v| v.as_u64());
            assert_eq!(number("llama.feed_forward_length"), Some(inner as u64));
            assert_eq!(number("llama.attention.head_count_kv"), Some(kv as u64 / 128));
            assert_eq!(number("llama.context_length"), Some(if mistral { 32768 } else { 4096 }));
        });
    }
}

/// The name that LLaVA's own code gives a published tensor, its tower inside.
fn original(name: &str) -> String {
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    let name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0");
    let name = name.replace("multi_modal_projector.linear_2", "model.mm_projector.2");
    let name = if name == "image_newline" { "model.image_newline".into() } else { name };
    name.replace("vision_tower.vision_model", "model.vision_tower.vision_tower.vision_model")
}

/// LLaVA's own layout of 1.5 and 1.6, where the tower's files are not needed.
#[test]
fn own_layout() {
    let Some(published) = published() else { return };
    let one = published.join("llava-hf--llava-1.5-7b-hf");
    let index = read(&one.join("model.safetensors.index.json"));
    let names = || index["weight_map"].as_object().unwrap().keys().cloned();
    let mut tokenizer = read(&one.join("tokenizer.json"));
    tokenizer["added_tokens"].as_array_mut().unwrap().retain(|t| t["id"].as_u64() < Some(32000));
    for (folder, config, next) in [
        ("liuhaotian--llava-v1.5-7b", "config.json", false),
        ("liuhaotian--llava-v1.6-vicuna-7b", "config.quoted.json", true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(published.join(folder).join(config), dir.path().join("config.json")).unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let names = names().chain(next.then(|| "image_newline".to_string()));
        let shapes = shapes(names, 11008, 4096).into_iter().map(|(name, mut shape)| {
            if shape[0] == 32064 {
                shape[0] = 32000;
            }
            (original(&name), shape)
        });
        sparse_weights(&dir.path().join("model.safetensors"), &shapes.collect());
        opened(dir.path(), |pair| {
            let template = pair.text.metadata.get("tokenizer.chat_template").unwrap().as_str().unwrap();
            assert!(template.contains("ASSISTANT:") && pair.notes.iter().any(|note| note.contains("no chat template")));
            let vision = &pair.mmproj.as_ref().unwrap().metadata;
            let number = |key: &str| vision.get(&format!("clip.vision.{key}")).and_then(|v| v.as_u64());
            assert_eq!((number("block_count"), number("image_size")), (Some(23), Some(336)));
            assert_eq!(vision.get("clip.vision.pad_to_square").is_some(), !next);
            let mean = vision.get("clip.vision.image_mean").unwrap().as_array().unwrap().iter().next().unwrap();
            assert_eq!(mean.as_f64().map(|m| m as f32), Some(0.481_454_66));
        });
    }
}

/// The same of a fine-tuned LLaVA-OneVision 7B, and MinerU's, which is another class.
#[test]
fn own_layout_of_onevision() {
    let Some(published) = published() else { return };
    let source = published.join("finetune--llava-onevision-qwen2-7b-si-lmms");
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    copy(&source, dir, &["config.json", "generation_config.json"]);
    copy(&published.join("Qwen--Qwen3-tokenizer"), dir, &["tokenizer.json"]);
    // The tokenizer is another's.
    let mut tokens = read(&source.join("tokenizer_config.json"));
    tokens.as_object_mut().unwrap().remove("added_tokens_decoder");
    std::fs::write(dir.join("tokenizer_config.json"), tokens.to_string()).unwrap();
    let index = read(&source.join("model.safetensors.index.json"));
    let shape = |name: &String| match name
        .rsplit_once("layers.")
        .map_or(name.as_str(), |(_, part)| part.split_once('.').unwrap().1)
    {
        "model.embed_tokens.weight" | "lm_head.weight" => vec![152_064, 3584],
        "self_attn.q_proj.weight"
        | "self_attn.k_proj.weight"
        | "self_attn.v_proj.weight"
        | "self_attn.out_proj.weight"
            if name.contains("vision") =>
        {
            vec![1152, 1152]
        }
        "mlp.fc1.weight" => vec![4304, 1152],
        "mlp.fc1.bias" => vec![4304],
        "mlp.fc2.weight" => vec![1152, 4304],
        "self_attn.q_proj.weight" | "self_attn.o_proj.weight" => vec![3584, 3584],
        "self_attn.k_proj.weight" | "self_attn.v_proj.weight" => vec![512, 3584],
        "self_attn.k_proj.bias" | "self_attn.v_proj.bias" if !name.contains("vision") => vec![512],
        "mlp.gate_proj.weight" | "mlp.up_proj.weight" => vec![18944, 3584],
        "mlp.down_proj.weight" => vec![3584, 18944],
        "model.mm_projector.0.weight" => vec![3584, 1152],
        "model.mm_projector.2.weight" => vec![3584, 3584],
        part if part.ends_with("patch_embedding.weight") => vec![1152, 3, 14, 14],
        part if part.ends_with("position_embedding.weight") => vec![729, 1152],
        _ if name.contains("vision") => vec![1152],
        _ => vec![3584],
    };
    let shapes = index["weight_map"].as_object().unwrap().keys().map(|name| (name.clone(), shape(name))).collect();
    sparse_weights(&dir.join("model.safetensors"), &shapes);
    opened(dir, |pair| {
        let vision = &pair.mmproj.as_ref().unwrap().metadata;
        let number = |key: &str| vision.get(&format!("clip.vision.{key}")).and_then(|v| v.as_u64());
        assert_eq!((number("block_count"), number("image_size"), number("anyres_max")), (Some(26), Some(384), Some(8)));
        let template = pair.text.metadata.get("tokenizer.chat_template").unwrap().as_str().unwrap();
        assert!(template.contains("You are a helpful assistant"));
    });
    let other = published.join("opendatalab--MinerU2.0-2505-0.9B");
    copy(&other, dir, &["config.json"]);
    let model = FoundModel::Checkpoint { checkpoint: Checkpoint::open(dir).unwrap(), repository: None };
    let message = model.pair().err().unwrap().to_string();
    assert!(message.contains("Mineru2QwenForCausalLM"), "{message}");
}

/// The strings that break tokenizers, against the library that transformers calls.
#[test]
fn token_ids_of_the_published_tokenizer() {
    let (Some(published), Some(runtime_dir)) = (published(), runtime_dir()) else { return };
    let source = published.join("llava-hf--llava-1.5-7b-hf");
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("llava");
    std::fs::create_dir(&dir).unwrap();
    let mut config = read(&source.join("config.json"));
    let sizes = json!({"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4});
    for (key, value) in sizes.as_object().unwrap() {
        config["text_config"][key] = value.clone();
    }
    config["vision_config"]["num_hidden_layers"] = 2.into();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    copy(&source, &dir, &["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]);
    let index = read(&source.join("model.safetensors.index.json"));
    let kept = |name: &String| {
        let block = name.split("layers.").nth(1).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        block.is_none_or(|block| block < 1 || (block < 2 && name.starts_with("vision_tower")))
    };
    let names = index["weight_map"].as_object().unwrap().keys().filter(|name| kept(name)).cloned();
    let shapes = shapes(names, 256, 256).into_iter().map(|(name, shape)| {
        let text = !name.starts_with("vision_tower");
        (name, shape.into_iter().map(|n| if text && n == 4096 { 256 } else { n }).collect())
    });
    sparse_weights(&dir.join("model.safetensors"), &shapes.collect());
    let path = common::convert(&dir, "q8_0", folder.path());
    let runtime = Runtime::open(&runtime_dir).unwrap();
    let compute = Compute { threads: 1, gpu_layers: 0, batch: 512, exact: false };
    let model = Model::load(&runtime, &path, compute, false).unwrap();
    let reference = tokenizers::Tokenizer::from_file(source.join("tokenizer.json")).unwrap();
    let strings = read(&root().join("tests/golden/nasty_strings.json"));
    for string in strings["strings"].as_array().unwrap() {
        let text = string.as_str().unwrap();
        let expected = reference.encode(text, false).unwrap();
        assert_eq!(json!(model.tokenize(text, false, true).unwrap()), json!(expected.get_ids()), "{text:?}");
    }
}

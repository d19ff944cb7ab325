//! Idefics3 and SmolVLM checkpoints: their tensors and keys, what is refused, and the runtime on what becomes of them against
//! transformers (`tests/reference/idefics3_goldens.py`, which gives tensors the same values by their names).
mod common;
mod tiny;

use common::compared::{Bounds, agrees, f32s, flattened, goldens, load, picture};
use mbq_convert::gguf::GgufFile;
use mbq_convert::runtime::engine::Runtime;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tiny::card::carded;
use tiny::{Tensors, convert, small, text, tokenizer_with, write_weights};

const HIDDEN: usize = 64;
const INNER: usize = 96;
const HEAD_DIM: usize = 32;
const VOCAB: usize = 320;
const TOWER: usize = 32;
/// Side of a tile, pixels: four by four patches, two by two tokens.
const TILE: usize = 32;

/// Tensors under the names of published files, which are those of transformers 5 too.
fn tensors() -> Tensors {
    let mut all = Tensors::new();
    let mut add = |name: String, shape: &[usize]| drop(all.insert(name.clone(), small(&name, shape, &["norm"])));
    add("lm_head.weight".into(), &[VOCAB, HIDDEN]);
    add("model.text_model.embed_tokens.weight".into(), &[VOCAB, HIDDEN]);
    add("model.text_model.norm.weight".into(), &[HIDDEN]);
    for i in 0..3 {
        let layer = |part: &str| format!("model.text_model.layers.{i}.{part}.weight");
        add(layer("input_layernorm"), &[HIDDEN]);
        add(layer("post_attention_layernorm"), &[HIDDEN]);
        for (part, rows) in [("q", HIDDEN), ("k", HEAD_DIM), ("v", HEAD_DIM), ("o", HIDDEN)] {
            add(layer(&format!("self_attn.{part}_proj")), &[rows, HIDDEN]);
        }
        for (part, shape) in [("gate", [INNER, HIDDEN]), ("up", [INNER, HIDDEN]), ("down", [HIDDEN, INNER])] {
            add(layer(&format!("mlp.{part}_proj")), &shape);
        }
    }
    let tower = |part: &str| format!("model.vision_model.{part}");
    add(tower("embeddings.patch_embedding.weight"), &[TOWER, 3, 8, 8]);
    add(tower("embeddings.patch_embedding.bias"), &[TOWER]);
    add(tower("embeddings.position_embedding.weight"), &[16, TOWER]);
    let attention =
        ["q_proj", "k_proj", "v_proj", "out_proj"].map(|name| (format!("self_attn.{name}"), [TOWER, TOWER]));
    let mlp = [("mlp.fc1".to_string(), [48, TOWER]), ("mlp.fc2".to_string(), [TOWER, 48])];
    for i in 0..2 {
        for (part, shape) in attention.iter().chain(&mlp) {
            add(tower(&format!("encoder.layers.{i}.{part}.weight")), shape);
            add(tower(&format!("encoder.layers.{i}.{part}.bias")), &shape[..1]);
        }
    }
    let norms = (0..2).flat_map(|i| ["layer_norm1", "layer_norm2"].map(|norm| format!("encoder.layers.{i}.{norm}")));
    for norm in norms.chain(["post_layernorm".to_string()]) {
        for kind in ["weight", "bias"] {
            add(tower(&format!("{norm}.{kind}")), &[TOWER]);
        }
    }
    add("model.connector.modality_projection.proj.weight".into(), &[HIDDEN, 4 * TOWER]);
    all
}

/// As published, of SmolVLM2 with fewer keys in the tower.
fn config(model_type: &str) -> Value {
    let tower = if model_type == "idefics3" { "idefics3" } else { "smolvlm_vision" };
    json!({
        "model_type": model_type, "image_token_id": 300, "scale_factor": 2, "tie_word_embeddings": false,
        "text_config": {
            "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": HEAD_DIM, "vocab_size": VOCAB,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "pixel_shuffle_factor": 2, "use_resampler": false,
            "qk_layer_norms": false, "rope_interleaved": false, "perceiver_config": {"model_type": "vllama3"}
        },
        "vision_config": {
            "model_type": tower, "hidden_size": TOWER, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": TILE, "patch_size": 8, "max_image_size": {"longest_edge": TILE}
        }
    })
}

/// Every byte is a token; `<global-img>` and the places of tiles are none, as in SmolVLM-Instruct's vocabulary.
fn tokenizer() -> Value {
    tokenizer_with(&["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>"])
}

/// SmolVLM's.
const TEMPLATE: &str = "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}\
    {% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
    {% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}\
    {% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}\
    {% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}";

/// Writes a checkpoint whose pictures are `edge` pixels long before they are cut into tiles.
fn checkpoint(parent: &Path, model_type: &str, edge: usize) -> PathBuf {
    let dir = parent.join("smol");
    std::fs::create_dir_all(&dir).unwrap();
    let write = |file: &str, json: Value| std::fs::write(dir.join(file), json.to_string()).unwrap();
    write("config.json", config(model_type));
    write("tokenizer.json", tokenizer());
    write("tokenizer_config.json", json!({"eos_token": "<end_of_utterance>", "bos_token": "<|im_start|>"}));
    write("chat_template.json", json!({"chat_template": TEMPLATE}));
    write("processor_config.json", json!({"image_seq_len": 4, "processor_class": "Idefics3Processor"}));
    write(
        "preprocessor_config.json",
        json!({"image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": true, "resample": 1,
               "size": {"longest_edge": edge}, "max_image_size": {"longest_edge": TILE},
               "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}),
    );
    write_weights(&dir, &tensors(), 1);
    dir
}

const F32: [&str; 8] = ["--type", "f32", "--embedding-type", "f32", "--output-type", "f32", "--mmproj-type", "f32"];

/// Both files in f32, in `parent`.
fn pair(parent: &Path, model_type: &str, edge: usize) -> [PathBuf; 2] {
    let done = convert(&checkpoint(parent, model_type, edge), &parent.join("model.gguf"), &F32);
    assert!(done.status.success(), "{}", text(&done.stderr));
    ["model.gguf", "mmproj-model-f32.gguf"].map(|file| parent.join(file))
}

#[test]
fn tensors_lie_where_the_runtime_wants_them() {
    let parent = tempfile::tempdir().unwrap();
    let [model, mmproj] = pair(parent.path(), "idefics3", 64).map(|p| GgufFile::open(&p).unwrap());
    let stored = tensors();
    for (file, name, from) in [
        (&model, "blk.2.attn_v.weight", "model.text_model.layers.2.self_attn.v_proj.weight"),
        (&mmproj, "mm.model.fc.weight", "model.connector.modality_projection.proj.weight"),
        (&mmproj, "v.post_ln.bias", "model.vision_model.post_layernorm.bias"),
        (&mmproj, "v.blk.1.ffn_up.weight", "model.vision_model.encoder.layers.1.mlp.fc1.weight"),
    ] {
        assert_eq!(f32s(file, name), stored[from], "{name}");
    }
    // Rows i and i + d/2 of each head become neighbours.
    for (part, rows) in [("q", HIDDEN), ("k", HEAD_DIM)] {
        let (_, of) = &stored[&format!("model.text_model.layers.1.self_attn.{part}_proj.weight")];
        let (_, got) = f32s(&model, &format!("blk.1.attn_{part}.weight"));
        for row in 0..rows {
            let from = row / HEAD_DIM * HEAD_DIM + row % HEAD_DIM / 2 + row % 2 * (HEAD_DIM / 2);
            assert_eq!(got[row * HIDDEN..][..HIDDEN], of[from * HIDDEN..][..HIDDEN], "{part}, row {row}");
        }
    }
}

/// The runtime rounds pixels to the type of the patches' weights.
#[test]
fn patches_stay_f32() {
    let parent = tempfile::tempdir().unwrap();
    let done =
        convert(&checkpoint(parent.path(), "idefics3", 64), &parent.path().join("model.gguf"), &["--type", "f16"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let mmproj = GgufFile::open(&parent.path().join("mmproj-model-f16.gguf")).unwrap();
    let (_, patches) = f32s(&mmproj, "v.patch_embd.weight");
    assert_eq!(patches, tensors()["model.vision_model.embeddings.patch_embedding.weight"].1);
}

#[test]
fn keys_are_those_that_clip_reads() {
    for model_type in ["idefics3", "smolvlm"] {
        let parent = tempfile::tempdir().unwrap();
        let [model, mmproj] = pair(parent.path(), model_type, 64).map(|p| GgufFile::open(&p).unwrap());
        let found = (model.metadata.str("general.architecture"), mmproj.metadata.str("clip.projector_type"));
        assert_eq!(found, (Some("llama"), Some("idefics3")));
        let number = |key: &str| mmproj.metadata.get(&format!("clip.vision.{key}")).and_then(|v| v.as_u64());
        let keys = [("projector.scale_factor", 2), ("preproc_image_size", 64), ("image_size", 32), ("block_count", 2)];
        for (key, value) in keys {
            assert_eq!(number(key), Some(value), "{key}");
        }
        assert_eq!(model.metadata.get("tokenizer.ggml.eos_token_id").and_then(|v| v.as_u64()), Some(299));
        // llama.cpp's strings become the parts that the template asks for.
        let template = model.metadata.str("tokenizer.chat_template").unwrap();
        assert!(template.contains("__media") && template.contains(TEMPLATE), "{template}");
    }
}

/// Which tiles, in which order, between which tokens, resized how; then the prompt as a whole.
#[test]
fn the_runtime_computes_what_transformers_does() {
    let Some(dir) = common::runtime_dir() else { return };
    let runtime = Runtime::open(&dir).unwrap();
    let goldens = goldens("idefics3.json");
    for (name, (width, height), edge) in
        [("square", (40, 40), 64), ("strip", (200, 2), 64), ("tall", (9, 50), 64), ("one_tile", (40, 25), 32)]
    {
        let parent = tempfile::tempdir().unwrap();
        let [file, mmproj] = pair(parent.path(), "idefics3", edge);
        let vision = load(&runtime, &file, &mmproj);
        let chunks = vision.tokenize("User:<__media__>What?", Path::new("picture"), &[picture(width, height)]).unwrap();
        let pieces = chunks.pieces(true).unwrap();
        let golden = &goldens[name];
        assert_eq!(json!(flattened(&pieces, 300).0), golden["ids"], "{name}");
        agrees(&runtime, &file, &vision, &pieces, (name, golden), Bounds { embedding: 1e-3, kl: 1e-5 });
    }
}

/// `edit` of `file` makes the checkpoint one that is refused, with these words and the file's name.
fn refused(file: &str, edit: impl Fn(&mut Value), words: &[&str]) {
    let parent = tempfile::tempdir().unwrap();
    let dir = checkpoint(parent.path(), "idefics3", 64);
    tiny::refused(&dir, file, edit, &[words, &[file]].concat());
}

#[test]
fn what_the_runtime_cannot_do_is_refused() {
    let c = "config.json";
    let set = |path: &'static str, value: Value| move |j: &mut Value| *j.pointer_mut(path).unwrap() = value.clone();
    refused(c, set("/scale_factor", 3.into()), &["scale_factor"]);
    refused(c, set("/vision_config/model_type", "clip_vision_model".into()), &["vision_config.model_type"]);
    refused(c, set("/vision_config/intermediate_size", TOWER.into()), &["vision_config.intermediate_size"]);
    refused(c, set("/text_config/qk_layer_norms", true.into()), &["text_config.qk_layer_norms"]);
    refused(c, set("/text_config/model_type", "gemma".into()), &["text_config.model_type", "gemma"]);
    refused(c, set("/vision_config/num_hidden_layers", 3.into()), &["vision_config.num_hidden_layers"]);
    let p = "preprocessor_config.json";
    refused(p, set("/do_image_splitting", false.into()), &["do_image_splitting"]);
    refused(p, set("/size/longest_edge", 72.into()), &["`size`", "max_image_size"]);
    refused(p, set("/size/longest_edge", 8192.into()), &["`size`", "4096"]);
    refused(p, set("/max_image_size/longest_edge", 64.into()), &["max_image_size", "image_size"]);
    refused(p, set("/resample", 3.into()), &["resample", "Lanczos"]);
    refused(p, set("/image_processor_type", "Idefics2ImageProcessor".into()), &["image_processor_type"]);
    refused("processor_config.json", set("/image_seq_len", 16.into()), &["image_seq_len"]);
}

/// A tensor of a perceiver is nobody's.
#[test]
fn tensors_that_nobody_claims_are_refused() {
    let parent = tempfile::tempdir().unwrap();
    let dir = checkpoint(parent.path(), "idefics3", 64);
    let mut stored = tensors();
    stored.insert("model.connector.perceiver_resampler.latents".into(), (vec![4, HIDDEN], vec![0.5; 4 * HIDDEN]));
    write_weights(&dir, &stored, 1);
    let done = convert(&dir, &parent.path().join("o.gguf"), &["--type", "f16"]);
    let message = text(&done.stderr);
    assert!(!done.status.success() && message.contains("perceiver_resampler.latents"), "{message}");
}

#[test]
fn cards() {
    let parent = tempfile::tempdir().unwrap();
    let front = "library_name: transformers\nlicense: apache-2.0\ndatasets:\n- HuggingFaceM4/the_cauldron\n\
                 pipeline_tag: image-text-to-text\nlanguage:\n- en\nbase_model:\n\
                 - HuggingFaceTB/SmolLM2-135M-Instruct\n- google/siglip-base-patch16-512";
    for model_type in ["idefics3", "smolvlm"] {
        carded(
            &checkpoint(parent.path(), model_type, 2 * TILE),
            front,
            &[("license", &["apache-2.0"]), ("language", &["en"]), ("datasets", &[])],
        );
    }
}

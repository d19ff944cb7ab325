//! LLaVA 1.5 and LLaVA-NeXT, made up on the spot.
use super::{Naming, Tensors, checkpoint_with, named};
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};

pub const HIDDEN: usize = 128;
pub const INNER: usize = 256;
pub const KV: usize = 64;
pub const HEAD_DIM: usize = 32;
pub const VISION: usize = 64;
pub const VOCAB: usize = 1216;

/// Of a text model of 2 blocks and a CLIP tower of 3, `next` with the row that ends a line.
pub fn tensors(next: bool) -> Tensors {
    valued(next, |name, shape| named(name, shape, 1.0, 0.0))
}

/// The same with the values that `value` makes of name and shape.
pub fn valued(next: bool, value: impl Fn(&str, &[usize]) -> (Vec<usize>, Vec<f32>)) -> Tensors {
    let mut all = Tensors::new();
    let mut add = |name: String, shape: &[usize]| drop(all.insert(name.clone(), value(&name, shape)));
    add("language_model.model.embed_tokens.weight".into(), &[VOCAB, HIDDEN]);
    add("language_model.lm_head.weight".into(), &[VOCAB, HIDDEN]);
    add("language_model.model.norm.weight".into(), &[HIDDEN]);
    for i in 0..2 {
        let layer = |part: &str| format!("language_model.model.layers.{i}.{part}.weight");
        add(layer("input_layernorm"), &[HIDDEN]);
        add(layer("post_attention_layernorm"), &[HIDDEN]);
        for (part, rows) in [("q", HIDDEN), ("k", KV), ("v", KV), ("o", HIDDEN)] {
            add(layer(&format!("self_attn.{part}_proj")), &[rows, HIDDEN]);
        }
        add(layer("mlp.gate_proj"), &[INNER, HIDDEN]);
        add(layer("mlp.up_proj"), &[INNER, HIDDEN]);
        add(layer("mlp.down_proj"), &[HIDDEN, INNER]);
    }
    let tower = |part: &str| format!("vision_tower.vision_model.{part}");
    add(tower("embeddings.patch_embedding.weight"), &[VISION, 3, 14, 14]);
    add(tower("embeddings.position_embedding.weight"), &[5, VISION]);
    add(tower("embeddings.class_embedding"), &[VISION]);
    for i in 0..3 {
        let layer = |part: &str| tower(&format!("encoder.layers.{i}.{part}"));
        for part in ["q", "k", "v", "out"] {
            add(layer(&format!("self_attn.{part}_proj.weight")), &[VISION, VISION]);
            add(layer(&format!("self_attn.{part}_proj.bias")), &[VISION]);
        }
        for (part, rows, cols) in [("mlp.fc1", 2 * VISION, VISION), ("mlp.fc2", VISION, 2 * VISION)] {
            add(layer(&format!("{part}.weight")), &[rows, cols]);
            add(layer(&format!("{part}.bias")), &[rows]);
        }
        for norm in ["layer_norm1", "layer_norm2"] {
            add(layer(&format!("{norm}.weight")), &[VISION]);
            add(layer(&format!("{norm}.bias")), &[VISION]);
        }
    }
    for norm in ["pre_layrnorm", "post_layernorm"] {
        add(tower(&format!("{norm}.weight")), &[VISION]);
        add(tower(&format!("{norm}.bias")), &[VISION]);
    }
    for (name, cols) in [("linear_1", VISION), ("linear_2", HIDDEN)] {
        add(format!("multi_modal_projector.{name}.weight"), &[HIDDEN, cols]);
        add(format!("multi_modal_projector.{name}.bias"), &[HIDDEN]);
    }
    if next {
        add("image_newline".into(), &[HIDDEN]);
    }
    all
}

pub fn configuration(next: bool) -> (Json, Json) {
    let mut config = json!({
        "model_type": if next { "llava_next" } else { "llava" }, "image_token_index": 1200, "projector_hidden_act": "gelu",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "tie_word_embeddings": false,
        "text_config": {
            "model_type": if next { "mistral" } else { "llama" }, "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_hidden_layers": 2, "num_attention_heads": HIDDEN / HEAD_DIM, "num_key_value_heads": KV / HEAD_DIM,
            "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-5
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": VISION, "intermediate_size": 2 * VISION,
            "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 14
        }
    });
    let kind = if next { "LlavaNextImageProcessor" } else { "CLIPImageProcessor" };
    let mut processor = json!({
        "image_processor_type": kind, "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28},
        "do_center_crop": true, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3
    });
    if next {
        for json in [&mut config, &mut processor] {
            json["image_grid_pinpoints"] = json!([[28, 56], [56, 28], [56, 56]]);
        }
    }
    (config, processor)
}

/// A checkpoint below `parent`, with the tokenizer of tests/golden/sentencepiece.
pub fn checkpoint(parent: &Path, next: bool, naming: Naming, shards: usize) -> PathBuf {
    let dir = checkpoint_with(parent, naming, shards, tensors(next));
    let (config, processor) = configuration(next);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("preprocessor_config.json"), processor.to_string()).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sentencepiece");
        std::fs::copy(golden.join(file), dir.join(file)).unwrap();
    }
    dir
}

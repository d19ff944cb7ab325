//! Gemma 3 checkpoints: their tensors, keys and vocabulary, what is refused, and the runtime on what becomes of them against
//! transformers (`tests/reference/gemma3_goldens.py`, which gives tensors the same values by their names).
mod common;
mod tiny;

use common::compared::{Bounds, COMPUTE, agrees, f32s, flattened, goldens, load, picture};
use common::root;
use mbq_convert::gguf::GgufFile;
use mbq_convert::runtime::engine::{Model, Runtime};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tiny::card::carded;
use tiny::{Naming, Tensors, checkpoint_with, convert, named, text};

const HIDDEN: usize = 64;
const INNER: usize = 96;
const HEAD_DIM: usize = 32;
/// Four heads of 32 are wider than the stream.
const Q: usize = 128;
const KV: usize = 64;
const LAYERS: usize = 7;
const ROWS: usize = 1280;
const TOWER: usize = 32;

/// Tensors under the names of published files.
fn tensors() -> Tensors {
    let mut all = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let gain = name.ends_with("weight") && name.contains("norm");
        let around = if gain && name.contains("vision_tower") { 1.0 } else { 0.0 };
        let tensor = named(&name, shape, if gain { 0.3 } else { 0.15 }, around);
        all.insert(name, tensor);
    };
    add("language_model.model.embed_tokens.weight".into(), &[ROWS, HIDDEN]);
    add("language_model.model.norm.weight".into(), &[HIDDEN]);
    for i in 0..LAYERS {
        let layer = |part: &str| format!("language_model.model.layers.{i}.{part}.weight");
        for norm in ["input", "post_attention", "pre_feedforward", "post_feedforward"] {
            add(layer(&format!("{norm}_layernorm")), &[HIDDEN]);
        }
        for norm in ["q", "k"] {
            add(layer(&format!("self_attn.{norm}_norm")), &[HEAD_DIM]);
        }
        for (part, shape) in [("q", [Q, HIDDEN]), ("k", [KV, HIDDEN]), ("v", [KV, HIDDEN]), ("o", [HIDDEN, Q])] {
            add(layer(&format!("self_attn.{part}_proj")), &shape);
        }
        for (part, shape) in [("gate", [INNER, HIDDEN]), ("up", [INNER, HIDDEN]), ("down", [HIDDEN, INNER])] {
            add(layer(&format!("mlp.{part}_proj")), &shape);
        }
    }
    let tower = |part: &str| format!("vision_tower.vision_model.{part}");
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
    add("multi_modal_projector.mm_soft_emb_norm.weight".into(), &[TOWER]);
    add("multi_modal_projector.mm_input_projection_weight".into(), &[TOWER, HIDDEN]);
    all
}

/// As published, or as transformers 5 saves it.
fn config(naming: Naming) -> Value {
    let mut text = json!({
        "model_type": "gemma3_text", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM,
        "vocab_size": ROWS, "max_position_embeddings": 512, "sliding_window": 12
    });
    if naming == Naming::Nested {
        let kind = |i: usize| if i == 5 { "full_attention" } else { "sliding_attention" };
        text["layer_types"] = (0..LAYERS).map(kind).collect();
        text["rope_parameters"] = json!({
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}
        });
    } else {
        text["rope_scaling"] = json!({"rope_type": "linear", "factor": 8.0});
    }
    json!({
        "model_type": "gemma3", "mm_tokens_per_image": 4, "boi_token_index": 1213, "eoi_token_index": 1214,
        "image_token_index": 1215, "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": TOWER, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "vision_use_head": false
        }
    })
}

/// A checkpoint of `shards` files below `parent`.
fn checkpoint(parent: &Path, naming: Naming, shards: usize) -> PathBuf {
    let dir = checkpoint_with(parent, naming, shards, tensors());
    let write = |file: &str, json: Value| std::fs::write(dir.join(file), json.to_string()).unwrap();
    write("config.json", config(naming));
    std::fs::copy(root().join("tests/golden/gemma3/tokenizer.json"), dir.join("tokenizer.json")).unwrap();
    write("tokenizer_config.json", json!({"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}));
    write("processor_config.json", json!({"image_seq_length": 4, "processor_class": "Gemma3Processor"}));
    write(
        "preprocessor_config.json",
        json!({"image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": null, "resample": 2,
               "size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}),
    );
    dir
}

const F32: [&str; 6] = ["--type", "f32", "--embedding-type", "f32", "--mmproj-type", "f32"];

/// Both files in f32, in `parent`.
fn pair(parent: &Path, naming: Naming, shards: usize) -> [PathBuf; 2] {
    let done = convert(&checkpoint(parent, naming, shards), &parent.join("model.gguf"), &F32);
    assert!(done.status.success(), "{}", text(&done.stderr));
    ["model.gguf", "mmproj-model-f32.gguf"].map(|file| parent.join(file))
}

#[test]
fn gains_are_one_more_than_stored() {
    let parent = tempfile::tempdir().unwrap();
    let [model, mmproj] = pair(parent.path(), Naming::Published, 1).map(|p| GgufFile::open(&p).unwrap());
    let stored = tensors();
    let layer = |part: &str| format!("language_model.model.layers.6.{part}.weight");
    for (file, name, from, more) in [
        (&model, "output_norm.weight", "language_model.model.norm.weight".into(), 1.0),
        (&model, "blk.6.attn_norm.weight", layer("input_layernorm"), 1.0),
        (&model, "blk.6.post_attention_norm.weight", layer("post_attention_layernorm"), 1.0),
        (&model, "blk.6.ffn_norm.weight", layer("pre_feedforward_layernorm"), 1.0),
        (&model, "blk.6.post_ffw_norm.weight", layer("post_feedforward_layernorm"), 1.0),
        (&model, "blk.6.attn_k_norm.weight", layer("self_attn.k_norm"), 1.0),
        (&model, "blk.6.attn_q.weight", layer("self_attn.q_proj"), 0.0),
        (&mmproj, "mm.soft_emb_norm.weight", "multi_modal_projector.mm_soft_emb_norm.weight".into(), 1.0),
        (&mmproj, "mm.input_projection.weight", "multi_modal_projector.mm_input_projection_weight".into(), 0.0),
        (&mmproj, "v.post_ln.weight", "vision_tower.vision_model.post_layernorm.weight".into(), 0.0),
    ] {
        let (shape, values) = &stored[&from];
        let values = values.iter().map(|v| v + more).collect();
        assert_eq!(f32s(file, name), (shape.clone(), values), "{name}");
    }
}

/// The runtime transposes the projector's matrix, which no type with blocks can be.
#[test]
fn the_projector_is_not_quantised() {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, 1);
    let done = convert(&model, &parent.path().join("model.gguf"), &["--type", "q8_0", "--mmproj-type", "q8_0"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let mmproj = GgufFile::open(&parent.path().join("mmproj-model-q8_0.gguf")).unwrap();
    let kind = |name: &str| mmproj.tensors.iter().find(|t| t.name == name).unwrap().ty().unwrap().to_string();
    assert_eq!((kind("mm.input_projection.weight"), kind("v.blk.0.attn_q.weight")), ("f16".into(), "q8_0".into()));
}

/// transformers 5's names and sections, and three shards: the same files.
#[test]
fn both_namings_give_the_same_files() {
    let [published, nested] = [(Naming::Published, 1), (Naming::Nested, 3)].map(|(naming, shards)| {
        let parent = tempfile::tempdir().unwrap();
        pair(parent.path(), naming, shards).map(|file| std::fs::read(file).unwrap())
    });
    assert!(published == nested);
}

#[test]
fn keys_are_those_that_the_runtime_reads() {
    let parent = tempfile::tempdir().unwrap();
    let [model, mmproj] = pair(parent.path(), Naming::Published, 1).map(|p| GgufFile::open(&p).unwrap());
    let number = |file: &GgufFile, key: &str| file.metadata.get(key).and_then(|v| v.as_f64());
    for (key, value) in [
        ("gemma3.attention.sliding_window", 12.0),
        ("gemma3.attention.key_length", 32.0),
        ("gemma3.rope.freq_base", 1e6),
        ("gemma3.rope.freq_base_swa", 1e4),
        ("gemma3.rope.scaling.factor", 8.0),
        // The tokenizer's own, which its rules put in front.
        ("tokenizer.ggml.bos_token_id", 1.0),
    ] {
        assert_eq!(number(&model, key), Some(value), "{key}");
    }
    assert_eq!(number(&mmproj, "clip.vision.projector.scale_factor"), Some(2.0));
    assert_eq!(mmproj.metadata.str("clip.projector_type"), Some("gemma3"));
    assert!(!model.tensors.iter().any(|t| t.name == "output.weight"), "the head is the embedding");
}

/// The token that stands for a picture's.
const SOFT: i32 = 1215;

/// Pictures are stretched to a square; the prompts are longer than the windows.
#[test]
fn the_runtime_computes_what_transformers_does() {
    let Some(dir) = common::runtime_dir() else { return };
    let runtime = Runtime::open(&dir).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let [file, mmproj] = pair(parent.path(), Naming::Published, 1);
    let vision = load(&runtime, &file, &mmproj);
    let goldens = goldens("gemma3/pictures.json");
    for (name, (width, height)) in [("square", (32, 32)), ("wide", (90, 20)), ("tall", (5, 61))] {
        let prompt = "<start_of_turn>user\n<__media__>What is the model?<end_of_turn>\n";
        let chunks = vision.tokenize(prompt, Path::new("picture"), &[picture(width, height)]).unwrap();
        let pieces = chunks.pieces(true).unwrap();
        let golden = &goldens[name];
        assert_eq!(json!(flattened(&pieces, SOFT).0), golden["ids"], "{name}");
        agrees(&runtime, &file, &vision, &pieces, (name, golden), Bounds { embedding: 1e-3, kl: 1e-5 });
    }
}

/// Empty lines around pictures are one token with the line ends that are there: first, last, and beside one another.
#[test]
fn empty_lines_around_pictures() {
    let Some(dir) = common::runtime_dir() else { return };
    let runtime = Runtime::open(&dir).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let [file, mmproj] = pair(parent.path(), Naming::Published, 1);
    let vision = load(&runtime, &file, &mmproj);
    let pictures = [(); 3].map(|()| picture(32, 32));
    let prompt = "<__media__><__media__>\n  Which?<__media__>";
    let pieces = vision.tokenize(prompt, Path::new("picture"), &pictures).unwrap().pieces(false).unwrap();
    assert_eq!(json!(flattened(&pieces, SOFT).0), goldens("gemma3/pictures.json")["three"]["ids"]);
}

/// The strings that break tokenizers, against the library that transformers calls; runs of spaces, tabs and line ends are
/// added tokens.
#[test]
fn token_ids_are_transformers() {
    let Some(dir) = common::runtime_dir() else { return };
    let reference = tokenizers::Tokenizer::from_file(root().join("tests/golden/gemma3/tokenizer.json")).unwrap();
    let strings = goldens("nasty_strings.json");
    let runtime = Runtime::open(&dir).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let [file, _] = pair(parent.path(), Naming::Published, 1);
    let model = Model::load(&runtime, &file, COMPUTE, false).unwrap();
    let more = ["a\n\n\nb", "\n\n\n\n\n\n\n", "a    b     c      d", " \n \t\t x", "<start_of_turn>user\n\n\n"];
    let strings = strings["strings"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).chain(more);
    let mut compared = 0;
    for text in strings {
        let expected = reference.encode(text, false).unwrap();
        assert_eq!(json!(model.tokenize(text, false, true).unwrap()), json!(expected.get_ids()), "{text:?}");
        compared += 1;
    }
    assert!(compared > 1000, "{compared}");
}

/// `edit` of `file` makes the checkpoint one that is refused, with these words and the file's name.
fn refused(file: &str, naming: Naming, edit: impl Fn(&mut Value), words: &[&str]) {
    let parent = tempfile::tempdir().unwrap();
    let dir = checkpoint(parent.path(), naming, 1);
    tiny::refused(&dir, file, edit, &[words, &[file]].concat());
}

#[test]
fn what_the_runtime_cannot_do_is_refused() {
    use Naming::{Nested, Published};
    let c = "config.json";
    let of = |path: &'static str, value: Value| {
        move |j: &mut Value| {
            let (parent, key) = path.rsplit_once('/').unwrap();
            j.pointer_mut(parent).unwrap()[key] = value.clone();
        }
    };
    let t = |key: &str| format!("text_config.{key}");
    for (path, value) in [
        ("/text_config/query_pre_attn_scalar", json!(48)),
        ("/text_config/final_logit_softcapping", json!(30.0)),
        ("/text_config/attn_logit_softcapping", json!(50.0)),
        ("/text_config/sliding_window_pattern", json!(2)),
        ("/text_config/sliding_window", Value::Null),
        ("/text_config/use_bidirectional_attention", json!(true)),
        ("/text_config/hidden_activation", json!("silu")),
        ("/text_config/attention_bias", json!(true)),
        ("/text_config/model_type", json!("gemma2")),
        ("/text_config/num_hidden_layers", json!(8)),
    ] {
        let key = path.rsplit('/').next().unwrap();
        refused(c, Published, of(path, value), &[&t(key)]);
    }
    refused(
        c,
        Published,
        of("/text_config/rope_scaling/rope_type", "yarn".into()),
        &["rope_scaling.rope_type", "linear"],
    );
    let kinds = Value::from(vec!["full_attention"; LAYERS]);
    refused(c, Nested, of("/text_config/layer_types", kinds), &["text_config.layer_types", "sixth"]);
    let path = "/text_config/rope_parameters/sliding_attention/rope_type";
    refused(c, Nested, of(path, "linear".into()), &["rope_parameters.sliding_attention.rope_type"]);
    refused(c, Nested, of("/text_config/rope_parameters", json!({"rope_theta": 1e6})), &["rope_parameters.rope_theta"]);
    refused(c, Published, of("/vision_config/model_type", "clip_vision_model".into()), &["vision_config.model_type"]);
    refused(c, Published, of("/vision_config/intermediate_size", TOWER.into()), &["vision_config.intermediate_size"]);
    refused(c, Published, of("/mm_tokens_per_image", 9.into()), &["mm_tokens_per_image"]);
    let p = "preprocessor_config.json";
    refused(p, Published, of("/do_pan_and_scan", true.into()), &["do_pan_and_scan"]);
    refused(p, Published, of("/size", json!({"height": 32, "width": 64})), &["`size`", "image_size"]);
    refused(p, Published, of("/resample", 3.into()), &["resample", "bilinear"]);
    refused(p, Published, of("/image_processor_type", "SiglipImageProcessor".into()), &["image_processor_type"]);
    refused("processor_config.json", Published, of("/image_seq_length", 256.into()), &["image_seq_length"]);
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    let file = "tokenizer.json";
    refused(
        file,
        Naming::Published,
        |j| drop(j["model"]["merges"].as_array_mut().unwrap().remove(100)),
        &["model.merges"],
    );
    // Runs of spaces that are made after other tokens would take their spaces away.
    let last = |j: &mut Value| {
        let merges = j["model"]["merges"].as_array_mut().unwrap();
        let at = merges.iter().position(|merge| merge == &json!(["▁", "▁"])).unwrap();
        let merge = merges.remove(at);
        merges.push(merge);
    };
    refused(file, Naming::Published, last, &["model.merges", "added token"]);
    let renamed = |j: &mut Value| {
        let tokens = j["added_tokens"].as_array_mut().unwrap();
        let at = tokens.iter().position(|t| t["content"] == "<start_of_image>").unwrap();
        tokens[at]["content"] = "<boi>".into();
        let vocab = j["model"]["vocab"].as_object_mut().unwrap();
        let id = vocab.remove("<start_of_image>").unwrap();
        vocab.insert("<boi>".into(), id);
    };
    refused(file, Naming::Published, renamed, &["<start_of_image>"]);
}

/// The front matter of a gated repository has texts of several lines.
#[test]
fn cards() {
    let parent = tempfile::tempdir().unwrap();
    let front = "license: gemma\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n\
                 extra_gated_heading: Access Gemma on Hugging Face\nextra_gated_prompt: >-\n  To access Gemma on Hugging Face, \
                 you’re required to review and agree to\n  Google’s usage license. Requests are processed: \
                 immediately.\nextra_gated_button_content: Acknowledge license\nbase_model: google/gemma-3-4b-pt";
    carded(
        &checkpoint(parent.path(), Naming::Nested, 1),
        front,
        &[("license", &["gemma"]), ("extra_gated_prompt", &[]), ("language", &[])],
    );
}

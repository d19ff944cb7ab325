//! Idefics3 and SmolVLM checkpoints: their tensors and keys, what is refused, and the runtime on what becomes of them against
//! transformers (`tests/reference/idefics3_goldens.py`, which gives tensors the same values by their names).
mod common;
mod tiny;

use mbq_convert::gguf::GgufFile;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tiny::{Tensors, convert, listing, safetensors, text, values};

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
    let mut add = |name: String, shape: &[usize]| {
        let seed = name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        let gain = name.ends_with("weight") && name.contains("norm");
        let value = |v: f32| half::bf16::from_f32(if gain { v * 0.1 + 1.0 } else { v * 0.15 }).to_f32();
        let values = values(shape.iter().product(), seed).into_iter().map(value).collect();
        all.insert(name, (shape.to_vec(), values));
    };
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
    let mut json = tiny::tokenizer();
    let names = ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>"];
    let added = names.iter().enumerate().map(|(i, name)| {
        json!({"id": 298 + i, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    json["added_tokens"] = added.collect();
    json
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
    let stored = tensors();
    let file: BTreeMap<_, _> = stored.iter().map(|(n, (s, v))| (n.as_str(), (s.as_slice(), v.as_slice()))).collect();
    std::fs::write(dir.join("model.safetensors"), safetensors(&file)).unwrap();
    dir
}

const F32: [&str; 8] = ["--type", "f32", "--embedding-type", "f32", "--output-type", "f32", "--mmproj-type", "f32"];

/// Both files in f32, in `parent`.
fn pair(parent: &Path, model_type: &str, edge: usize) -> [PathBuf; 2] {
    let done = convert(&checkpoint(parent, model_type, edge), &parent.join("model.gguf"), &F32);
    assert!(done.status.success(), "{}", text(&done.stderr));
    ["model.gguf", "mmproj-model-f32.gguf"].map(|file| parent.join(file))
}

fn f32s(file: &GgufFile, name: &str) -> (Vec<usize>, Vec<f32>) {
    let t = file.tensors.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("{name} is missing"));
    let data = file.data(t).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    (t.shape.iter().rev().copied().collect(), data.collect())
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

/// The values of tests/reference/idefics3_goldens.py.
fn picture(width: usize, height: usize) -> mbq_convert::image::Rgb {
    let mut picture = mbq_convert::image::Rgb::black(width, height);
    for (i, value) in picture.data.iter_mut().enumerate() {
        let (x, y, c) = (i / 3 % width, i / 3 / width, i % 3);
        *value = ((7 * x + 13 * y + 50 * c + x * y / 9) % 256) as u8;
    }
    picture
}

/// Which tiles, in which order, between which tokens, resized how; then the prompt as a whole.
#[test]
fn the_runtime_computes_what_transformers_does() {
    use mbq_convert::runtime::engine::{Compute, Decoder, Model, Piece, Runtime, Vision};
    let Some(dir) = common::runtime_dir() else { return };
    let runtime = Runtime::open(&dir).unwrap();
    let goldens = std::fs::read(common::root().join("tests/golden/idefics3.json")).unwrap();
    let goldens: Value = serde_json::from_slice(&goldens).unwrap();
    let numbers = |v: &Value| -> Vec<f64> { v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect() };
    for (name, (width, height), edge) in
        [("square", (40, 40), 64), ("strip", (200, 2), 64), ("tall", (9, 50), 64), ("one_tile", (40, 25), 32)]
    {
        let parent = tempfile::tempdir().unwrap();
        let [model, mmproj] = pair(parent.path(), "idefics3", edge);
        let compute = Compute { threads: 2, gpu_layers: 0, batch: 512, exact: true };
        let model = Model::load(&runtime, &model, compute, false).unwrap();
        let vision = Vision::load(model, &mmproj, compute).unwrap();
        let chunks = vision.tokenize("User:<__media__>What?", Path::new("picture"), &[picture(width, height)]).unwrap();
        let pieces = chunks.pieces(true).unwrap();
        let (mut ids, mut embedding) = (Vec::new(), Vec::new());
        for piece in &pieces {
            match piece {
                Piece::Text(tokens) => ids.extend(tokens),
                Piece::Media(media) => {
                    ids.extend(vec![300; media.tokens]);
                    embedding.extend(media.embedding.iter().map(|v| f64::from(*v)));
                }
            }
        }
        let golden = &goldens[name];
        assert_eq!(json!(ids), golden["ids"], "{name}");
        let want = numbers(&golden["embedding"]);
        assert_eq!(embedding.len(), want.len(), "{name}");
        let square = |v: f64| v * v;
        let error: f64 = embedding.iter().zip(&want).map(|(got, want)| square(got - want)).sum();
        let error = (error / want.iter().map(|w| square(*w)).sum::<f64>()).sqrt();
        let file = parent.path().join("model.gguf");
        let mut decoder = Decoder::load(&runtime, &file, compute, 512, Some(&vision)).unwrap();
        decoder.prefill(&pieces).unwrap();
        let mut logits = Vec::new();
        decoder.score(&[&[0]], |_, _, row| logits = row.iter().map(|v| f64::from(*v)).collect()).unwrap();
        let max = logits.iter().copied().fold(f64::MIN, f64::max);
        let total = max + logits.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
        let want = numbers(&golden["logprobs"]);
        let kl: f64 = want.iter().zip(&logits).map(|(p, q)| p.exp() * (p - (q - total))).sum();
        eprintln!("{name}: embeddings {error:.1e}, divergence {kl:.1e}");
        assert!(error < 1e-3, "{name}: embeddings differ by {error:.1e}");
        assert!(kl.abs() < 1e-5, "{name}: divergence {kl:.1e}");
    }
}

/// `edit` makes the checkpoint one that is refused, with these words and no output.
fn refused(file: &str, edit: impl Fn(&mut Value), words: &[&str]) {
    let parent = tempfile::tempdir().unwrap();
    let path = checkpoint(parent.path(), "idefics3", 64).join(file);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    let done = convert(&parent.path().join("smol"), &parent.path().join("o.gguf"), &["--type", "f16"]);
    let message = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{words:?}: {message}");
    words.iter().chain([&file]).for_each(|word| assert!(message.contains(word), "{word}: {message}"));
    assert_eq!(listing(parent.path()), ["smol"]);
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
    let file: BTreeMap<_, _> = stored.iter().map(|(n, (s, v))| (n.as_str(), (s.as_slice(), v.as_slice()))).collect();
    std::fs::write(dir.join("model.safetensors"), safetensors(&file)).unwrap();
    let done = convert(&dir, &parent.path().join("o.gguf"), &["--type", "f16"]);
    let message = text(&done.stderr);
    assert!(!done.status.success() && message.contains("perceiver_resampler.latents"), "{message}");
}

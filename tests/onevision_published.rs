//! A checkpoint with what is known of the published llava-hf/llava-onevision-qwen2-0.5b-ov-hf, which the demo model has
//! not: its widths, its tower's, 36 canvases of 384 pixels, a template without a line end behind a turn, float16, no bos
//! token, several ends, rows of the embedding that no token has. Weights are made up, and the layers few.
mod common;
mod tiny;

use mbq_convert::ggml::GgmlType;
use mbq_convert::gguf::GgufFile;
use mbq_convert::image::Rgb;
use mbq_convert::runtime::engine::{Compute, Model, Runtime, Vision};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use tiny::{program, text};

const HIDDEN: usize = 896;
const INNER: usize = 4864;
/// 14 query heads of 64 for 2 key/value heads.
const KV: usize = 128;
const TOWER: usize = 1152;
const TOWER_INNER: usize = 4304;
const TOWER_LAYERS: usize = 2;
/// 27 x 27 patches of 14 pixels; 6 of 384 pixels are left over.
const PATCHES: usize = 729;
/// As published: 352 rows more than there are tokens (the 7B model: 480).
const UNUSED: usize = 352;
const TOKENS: usize = 288;
const VOCAB: usize = TOKENS + UNUSED;

/// As in transformers' tests of the published processor.
const TEMPLATE: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}\
    {# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}\
    {{ '<image>' }}{% endfor %}{# Render all video then #}\
    {% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}\
    {# Render all text next #}{% if message['role'] != 'assistant' %}\
    {% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}\
    {% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
    {% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Names and shapes of all tensors.
fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    let mut add = |name: String, shape: &[usize]| all.push((name, shape.to_vec()));
    add("language_model.model.embed_tokens.weight".into(), &[VOCAB, HIDDEN]);
    add("language_model.model.norm.weight".into(), &[HIDDEN]);
    let layer = |part: &str| format!("language_model.model.layers.0.{part}");
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
    let tower = |part: &str| format!("vision_tower.vision_model.{part}");
    add(tower("embeddings.patch_embedding.weight"), &[TOWER, 3, 14, 14]);
    add(tower("embeddings.patch_embedding.bias"), &[TOWER]);
    add(tower("embeddings.position_embedding.weight"), &[PATCHES, TOWER]);
    add(tower("post_layernorm.weight"), &[TOWER]);
    add(tower("post_layernorm.bias"), &[TOWER]);
    for i in 0..TOWER_LAYERS {
        for (part, rows, cols) in [
            ("self_attn.q_proj", TOWER, TOWER),
            ("self_attn.k_proj", TOWER, TOWER),
            ("self_attn.v_proj", TOWER, TOWER),
            ("self_attn.out_proj", TOWER, TOWER),
            ("mlp.fc1", TOWER_INNER, TOWER),
            ("mlp.fc2", TOWER, TOWER_INNER),
        ] {
            add(tower(&format!("encoder.layers.{i}.{part}.weight")), &[rows, cols]);
            add(tower(&format!("encoder.layers.{i}.{part}.bias")), &[rows]);
        }
        for part in ["layer_norm1.weight", "layer_norm1.bias", "layer_norm2.weight", "layer_norm2.bias"] {
            add(tower(&format!("encoder.layers.{i}.{part}")), &[TOWER]);
        }
    }
    for (name, cols) in [("linear_1", TOWER), ("linear_2", HIDDEN)] {
        add(format!("multi_modal_projector.{name}.weight"), &[HIDDEN, cols]);
        add(format!("multi_modal_projector.{name}.bias"), &[HIDDEN]);
    }
    add("image_newline".into(), &[HIDDEN]);
    all
}

/// float16 values of about the size that trained ones have, gains around 1.
fn write_weights(path: &Path) {
    let all = tensors();
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in &all {
        let size = 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}));
        at += size;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    for (seed, (name, shape)) in all.iter().enumerate() {
        let gain = name.contains("norm") && name.ends_with("weight");
        for v in tiny::values(shape.iter().product(), seed as u64 + 1) {
            let v = if gain { 1.0 + 0.1 * v } else { 0.03 * v };
            file.write_all(&half::f16::from_f32(v).to_le_bytes()).unwrap();
        }
    }
}

fn pinpoints() -> Vec<[usize; 2]> {
    (1..=6).flat_map(|h| (1..=6).map(move |w| [384 * h, 384 * w])).collect()
}

fn config() -> Value {
    json!({
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
        "image_grid_pinpoints": pinpoints(), "image_token_index": TOKENS - 2, "video_token_index": TOKENS - 1,
        "projector_hidden_act": "gelu", "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.45.0.dev0", "use_image_newline_parameter": true,
        "vision_aspect_ratio": "anyres_max_9", "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "text_config": {
            "_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": TOKENS - 5, "eos_token_id": TOKENS - 3, "hidden_size": HIDDEN, "intermediate_size": INNER,
            "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 1,
            "num_key_value_heads": 2, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
            "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": VOCAB
        },
        "vision_config": {
            "hidden_size": TOWER, "image_size": 384, "intermediate_size": TOWER_INNER, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": TOWER_LAYERS, "patch_size": 14, "vision_use_head": false
        }
    })
}

/// The small tokenizer with the published one's added tokens behind a full vocabulary.
fn tokenizer() -> Value {
    let mut json = tiny::tokenizer();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    vocab.retain(|_, id| id.as_u64().unwrap() < TOKENS as u64 - 5);
    let names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"];
    let added = names.iter().enumerate().map(|(i, name)| {
        json!({"id": TOKENS - 5 + i, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    json["added_tokens"] = added.collect();
    json
}

fn checkpoint(parent: &Path) -> PathBuf {
    let dir = parent.join("llava-onevision-qwen2-0.5b-ov-hf");
    std::fs::create_dir(&dir).unwrap();
    let write = |file: &str, json: &Value| std::fs::write(dir.join(file), json.to_string()).unwrap();
    write("config.json", &config());
    write("chat_template.json", &json!({"chat_template": TEMPLATE}));
    write("generation_config.json", &json!({"bos_token_id": TOKENS - 5, "eos_token_id": [TOKENS - 3, TOKENS - 5]}));
    let image = json!({
        "do_convert_rgb": true, "do_normalize": true, "do_pad": true, "do_rescale": true, "do_resize": true,
        "image_grid_pinpoints": pinpoints(), "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor",
        "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"height": 384, "width": 384}
    });
    write("preprocessor_config.json", &image);
    let processor = json!({"image_token": "<image>", "num_image_tokens": PATCHES, "video_token": "<video>",
                           "processor_class": "LlavaOnevisionProcessor", "vision_feature_select_strategy": "full"});
    write("processor_config.json", &processor);
    write("tokenizer.json", &tokenizer());
    let names = json!({"bos_token": null, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": null,
                       "add_prefix_space": false, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]});
    write("tokenizer_config.json", &names);
    write_weights(&dir.join("model.safetensors"));
    dir
}

/// Two small pictures with a caption each.
fn pairs(parent: &Path) -> PathBuf {
    let mut list = String::new();
    for (i, (w, h)) in [(64u32, 48u32), (40, 80)].into_iter().enumerate() {
        let name = format!("{i}.png");
        let at = |x: u32, y: u32| image::Rgb([(x * 4) as u8, (y * 3) as u8, (x * y) as u8]);
        image::RgbImage::from_fn(w, h, at).save(parent.join(&name)).unwrap();
        list +=
            &json!({"image": name, "question": "What do you see?", "answer": format!("The picture {i}")}).to_string();
        list.push('\n');
    }
    let path = parent.join("pairs.jsonl");
    std::fs::write(&path, list).unwrap();
    path
}

fn check_files(folder: &Path, ty: GgmlType) {
    let model = GgufFile::open(&folder.join("model.gguf")).unwrap();
    let number = |key: &str| model.metadata.get(key).unwrap().as_u64();
    for (key, value) in [
        ("qwen2.embedding_length", HIDDEN),
        ("qwen2.feed_forward_length", INNER),
        ("qwen2.attention.head_count", 14),
        ("qwen2.attention.head_count_kv", 2),
        ("qwen2.rope.dimension_count", 64),
        ("qwen2.context_length", 32768),
        ("qwen2.vocab_size", VOCAB),
        ("tokenizer.ggml.eos_token_id", TOKENS - 3),
        ("tokenizer.ggml.padding_token_id", TOKENS - 5),
        ("tokenizer.ggml.bos_token_id", TOKENS - 5),
    ] {
        assert_eq!(number(key), Some(value as u64), "{key}");
    }
    assert_eq!(model.metadata.get("tokenizer.ggml.add_bos_token").unwrap(), &mbq_convert::gguf::Value::Bool(false));
    assert_eq!(model.metadata.get("tokenizer.ggml.pre").unwrap().as_str(), Some("qwen2"));
    // 7 weights, 3 biases, 2 norms; embedding and norm. The head is the embedding.
    assert_eq!(model.tensors.len(), 12 + 2);
    assert_eq!(model.tensor("blk.0.attn_q.weight").unwrap().ty(), Some(ty));
    let types = model.metadata.get("tokenizer.ggml.token_type").unwrap().as_array().unwrap();
    let types: Vec<_> = types.iter().map(|t| t.as_u64()).collect();
    let unused = types.iter().rev().take_while(|t| **t == Some(5)).count();
    assert_eq!((types.len(), unused), (VOCAB, UNUSED));

    let mmproj = GgufFile::open(&folder.join("mmproj-model-f16.gguf")).unwrap();
    for (key, value) in [
        ("image_size", 384),
        ("patch_size", 14),
        ("embedding_length", TOWER),
        ("feed_forward_length", TOWER_INNER),
        ("block_count", TOWER_LAYERS),
        ("projection_dim", HIDDEN),
        ("anyres_max", 9),
    ] {
        assert_eq!(mmproj.metadata.get(&format!("clip.vision.{key}")).unwrap().as_u64(), Some(value as u64), "{key}");
    }
    let points = mmproj.metadata.get("clip.vision.image_grid_pinpoints").unwrap().as_array().unwrap();
    let points: Vec<_> = points.iter().map(|p| p.as_u64().unwrap()).collect();
    assert_eq!((points.len(), &points[2..4], &points[70..]), (72, &[768, 384][..], &[2304, 2304][..]));
    // 16 tensors a block, 3 embeddings, 4 of the projector, the newline; the last norm is not read.
    assert_eq!(mmproj.tensors.len(), 16 * TOWER_LAYERS + 3 + 4 + 1);
}

/// The runtime's count of a picture's tokens is transformers' (tests/golden/anyres.json), for the published canvases: its
/// own test of the published model has 1024 x 899 pixels and 16 tokens of text in 6567.
fn check_pictures(folder: &Path) {
    let Some(runtime) = common::runtime_dir() else { return };
    let runtime = Runtime::open(&runtime).unwrap();
    let compute = Compute { threads: 1, gpu_layers: 0, batch: 512, exact: false };
    let model = Model::load(&runtime, &folder.join("model.gguf"), compute, false).unwrap();
    let vision = Vision::load(model, &folder.join("mmproj-model-f16.gguf"), compute).unwrap();
    let goldens: Value = serde_json::from_str(include_str!("golden/anyres.json")).unwrap();
    let golden = goldens.as_array().unwrap().iter().find(|g| g["side"] == 384).unwrap();
    for some in golden["some"].as_array().unwrap() {
        let n = |i: usize| some[i].as_u64().unwrap() as usize;
        let picture = Rgb::black(n(0), n(1));
        let chunks = vision.tokenize("<__media__>", Path::new("black"), &[picture]).unwrap();
        assert_eq!(chunks.tokens()[1], n(8), "{} x {}", n(0), n(1));
    }
}

/// The F16 pair of the checkpoint, whose weights are float16, gives the very bytes, calibrated or not.
fn through_gguf(model: &Path, folder: &Path, kind: &str, method: &[&str]) {
    let (f16, again) = (folder.join("f16"), folder.join("again"));
    for dir in [&f16, &again] {
        std::fs::create_dir(dir).unwrap();
    }
    let run = |from: &Path, to: &Path, more: &[&str]| {
        let done = program().arg(from).arg("-o").arg(to.join("model.gguf")).arg("--quiet").args(more).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
    };
    run(model, &f16, &["--type", "f16"]);
    run(&f16.join("model.gguf"), &again, &[&["--type", kind], method].concat());
    for file in ["model.gguf", "mmproj-model-f16.gguf"] {
        assert!(std::fs::read(again.join(file)).unwrap() == std::fs::read(folder.join(file)).unwrap(), "{kind} {file}");
    }
}

#[test]
fn published_facts_convert() {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path());
    let pairs = pairs(parent.path());
    let calibrated = ["--calib", pairs.to_str().unwrap()];
    for (method, ty, kind) in
        [(&["--method", "rtn"][..], GgmlType::Q4_0, "q4_0"), (&calibrated, GgmlType::MBQ3, "mbq3")]
    {
        let folder = parent.path().join(kind);
        std::fs::create_dir(&folder).unwrap();
        let mut command = program();
        command.arg(&model).arg("-o").arg(folder.join("model.gguf")).args(["--quiet", "--type", kind]).args(method);
        let done = command.output().unwrap();
        assert!(done.status.success(), "{kind}: {}", text(&done.stderr));
        check_files(&folder, ty);
        check_pictures(&folder);
        through_gguf(&model, &folder, kind, method);
    }
}

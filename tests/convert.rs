//! Conversion of a made-up checkpoint, read back by candle's GGUF reader, which shares no code with the writer.
//! candle reads F32, F16, Q8_0 and the k-quants; gguf-rs, which assumes blocks of 256 for other types, adds nothing.
mod tiny;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device};
use std::fs::File;
use std::path::Path;
use tiny::{Naming, checkpoint, convert, listing, tensors, text};

struct Read {
    content: Content,
    file: File,
}

fn open(path: &Path) -> Read {
    let mut file = File::open(path).unwrap();
    Read { content: Content::read(&mut file).unwrap(), file }
}

impl Read {
    fn values(&mut self, name: &str) -> Vec<f32> {
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu).unwrap();
        let tensor = tensor.dequantize(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn ty(&self, name: &str) -> String {
        format!("{:?}", self.content.tensor_infos[name].ggml_dtype)
    }

    fn string(&self, key: &str) -> &str {
        self.content.metadata[key].to_string().unwrap()
    }

    fn u32(&self, key: &str) -> u32 {
        self.content.metadata[key].to_u32().unwrap()
    }

    fn strings(&self, key: &str) -> Vec<String> {
        let values = self.content.metadata[key].to_vec().unwrap();
        values.iter().map(|v| v.to_string().unwrap().clone()).collect()
    }
}

fn run(parent: &Path, args: &[&str]) -> (Read, Read) {
    let model = checkpoint(parent, Naming::Published, 1);
    let done = convert(&model, &parent.join("out.gguf"), args);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let mmproj = listing(parent).into_iter().find(|f| f.starts_with("mmproj-out-")).unwrap();
    (open(&parent.join("out.gguf")), open(&parent.join(mmproj)))
}

#[test]
fn f32_files_hold_the_checkpoint_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let (mut model, mut mmproj) = run(dir.path(), &["--type", "f32", "--mmproj-type", "f32"]);
    let source = tensors();
    let layer = "language_model.model.layers.2";
    let tower = "vision_tower.vision_model";
    for (name, from) in [
        ("token_embd.weight", "language_model.model.embed_tokens.weight".to_string()),
        ("output.weight", "language_model.lm_head.weight".into()),
        ("output_norm.weight", "language_model.model.norm.weight".into()),
        ("blk.2.attn_norm.weight", format!("{layer}.input_layernorm.weight")),
        ("blk.2.ffn_norm.weight", format!("{layer}.post_attention_layernorm.weight")),
        ("blk.2.attn_q.weight", format!("{layer}.self_attn.q_proj.weight")),
        ("blk.2.attn_k.bias", format!("{layer}.self_attn.k_proj.bias")),
        ("blk.2.attn_v.weight", format!("{layer}.self_attn.v_proj.weight")),
        ("blk.2.attn_output.weight", format!("{layer}.self_attn.o_proj.weight")),
        ("blk.2.ffn_gate.weight", format!("{layer}.mlp.gate_proj.weight")),
        ("blk.2.ffn_up.weight", format!("{layer}.mlp.up_proj.weight")),
        ("blk.2.ffn_down.weight", format!("{layer}.mlp.down_proj.weight")),
    ] {
        assert_eq!(model.values(name), source[&from].1, "{name}");
    }
    for (name, from) in [
        ("v.patch_embd.weight", format!("{tower}.embeddings.patch_embedding.weight")),
        ("v.position_embd.weight", format!("{tower}.embeddings.position_embedding.weight")),
        ("v.blk.1.attn_out.weight", format!("{tower}.encoder.layers.1.self_attn.out_proj.weight")),
        ("v.blk.1.ffn_up.weight", format!("{tower}.encoder.layers.1.mlp.fc1.weight")),
        ("v.blk.1.ffn_down.bias", format!("{tower}.encoder.layers.1.mlp.fc2.bias")),
        ("v.blk.0.ln2.bias", format!("{tower}.encoder.layers.0.layer_norm2.bias")),
        ("mm.0.weight", "multi_modal_projector.linear_1.weight".into()),
        ("mm.2.bias", "multi_modal_projector.linear_2.bias".into()),
        ("v.image_newline", "image_newline".into()),
    ] {
        assert_eq!(mmproj.values(name), source[&from].1, "{name}");
    }
    // 3 blocks of 7 weights, 3 biases, 2 norms, and embedding, norm, head.
    assert_eq!(model.content.tensor_infos.len(), 3 * 12 + 3);
    assert!(!mmproj.content.tensor_infos.keys().any(|name| name.contains("post_ln")));
}

#[test]
fn metadata_and_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let (model, mmproj) = run(dir.path(), &["--type", "q8_0"]);
    assert_eq!(model.string("general.architecture"), "qwen2");
    assert_eq!(model.string("general.name"), "tiny-model");
    assert_eq!((model.u32("general.file_type"), model.u32("general.quantization_version")), (7, 2));
    assert_eq!((model.u32("qwen2.attention.head_count"), model.u32("qwen2.attention.head_count_kv")), (4, 2));
    assert_eq!((model.u32("qwen2.block_count"), model.u32("qwen2.context_length")), (3, 512));
    // Absent from config.json: the default of transformers.
    let epsilon = model.content.metadata["qwen2.attention.layer_norm_rms_epsilon"].to_f32().unwrap();
    assert_eq!(epsilon, 1e-6);
    assert_eq!(model.content.metadata["qwen2.rope.freq_base"].to_f32().unwrap(), 1e6);

    assert_eq!((model.string("tokenizer.ggml.model"), model.string("tokenizer.ggml.pre")), ("gpt2", "qwen2"));
    let tokens = model.strings("tokenizer.ggml.tokens");
    assert_eq!(tokens.len(), tiny::VOCAB);
    assert_eq!((tokens[33].as_str(), tokens[32].as_str(), tokens[259].as_str()), ("!", "Ġ", "hell"));
    assert_eq!((tokens[299].as_str(), tokens[319].as_str()), ("<|im_end|>", "[PAD319]"));
    let types = model.content.metadata["tokenizer.ggml.token_type"].to_vec().unwrap();
    let types: Vec<i32> = types.iter().map(|t| t.to_i32().unwrap()).collect();
    // Normal, control, user-defined, unused: llama.cpp's numbers.
    assert_eq!((types[0], types[299], types[301], types[302], types[319]), (1, 3, 4, 5, 5));
    assert_eq!(model.strings("tokenizer.ggml.merges"), ["h e", "l l", "Ġ t", "he ll"]);
    assert_eq!((model.u32("tokenizer.ggml.eos_token_id"), model.u32("tokenizer.ggml.padding_token_id")), (299, 298));
    assert!(matches!(model.content.metadata["tokenizer.ggml.add_bos_token"], Value::Bool(false)));

    assert_eq!((mmproj.string("general.type"), mmproj.string("clip.projector_type")), ("mmproj", "llava_onevision"));
    assert_eq!((mmproj.u32("clip.vision.block_count"), mmproj.u32("clip.vision.projection_dim")), (2, 256));
    let std = mmproj.content.metadata["clip.vision.image_std"].to_vec().unwrap();
    assert_eq!(std[1].to_f32().unwrap(), 0.25);
    // Width before height; the config has height before width.
    let points = mmproj.content.metadata["clip.vision.image_grid_pinpoints"].to_vec().unwrap();
    let points: Vec<i32> = points.iter().map(|p| p.to_i32().unwrap()).collect();
    assert_eq!(points, [28, 28, 56, 28, 28, 56, 56, 56]);
}

#[test]
fn q8_0_is_within_half_a_step() {
    let dir = tempfile::tempdir().unwrap();
    let (mut model, mut mmproj) = run(dir.path(), &["--type", "q8_0", "--mmproj-type", "q8_0"]);
    let source = tensors();
    for (read, name, from) in [
        (&mut model, "blk.0.ffn_down.weight", "language_model.model.layers.0.mlp.down_proj.weight"),
        (&mut mmproj, "mm.2.weight", "multi_modal_projector.linear_2.weight"),
    ] {
        assert_eq!(read.ty(name), "Q8_0");
        // Values reach 1: step 1/127, half of it, and the scale's own rounding to f16.
        let worst = read.values(name).iter().zip(&source[from].1).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst > 0.0 && worst < 0.5 / 127.0 * 1.001 + 1.0 / 2048.0, "{name}: {worst}");
    }
    assert_eq!((mmproj.ty("v.patch_embd.weight"), mmproj.ty("v.position_embd.weight")), ("F16".into(), "F32".into()));
}

#[test]
fn types_of_linears_embedding_and_output() {
    let dir = tempfile::tempdir().unwrap();
    let types = |args: &[&str]| {
        let (model, _) = run(dir.path(), args);
        ["token_embd.weight", "output.weight", "blk.0.ffn_down.weight", "blk.1.attn_v.weight", "blk.0.attn_v.bias"]
            .map(|name| model.ty(name))
    };
    assert_eq!(types(&["--type", "q3_k"]), ["Q6K", "Q6K", "Q3K", "Q3K", "F32"]);
    assert_eq!(types(&["--type", "q4_k", "--embedding-type", "q8_0"]), ["Q8_0", "Q6K", "Q4K", "Q4K", "F32"]);
    assert_eq!(types(&["--type", "f16", "--output-type", "f32"]), ["F16", "F32", "F16", "F16", "F32"]);
    // llama-quantize's mix for three layers without tied embeddings.
    assert_eq!(types(&["--type", "q3_k_m"]), ["Q3K", "Q6K", "Q4K", "Q5K", "F32"]);
}

#[test]
fn naming_and_shards_make_no_difference() {
    let mut files = Vec::new();
    for (naming, shards) in [(Naming::Published, 1), (Naming::Nested, 1), (Naming::Published, 3)] {
        let dir = tempfile::tempdir().unwrap();
        let model = checkpoint(dir.path(), naming, shards);
        let done = convert(&model, &dir.path().join("m.gguf"), &["--type", "q4_k", "--quiet"]);
        assert!(done.status.success(), "{}", text(&done.stderr));
        assert!(done.stdout.is_empty() && done.stderr.is_empty(), "--quiet is quiet");
        assert_eq!(listing(dir.path()), ["m.gguf", "m.mbq.json", "mmproj-m-f16.gguf", "tiny-model"]);
        files.push(["m.gguf", "mmproj-m-f16.gguf"].map(|f| std::fs::read(dir.path().join(f)).unwrap()));
    }
    assert!(files[0] == files[1], "transformers 5's names");
    assert!(files[0] == files[2], "three shards");
}

/// Rows of 64 in the tower fit Q8_0; rows of 256 and 512 fit every type. A width of 320 fits neither Q3_K nor MBQ3.
#[test]
fn rows_that_do_not_fit_fall_back_and_the_summary_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut all = tensors();
    let inner = 320;
    for (name, (shape, values)) in &mut all {
        if name.contains("mlp.gate_proj") || name.contains("mlp.up_proj") {
            *shape = vec![inner, tiny::HIDDEN];
        } else if name.contains("mlp.down_proj") {
            *shape = vec![tiny::HIDDEN, inner];
        } else {
            continue;
        }
        *values = tiny::values(shape.iter().product(), 5);
    }
    let model = tiny::checkpoint_with(dir.path(), Naming::Published, 1, all);
    let mut config = tiny::config();
    config["text_config"]["intermediate_size"] = inner.into();
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    let out = dir.path().join("o.gguf");
    let done = convert(&model, &out, &["--type", "q3_k", "--json"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let summary: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    let fallbacks = summary["model"]["fallbacks"].as_array().unwrap();
    assert_eq!(fallbacks.len(), tiny::LAYERS);
    assert_eq!(fallbacks[1]["tensor"], "blk.1.ffn_down.weight");
    assert_eq!((fallbacks[1]["wanted"].as_str(), fallbacks[1]["used"].as_str()), (Some("q3_k"), Some("q4_0")));
    assert_eq!(open(&out).ty("blk.1.ffn_down.weight"), "Q4_0");
    // q, k, v, o, gate, up of 256-wide rows at 3.4375 bits, down at 4.5.
    let (narrow, wide) = (256 * (256 + 128 + 128 + 256 + 2 * 320), 320 * 256);
    let expected = (narrow as f64 * 3.4375 + wide as f64 * 4.5) / (narrow + wide) as f64;
    assert!((summary["decoder_bits_per_weight"].as_f64().unwrap() - expected).abs() < 1e-9);
    let human = convert(&model, &out, &["--type", "q3_k"]);
    assert!(text(&human.stdout).contains("rows of 320 do not fit q3_k: 3 tensors are q4_0"), "{}", text(&human.stdout));
}

#[test]
fn every_type_converts() {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), Naming::Published, 1);
    for ty in mbq_convert::gguf::FileType::all() {
        let out = dir.path().join("o.gguf");
        let done = convert(&model, &out, &["--type", &ty.to_string(), "--quiet"]);
        assert!(done.status.success(), "{ty}: {}", text(&done.stderr));
        let file = mbq_convert::gguf::GgufFile::open(&out).unwrap();
        assert_eq!(file.metadata.u64("general.file_type"), Some(ty.id().into()), "{ty}");
        if let mbq_convert::gguf::FileType::Plain(t) = ty {
            assert_eq!(file.tensor("blk.0.attn_q.weight").unwrap().ty(), Some(t));
        }
    }
}

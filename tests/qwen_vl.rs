//! Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints: their tensors and keys, what is refused, and the runtime on what becomes
//! of them against transformers (`tests/reference/qwen_vl_goldens.py`, which gives tensors the same values by their names).
mod common;
mod tiny;

use common::compared::{Bounds, agrees, f32s, goldens, load, picture};
use mbq_convert::gguf::GgufFile;
use mbq_convert::runtime::engine::{Decoder, Piece, Runtime};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tiny::card::carded;
use tiny::{Naming, Tensors, convert, small, text, tokenizer_with, write_weights};

const HIDDEN: usize = 64;
const INNER: usize = 96;
const KV: usize = 32;
const VOCAB: usize = 320;
const TOWER: usize = 32;
const FAMILIES: [&str; 3] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"];

/// Tensors of the text model and of the tower under transformers 5's names.
fn tensors(family: &str) -> Tensors {
    let third = family == "qwen3_vl";
    let mut all = Tensors::new();
    let mut add =
        |name: String, shape: &[usize]| drop(all.insert(name.clone(), small(&name, shape, &["norm", "ln_q"])));
    add("lm_head.weight".into(), &[VOCAB, HIDDEN]);
    add("model.language_model.embed_tokens.weight".into(), &[VOCAB, HIDDEN]);
    add("model.language_model.norm.weight".into(), &[HIDDEN]);
    for i in 0..3 {
        let layer = |part: &str| format!("model.language_model.layers.{i}.{part}");
        add(layer("input_layernorm.weight"), &[HIDDEN]);
        add(layer("post_attention_layernorm.weight"), &[HIDDEN]);
        for (part, rows) in [("q", HIDDEN), ("k", KV), ("v", KV)] {
            add(layer(&format!("self_attn.{part}_proj.weight")), &[rows, HIDDEN]);
            if !third {
                add(layer(&format!("self_attn.{part}_proj.bias")), &[rows]);
            } else if part != "v" {
                add(layer(&format!("self_attn.{part}_norm.weight")), &[32]);
            }
        }
        add(layer("self_attn.o_proj.weight"), &[HIDDEN, HIDDEN]);
        add(layer("mlp.gate_proj.weight"), &[INNER, HIDDEN]);
        add(layer("mlp.up_proj.weight"), &[INNER, HIDDEN]);
        add(layer("mlp.down_proj.weight"), &[HIDDEN, INNER]);
    }
    tower(family, &mut add);
    all
}

fn tower(family: &str, add: &mut impl FnMut(String, &[usize])) {
    let (third, rms) = (family == "qwen3_vl", family == "qwen2_5_vl");
    let inner = if family == "qwen2_vl" { 64 } else { 48 };
    let patch = if third { 16 } else { 14 };
    let visual = |part: &str| format!("model.visual.{part}");
    add(visual("patch_embed.proj.weight"), &[TOWER, 3, 2, patch, patch]);
    if third {
        add(visual("patch_embed.proj.bias"), &[TOWER]);
        add(visual("pos_embed.weight"), &[16, TOWER]);
    }
    let mut linears: Vec<(String, [usize; 2])> = Vec::new();
    let mut norms: Vec<(String, usize)> = Vec::new();
    for i in 0..blocks(family) {
        let block = |part: &str| format!("blocks.{i}.{part}");
        linears.push((block("attn.qkv"), [3 * TOWER, TOWER]));
        linears.push((block("attn.proj"), [TOWER, TOWER]));
        let mlp: &[&str] = match family {
            "qwen2_vl" => &["fc1", "fc2"],
            "qwen2_5_vl" => &["gate_proj", "up_proj", "down_proj"],
            _ => &["linear_fc1", "linear_fc2"],
        };
        for (at, name) in mlp.iter().enumerate() {
            let shape = if at + 1 == mlp.len() { [TOWER, inner] } else { [inner, TOWER] };
            linears.push((block(&format!("mlp.{name}")), shape));
        }
        norms.extend([(block("norm1"), TOWER), (block("norm2"), TOWER)]);
    }
    let merged = 4 * TOWER;
    let mut merger = |name: &str, norm: &str, first: &str, second: &str, width: usize| {
        norms.push((format!("{name}.{norm}"), width));
        linears.push((format!("{name}.{first}"), [merged, merged]));
        linears.push((format!("{name}.{second}"), [HIDDEN, merged]));
    };
    if third {
        merger("merger", "norm", "linear_fc1", "linear_fc2", TOWER);
        for i in 0..2 {
            merger(&format!("deepstack_merger_list.{i}"), "norm", "linear_fc1", "linear_fc2", merged);
        }
    } else {
        merger("merger", "ln_q", "mlp.0", "mlp.2", TOWER);
    }
    for (name, shape) in linears {
        add(visual(&format!("{name}.weight")), &shape);
        add(visual(&format!("{name}.bias")), &shape[..1]);
    }
    for (name, width) in norms {
        add(visual(&format!("{name}.weight")), &[width]);
        if !rms {
            add(visual(&format!("{name}.bias")), &[width]);
        }
    }
}

fn blocks(family: &str) -> usize {
    match family {
        "qwen2_vl" => 2,
        "qwen2_5_vl" => 4,
        _ => 3,
    }
}

/// As published: the first two families have the text model's keys on the outside.
fn config(family: &str, naming: Naming) -> Value {
    let third = family == "qwen3_vl";
    let mut text = json!({
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "rope_theta": 10000.0
    });
    let vision = match family {
        "qwen2_vl" => json!({"depth": 2, "embed_dim": TOWER, "hidden_size": HIDDEN, "mlp_ratio": 2, "num_heads": 2,
                             "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}),
        "qwen2_5_vl" => {
            json!({"depth": 4, "hidden_size": TOWER, "intermediate_size": 48, "num_heads": 2, "patch_size": 14,
                               "out_hidden_size": HIDDEN, "fullatt_block_indexes": [1, 3], "window_size": 112,
                               "hidden_act": "silu", "tokens_per_second": 2})
        }
        _ => json!({"depth": 3, "hidden_size": TOWER, "intermediate_size": 48, "num_heads": 2, "patch_size": 16,
                    "out_hidden_size": HIDDEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2],
                    "hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_vl"}),
    };
    let mut outer = json!({"model_type": family, "tie_word_embeddings": false, "image_token_id": 302,
                           "vision_start_token_id": 300, "vision_end_token_id": 301, "vision_config": vision});
    if third {
        text["head_dim"] = 32.into();
        text["rope_scaling"] = json!({"mrope_interleaved": true, "mrope_section": [4, 6, 6], "rope_type": "default"});
    } else {
        text["rope_scaling"] = json!({"type": "mrope", "mrope_section": [4, 6, 6]});
    }
    if third || naming == Naming::Nested {
        text["model_type"] = format!("{family}_text").into();
        outer["text_config"] = text;
    } else {
        text["use_sliding_window"] = false.into();
        text["sliding_window"] = 32.into();
        outer.as_object_mut().unwrap().extend(text.as_object().unwrap().clone());
    }
    outer
}

/// The small tokenizer with Qwen's tokens around pictures.
fn tokenizer() -> Value {
    tokenizer_with(&[
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ])
}

/// As published, without what videos need.
const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\
    {% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}\
    {% for content in message['content'] %}{% if content['type'] == 'image' %}\
    <|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}\
    <|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Writes a checkpoint in two shards.
fn checkpoint(parent: &Path, family: &str, naming: Naming) -> PathBuf {
    let dir = parent.join(family);
    std::fs::create_dir_all(&dir).unwrap();
    let write = |file: &str, json: Value| std::fs::write(dir.join(file), json.to_string()).unwrap();
    write("config.json", config(family, naming));
    write("tokenizer.json", tokenizer());
    write("tokenizer_config.json", json!({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}));
    write("chat_template.json", json!({"chat_template": TEMPLATE}));
    write(
        "preprocessor_config.json",
        json!({"min_pixels": 3136, "max_pixels": 1 << 20, "patch_size": if family == "qwen3_vl" { 16 } else { 14 },
               "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5],
               "image_processor_type": "Qwen2VLImageProcessor"}),
    );
    let published = |name: &str| match naming {
        Naming::Published if family != "qwen3_vl" => {
            name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        }
        _ => name.to_string(),
    };
    let stored: Tensors = tensors(family).into_iter().map(|(name, t)| (published(&name), t)).collect();
    write_weights(&dir, &stored, 2);
    dir
}

const F32: [&str; 8] = ["--type", "f32", "--embedding-type", "f32", "--output-type", "f32", "--mmproj-type", "f32"];

/// Both files in f32, in `parent`.
fn pair(parent: &Path, family: &str, naming: Naming) -> [PathBuf; 2] {
    let done = convert(&checkpoint(parent, family, naming), &parent.join("model.gguf"), &F32);
    assert!(done.status.success(), "{family}: {}", text(&done.stderr));
    ["model.gguf", "mmproj-model-f32.gguf"].map(|file| parent.join(file))
}

/// Fused rows in three, and the convolution over two pictures in two.
#[test]
fn tensors_lie_where_the_runtime_wants_them() {
    for family in FAMILIES {
        let parent = tempfile::tempdir().unwrap();
        let [model, mmproj] = pair(parent.path(), family, Naming::Published).map(|p| GgufFile::open(&p).unwrap());
        let stored = tensors(family);
        let of = |name: &str| &stored[name];
        assert_eq!(f32s(&model, "token_embd.weight"), *of("model.language_model.embed_tokens.weight"));
        assert_eq!(f32s(&model, "blk.2.attn_q.weight"), *of("model.language_model.layers.2.self_attn.q_proj.weight"));
        let (shape, values) = of("model.visual.patch_embed.proj.weight");
        let plane = shape[3] * shape[4];
        for (frame, name) in ["v.patch_embd.weight", "v.patch_embd.weight.1"].into_iter().enumerate() {
            let planes = values.chunks_exact(plane).skip(frame).step_by(2);
            let want: Vec<f32> = planes.flatten().copied().collect();
            assert_eq!(f32s(&mmproj, name), (vec![TOWER, 3, shape[3], shape[4]], want), "{family}: {name}");
        }
        let (_, qkv) = of("model.visual.blocks.1.attn.qkv.weight");
        let (_, bias) = of("model.visual.blocks.1.attn.qkv.bias");
        if family == "qwen3_vl" {
            assert_eq!(f32s(&mmproj, "v.blk.1.attn_qkv.weight").1, *qkv);
            assert_eq!(
                f32s(&mmproj, "v.deepstack.2.fc2.weight"),
                *of("model.visual.deepstack_merger_list.1.linear_fc2.weight")
            );
            continue;
        }
        for (part, name) in ["q", "k", "v"].into_iter().enumerate() {
            let (weight, bias) = (&qkv[part * TOWER * TOWER..][..TOWER * TOWER], &bias[part * TOWER..][..TOWER]);
            assert_eq!(f32s(&mmproj, &format!("v.blk.1.attn_{name}.weight")), (vec![TOWER; 2], weight.to_vec()));
            assert_eq!(f32s(&mmproj, &format!("v.blk.1.attn_{name}.bias")), (vec![TOWER], bias.to_vec()));
        }
    }
}

/// transformers 4's names and flat keys, transformers 5's names and sections: the same files.
#[test]
fn both_namings_give_the_same_files() {
    for family in FAMILIES {
        let [published, nested] = [Naming::Published, Naming::Nested].map(|naming| {
            let parent = tempfile::tempdir().unwrap();
            pair(parent.path(), family, naming).map(|file| std::fs::read(file).unwrap())
        });
        assert!(published == nested, "{family}");
    }
}

#[test]
fn keys_are_those_that_clip_reads() {
    for (family, projector, arch) in [
        ("qwen2_vl", "qwen2vl_merger", "qwen2vl"),
        ("qwen2_5_vl", "qwen2.5vl_merger", "qwen2vl"),
        ("qwen3_vl", "qwen3vl_merger", "qwen3vl"),
    ] {
        let parent = tempfile::tempdir().unwrap();
        let [model, mmproj] = pair(parent.path(), family, Naming::Published).map(|p| GgufFile::open(&p).unwrap());
        assert_eq!(
            (model.metadata.str("general.architecture"), mmproj.metadata.str("clip.projector_type")),
            (Some(arch), Some(projector))
        );
        let list = |file: &GgufFile, key: &str| -> Vec<i64> {
            let array = file.metadata.get(key).and_then(|v| v.as_array()).unwrap_or_else(|| panic!("{family}: {key}"));
            array.iter().map(|v| v.as_i64().or(v.as_bool().map(i64::from)).unwrap()).collect()
        };
        assert_eq!(list(&model, &format!("{arch}.rope.dimension_sections")), [4, 6, 6, 0]);
        let number = |key: &str| mmproj.metadata.get(key).and_then(|v| v.as_u64());
        assert_eq!(number("clip.vision.image_max_pixels"), Some(1 << 20));
        assert_eq!(number("clip.vision.n_wa_pattern"), (family == "qwen2_5_vl").then_some(2));
        if family == "qwen3_vl" {
            assert_eq!(model.metadata.get("qwen3vl.n_deepstack_layers").and_then(|v| v.as_u64()), Some(2));
            assert_eq!(list(&mmproj, "clip.vision.is_deepstack_layers"), [1, 0, 1]);
            assert_eq!(number("clip.vision.image_size"), Some(64));
        }
        let template = model.metadata.str("tokenizer.chat_template").unwrap();
        assert!(!template.contains("__media"), "llama.cpp's strings need no head: {template}");
    }
}

/// A picture of twelve by eight patches and a short prompt: the tower's windows, its learned positions, DeepStack and
/// positions in sections all take part.
#[test]
fn the_runtime_computes_what_transformers_does() {
    let Some(dir) = common::runtime_dir() else { return };
    let runtime = Runtime::open(&dir).unwrap();
    let goldens = goldens("qwen_vl.json");
    for family in FAMILIES {
        let parent = tempfile::tempdir().unwrap();
        let [file, mmproj] = pair(parent.path(), family, Naming::Published);
        let vision = load(&runtime, &file, &mmproj);
        let patch = if family == "qwen3_vl" { 16 } else { 14 };
        let pictures = [picture(12 * patch, 8 * patch)];
        let pieces =
            vision.tokenize("hell<__media__> t", Path::new("picture"), &pictures).unwrap().pieces(true).unwrap();
        let [Piece::Text(before), Piece::Media(media), Piece::Text(behind)] = pieces.as_slice() else {
            panic!("{family}: {} pieces", pieces.len());
        };
        assert_eq!((before.as_slice(), behind.as_slice()), ([259, 300].as_slice(), [301, 258].as_slice()), "{family}");
        let golden = &goldens[family];
        assert_eq!(media.tokens as u64, golden["tokens"].as_u64().unwrap(), "{family}");
        agrees(&runtime, &file, &vision, &pieces, (family, golden), Bounds { embedding: 1e-3, kl: 1e-5 });
    }
}

/// llama.cpp b12032 reads the key for all architectures of these but Qwen2-VL's: `patches/0010`.
#[test]
fn the_runtime_reads_the_epsilon() {
    let Some(dir) = common::runtime_dir() else { return };
    let runtime = Runtime::open(&dir).unwrap();
    let pieces = [Piece::Text(vec![259, 300, 301, 258])];
    let logits = |file: &Path| {
        let mut decoder = Decoder::load(&runtime, file, common::compared::COMPUTE, 64, None).unwrap();
        decoder.prefill(&pieces).unwrap();
        let mut logits = Vec::new();
        decoder.score(&[&[0]], |_, _, row| logits = row.to_vec()).unwrap();
        logits
    };
    for family in FAMILIES {
        let parent = tempfile::tempdir().unwrap();
        let [file, _] = pair(parent.path(), family, Naming::Published);
        let before = logits(&file);
        let mut bytes = std::fs::read(&file).unwrap();
        let key = b"attention.layer_norm_rms_epsilon";
        let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
        bytes[at..at + 4].copy_from_slice(&0.5f32.to_le_bytes());
        std::fs::write(&file, bytes).unwrap();
        assert!(logits(&file) != before, "{family}");
    }
}

/// `edit` makes the checkpoint one that is refused, with these words and no output.
fn refused(family: &str, naming: Naming, edit: impl Fn(&mut Value), words: &[&str]) {
    let parent = tempfile::tempdir().unwrap();
    let dir = checkpoint(parent.path(), family, naming);
    tiny::refused(&dir, if words[0].ends_with(".json") { words[0] } else { "config.json" }, edit, words);
}

#[test]
fn what_the_runtime_cannot_do_is_refused() {
    use Naming::{Nested, Published};
    let [two, five, three] = FAMILIES;
    refused(
        three,
        Published,
        |j| j["model_type"] = "qwen3_vl_moe".into(),
        &["qwen3_vl_moe", "Qwen3-VL (dense)", "Qwen2.5-VL"],
    );
    refused(three, Published, |j| j["text_config"]["num_experts"] = 128.into(), &["text_config.num_experts"]);
    refused(
        two,
        Published,
        |j| {
            j["use_sliding_window"] = true.into();
            j["max_window_layers"] = 1.into()
        },
        &["use_sliding_window"],
    );
    refused(
        five,
        Nested,
        |j| j["text_config"]["layer_types"] = json!(["full_attention", "sliding_attention", "full_attention"]),
        &["layer_types"],
    );
    refused(five, Published, |j| j["rope_scaling"]["type"] = "yarn".into(), &["rope_scaling.type", "yarn"]);
    refused(
        three,
        Published,
        |j| j["text_config"]["rope_scaling"]["rope_type"] = "dynamic".into(),
        &["rope_scaling.rope_type", "dynamic"],
    );
    refused(
        two,
        Published,
        |j| j["rope_scaling"]["mrope_section"] = json!([4, 6, 7]),
        &["rope_scaling.mrope_section", "[4,6,7]"],
    );
    refused(two, Published, |j| drop(j.as_object_mut().unwrap().remove("rope_scaling")), &["mrope_section", "missing"]);
    refused(
        three,
        Published,
        |j| j["text_config"]["rope_scaling"]["mrope_interleaved"] = false.into(),
        &["mrope_interleaved"],
    );
    refused(five, Published, |j| j["vision_config"]["window_size"] = 224.into(), &["vision_config.window_size", "224"]);
    refused(
        five,
        Published,
        |j| j["vision_config"]["fullatt_block_indexes"] = json!([1, 2]),
        &["fullatt_block_indexes"],
    );
    refused(
        three,
        Published,
        |j| j["vision_config"]["deepstack_visual_indexes"] = json!([2, 0]),
        &["deepstack_visual_indexes"],
    );
    // As many as blocks: llama.cpp would end the program.
    refused(three, Published, |j| j["text_config"]["num_hidden_layers"] = 2.into(), &["deepstack_visual_indexes"]);
    refused(
        two,
        Published,
        |j| j["vision_config"]["spatial_merge_size"] = 4.into(),
        &["vision_config.spatial_merge_size"],
    );
    refused(
        two,
        Published,
        |j| j["vision_config"]["hidden_act"] = "gelu".into(),
        &["vision_config.hidden_act", "quick_gelu"],
    );
    // Of the tower, a fused tensor of another shape than it says.
    refused(two, Published, |j| j["vision_config"]["embed_dim"] = 48.into(), &["visual.", "[48"]);
    refused(two, Published, |j| j["vision_start_token_id"] = 299.into(), &["<|vision_start|>", "299"]);
    refused(two, Published, |j| j["vision_start_token_id"] = true.into(), &["<|vision_start|>", "is true"]);
    refused(five, Published, |j| j["merge_size"] = 4.into(), &["preprocessor_config.json", "merge_size"]);
    refused(five, Published, |j| j["do_resize"] = false.into(), &["preprocessor_config.json", "do_resize"]);
}

/// Qwen2.5-VL-3B's front matter has a licence's name without `license: other`, which the hub wants with it.
#[test]
fn cards() {
    let parent = tempfile::tempdir().unwrap();
    let link = "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE";
    let front = format!(
        "license_name: qwen-research\nlicense_link: {link}\nlanguage:\n- en\npipeline_tag: image-text-to-text\ntags:\n\
         - multimodal\nlibrary_name: transformers"
    );
    for family in FAMILIES {
        carded(
            &checkpoint(parent.path(), family, Naming::Published),
            &front,
            &[
                ("license", &["other"]),
                ("license_name", &["qwen-research"]),
                ("license_link", &["https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE"]),
                ("language", &["en"]),
                ("tags", &["gguf", "llama.cpp", "mbq-convert", "q8_0", "multimodal"]),
            ],
        );
    }
}

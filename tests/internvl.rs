//! InternVL checkpoints in both layouts: their tensors and keys, what is refused, and the runtime on what becomes of them
//! against transformers (`tests/reference/internvl_goldens.py`, which gives tensors the same values by their names).
mod common;
mod tiny;

use common::compared::{Bounds, agrees, flattened, goldens, load, picture};
use common::served::{Served, picture as about_picture, program};
use mbq_convert::gguf::GgufFile;
use mbq_convert::image::Rgb;
use mbq_convert::runtime::engine::{Piece, Runtime};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tiny::card::carded;
use tiny::{Tensors, convert, small, text, tokenizer_with, write_weights};

const HIDDEN: usize = 64;
const INNER: usize = 96;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const VOCAB: usize = 320;
const TOWER: usize = 32;
const TOWER_INNER: usize = 48;
/// Side of a tile, pixels.
const SIDE: usize = 56;
/// Text models. InternLM2's is behind the tower with RMS norms, and in the original layout only.
const TEXTS: [&str; 3] = ["qwen2", "qwen3", "internlm2"];

/// Whose tensor names and configuration it is.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Layout {
    Original,
    /// transformers 4.
    Published,
    /// transformers 5.
    Nested,
}
use Layout::{Nested, Original, Published};

fn head_dim(llm: &str) -> usize {
    if llm == "qwen3" { 32 } else { HIDDEN / HEADS }
}

/// Under transformers 5's names.
fn tensors(llm: &str) -> Tensors {
    let mut all = Tensors::new();
    let mut add = |name: String, shape: &[usize]| drop(all.insert(name.clone(), small(&name, shape, &["norm"])));
    let (q, kv) = (HEADS * head_dim(llm), KV_HEADS * head_dim(llm));
    add("lm_head.weight".into(), &[VOCAB, HIDDEN]);
    add("model.language_model.embed_tokens.weight".into(), &[VOCAB, HIDDEN]);
    add("model.language_model.norm.weight".into(), &[HIDDEN]);
    for i in 0..3 {
        let layer = |part: &str| format!("model.language_model.layers.{i}.{part}");
        add(layer("input_layernorm.weight"), &[HIDDEN]);
        add(layer("post_attention_layernorm.weight"), &[HIDDEN]);
        for (part, rows) in [("q", q), ("k", kv), ("v", kv)] {
            add(layer(&format!("self_attn.{part}_proj.weight")), &[rows, HIDDEN]);
            if llm == "qwen2" {
                add(layer(&format!("self_attn.{part}_proj.bias")), &[rows]);
            } else if llm == "qwen3" && part != "v" {
                add(layer(&format!("self_attn.{part}_norm.weight")), &[32]);
            }
        }
        add(layer("self_attn.o_proj.weight"), &[HIDDEN, q]);
        add(layer("mlp.gate_proj.weight"), &[INNER, HIDDEN]);
        add(layer("mlp.up_proj.weight"), &[INNER, HIDDEN]);
        add(layer("mlp.down_proj.weight"), &[HIDDEN, INNER]);
    }
    tower(llm == "internlm2", &mut add);
    all
}

/// With `rms` as the tower of 6 B: RMS norms, of q and k too, and no biases on q, k, v.
fn tower(rms: bool, add: &mut impl FnMut(String, &[usize])) {
    let name = |part: &str| format!("model.vision_tower.{part}");
    add(name("embeddings.cls_token"), &[1, 1, TOWER]);
    add(name("embeddings.position_embeddings"), &[1, 17, TOWER]);
    add(name("embeddings.patch_embeddings.projection.weight"), &[TOWER, 3, 14, 14]);
    add(name("embeddings.patch_embeddings.projection.bias"), &[TOWER]);
    for i in 0..2 {
        let block = |part: &str| name(&format!("encoder.layer.{i}.{part}"));
        for norm in ["layernorm_before", "layernorm_after"] {
            add(block(&format!("{norm}.weight")), &[TOWER]);
            if !rms {
                add(block(&format!("{norm}.bias")), &[TOWER]);
            }
        }
        for part in ["q", "k", "v"] {
            add(block(&format!("attention.{part}_proj.weight")), &[TOWER, TOWER]);
            match rms {
                false => add(block(&format!("attention.{part}_proj.bias")), &[TOWER]),
                true if part != "v" => add(block(&format!("attention.{part}_norm.weight")), &[TOWER]),
                true => (),
            }
        }
        for (part, rows, cols) in [
            ("attention.projection_layer", TOWER, TOWER),
            ("mlp.fc1", TOWER_INNER, TOWER),
            ("mlp.fc2", TOWER, TOWER_INNER),
        ] {
            add(block(&format!("{part}.weight")), &[rows, cols]);
            add(block(&format!("{part}.bias")), &[rows]);
        }
        ["lambda_1", "lambda_2"].iter().for_each(|scale| add(block(scale), &[TOWER]));
    }
    let projector = |part: &str| format!("model.multi_modal_projector.{part}");
    add(projector("layer_norm.weight"), &[4 * TOWER]);
    add(projector("layer_norm.bias"), &[4 * TOWER]);
    for (part, cols) in [("linear_1", 4 * TOWER), ("linear_2", HIDDEN)] {
        add(projector(&format!("{part}.weight")), &[HIDDEN, cols]);
        add(projector(&format!("{part}.bias")), &[HIDDEN]);
    }
}

/// transformers' names and OpenGVLab's, longer ones first.
const ORIGINAL: [(&str, &str); 15] = [
    ("model.vision_tower.", "vision_model."),
    ("model.multi_modal_projector.layer_norm", "mlp1.0"),
    ("model.multi_modal_projector.linear_1", "mlp1.1"),
    ("model.multi_modal_projector.linear_2", "mlp1.3"),
    ("encoder.layer.", "encoder.layers."),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("patch_embeddings.projection", "patch_embedding"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_", "ls"),
    ("attention.projection_layer", "attn.proj"),
    ("attention.q_", "attn.q_"),
    ("attention.k_", "attn.k_"),
    ("attention.v_", "attn.v_"),
];
const INTERNLM2: [(&str, &str); 9] = [
    ("self_attn.o_proj", "attention.wo"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("post_attention_layernorm", "ffn_norm"),
    ("input_layernorm", "attention_norm"),
    ("embed_tokens", "tok_embeddings"),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.output."),
];

/// Of q, k and v, the heads of each group that share a key, one below the other; one group: all of them.
fn fused(parts: [&(Vec<usize>, Vec<f32>); 3], groups: usize) -> (Vec<usize>, Vec<f32>) {
    let rows = parts.iter().map(|(shape, _)| shape[0]).sum();
    let of = |(_, values): &(Vec<usize>, Vec<f32>), group: usize| {
        let size = values.len() / groups;
        values[group * size..][..size].to_vec()
    };
    let values = (0..groups).flat_map(|group| parts.iter().flat_map(move |part| of(part, group))).collect();
    ([&[rows], &parts[0].0[1..]].concat(), values)
}

/// As `layout` stores them.
fn stored(llm: &str, layout: Layout) -> Tensors {
    let all = tensors(llm);
    let plain = |name: &str| match name.strip_prefix("model.language_model.") {
        Some(rest) => format!("language_model.model.{rest}"),
        None => name.replace("lm_head.", "language_model.lm_head."),
    };
    let mut out = Tensors::new();
    for (name, tensor) in &all {
        match layout {
            Nested => drop(out.insert(name.clone(), tensor.clone())),
            Published => drop(out.insert(plain(name).trim_start_matches("model.").into(), tensor.clone())),
            Original => {
                let of_tower = name.starts_with("model.vision_tower");
                let fuses = name.contains("_proj.") && (of_tower || llm == "internlm2") && !name.contains("mlp.");
                let fuses = fuses && !name.contains("o_proj");
                if fuses && !name.contains("q_proj") {
                    continue;
                }
                let tensor = match fuses {
                    false => tensor.clone(),
                    true => {
                        let parts = ["q_proj", "k_proj", "v_proj"].map(|part| &all[&name.replace("q_proj", part)]);
                        fused(parts, if of_tower { 1 } else { KV_HEADS })
                    }
                };
                let name = if fuses && of_tower { name.replace("attention.q_proj", "attn.qkv") } else { name.clone() };
                let name = if fuses && !of_tower { name.replace("self_attn.q_proj", "attention.wqkv") } else { name };
                let table: &[_] = if of_tower || name.contains("multi_modal") { &ORIGINAL } else { &INTERNLM2 };
                let other = || table.iter().fold(name.clone(), |name, (from, to)| name.replace(from, to));
                let renamed = if llm == "internlm2" || table.len() == ORIGINAL.len() { other() } else { plain(&name) };
                out.insert(renamed, tensor);
            }
        }
    }
    out
}

fn config(llm: &str, layout: Layout) -> Value {
    let original = layout == Original;
    let rms = llm == "internlm2";
    let mut text = json!({
        "model_type": llm, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 3,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0,
        "tie_word_embeddings": false
    });
    if llm == "qwen3" {
        text["head_dim"] = 32.into();
    }
    if rms {
        text["rope_scaling"] = json!({"type": "dynamic", "factor": 2.0});
        text["bias"] = false.into();
    }
    let norms = if rms { "rms_norm" } else { "layer_norm" };
    let mut vision = json!({"hidden_size": TOWER, "intermediate_size": TOWER_INNER, "num_hidden_layers": 2,
        "num_attention_heads": 2, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "norm_type": norms});
    let more = match original {
        true => json!({"model_type": "intern_vit_6b", "image_size": SIDE, "patch_size": 14, "qkv_bias": !rms,
                       "qk_normalization": rms}),
        false => json!({"model_type": "internvl_vision", "image_size": [SIDE, SIDE], "patch_size": [14, 14],
                        "attention_bias": !rms, "use_qk_norm": rms}),
    };
    vision.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    match original {
        true => json!({"model_type": "internvl_chat", "llm_config": text, "vision_config": vision, "ps_version": "v2",
                       "select_layer": -1, "downsample_ratio": 0.5, "dynamic_image_size": true, "force_image_size": SIDE,
                       "min_dynamic_patch": 1, "max_dynamic_patch": 6, "use_thumbnail": true, "use_llm_lora": 0,
                       "template": "internlm2-chat"}),
        false => json!({"model_type": "internvl", "text_config": text, "vision_config": vision, "image_token_id": 302,
                        "vision_feature_layer": -1, "downsample_ratio": 0.5, "tie_word_embeddings": false}),
    }
}

/// The small tokenizer with InternVL's tokens around pictures.
fn tokenizer() -> Value {
    tokenizer_with(&["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"])
}

/// As published, InternVL2's, which takes strings.
const STRINGS: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + \
    '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
/// Of the `-hf` repositories, without what videos need.
const PARTS: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}\
    {% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}\
    {% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}\
    {% endif %}{{'<|im_end|>\\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\\n' }}{% endif %}";

/// Writes a checkpoint in two shards.
fn checkpoint(parent: &Path, llm: &str, layout: Layout) -> PathBuf {
    let dir = parent.join(llm);
    std::fs::create_dir_all(&dir).unwrap();
    let write = |file: &str, json: Value| std::fs::write(dir.join(file), json.to_string()).unwrap();
    write("config.json", config(llm, layout));
    write("tokenizer.json", tokenizer());
    let template = if layout == Original { STRINGS } else { PARTS };
    write(
        "tokenizer_config.json",
        json!({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": template}),
    );
    let mut processor = json!({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5], "resample": 3});
    let more = match layout {
        Original => json!({"crop_size": SIDE, "do_center_crop": true, "size": SIDE,
                           "feature_extractor_type": "CLIPFeatureExtractor"}),
        _ => json!({"image_processor_type": "GotOcr2ImageProcessorFast", "crop_to_patches": false, "min_patches": 1,
                    "max_patches": 6, "size": {"height": SIDE, "width": SIDE}}),
    };
    processor.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    write("preprocessor_config.json", processor);
    write_weights(&dir, &stored(llm, layout), 2);
    dir
}

const F32: [&str; 8] = ["--type", "f32", "--embedding-type", "f32", "--output-type", "f32", "--mmproj-type", "f32"];

/// Both files in f32, in `parent`, and what was said.
fn pair(parent: &Path, llm: &str, layout: Layout) -> ([PathBuf; 2], String) {
    let done = convert(&checkpoint(parent, llm, layout), &parent.join("model.gguf"), &F32);
    let said = text(&done.stderr) + &text(&done.stdout);
    assert!(done.status.success(), "{llm}: {said}");
    (["model.gguf", "mmproj-model-f32.gguf"].map(|file| parent.join(file)), said)
}

/// Name, shape and bytes of every tensor.
fn contents(path: &Path) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let file = GgufFile::open(path).unwrap();
    let tensor = |t: &mbq_convert::gguf::TensorInfo| (t.name.clone(), t.shape.clone(), file.data(t).to_vec());
    let mut all: Vec<_> = file.tensors.iter().map(tensor).collect();
    all.sort();
    all
}

#[test]
fn all_layouts_give_the_same_tensors() {
    for llm in ["qwen2", "qwen3"] {
        let [original, published, nested] = [Original, Published, Nested].map(|layout| {
            let parent = tempfile::tempdir().unwrap();
            pair(parent.path(), llm, layout).0.map(|file| contents(&file))
        });
        assert!(original == nested && published == nested, "{llm}");
        assert_eq!(nested[1].len(), 4 + 2 * 18 + 6);
    }
}

/// Heads 2 and 3 share the second key: behind its two queries stand its key and its value.
#[test]
fn wqkv_is_taken_apart() {
    let parent = tempfile::tempdir().unwrap();
    let ([model, _], said) = pair(parent.path(), "internlm2", Original);
    assert!(said.contains("beyond 512 tokens") && said.contains("RMS norms"), "{said}");
    let file = GgufFile::open(&model).unwrap();
    assert_eq!(file.metadata.str("general.architecture"), Some("internlm2"));
    let read = |name: &str| -> Vec<f32> {
        let t = file.tensors.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("{name}"));
        file.data(t).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    let all = tensors("internlm2");
    let of = |part: &str| &all[&format!("model.language_model.layers.1.self_attn.{part}_proj.weight")].1;
    assert_eq!(&read("blk.1.attn_v.weight"), of("v"));
    for part in ["q", "k"] {
        let (got, want) = (read(&format!("blk.1.attn_{part}.weight")), of(part));
        for (row, got) in got.chunks_exact(HIDDEN).enumerate() {
            // Halves of a head of 16 become neighbours.
            let from = row / 16 * 16 + row % 16 / 2 + row % 2 * 8;
            assert_eq!(got, &want[from * HIDDEN..][..HIDDEN], "{part} {row}");
        }
    }
    assert_eq!(read("output.weight"), all["lm_head.weight"].1);
    assert_eq!(read("blk.2.ffn_up.weight"), all["model.language_model.layers.2.mlp.up_proj.weight"].1);
}

#[test]
fn keys_are_those_that_clip_reads() {
    for (layout, torchvision) in [(Original, None), (Nested, Some(true))] {
        let parent = tempfile::tempdir().unwrap();
        let [model, mmproj] = pair(parent.path(), "qwen3", layout).0.map(|p| GgufFile::open(&p).unwrap());
        assert_eq!(mmproj.metadata.str("clip.projector_type"), Some("internvl"));
        let number = |key: &str| mmproj.metadata.get(&format!("clip.vision.{key}")).and_then(|v| v.as_u64());
        for (key, value) in
            [("projector.scale_factor", 2), ("preproc_min_tiles", 1), ("preproc_max_tiles", 6), ("image_size", 56)]
        {
            assert_eq!(number(key), Some(value), "{key}");
        }
        let flag = |key: &str| mmproj.metadata.get(key).and_then(|v| v.as_bool());
        assert_eq!((flag("clip.use_gelu"), flag("clip.vision.torchvision_resize")), (Some(true), torchvision));
        let width = |key: &str| model.metadata.get(&format!("qwen3.attention.{key}")).and_then(|v| v.as_u64());
        assert_eq!((width("key_length"), width("head_count_kv")), (Some(32), Some(2)));
        let template = model.metadata.str("tokenizer.chat_template").unwrap();
        let own = if layout == Original { STRINGS } else { "replace('<IMG_CONTEXT>', picture.mark)" };
        assert!(
            template.starts_with("{#- ") && template.contains("'<__media'") && template.contains(own),
            "{template}"
        );
    }
}

/// A picture of three by two tiles with a thumbnail; how many tiles others have.
#[test]
fn the_runtime_computes_what_transformers_does() {
    let Some(dir) = common::runtime_dir() else { return };
    let runtime = Runtime::open(&dir).unwrap();
    let goldens = goldens("internvl.json");
    for llm in TEXTS {
        let parent = tempfile::tempdir().unwrap();
        // Pillow resizes for the original layout, torchvision for the other.
        let ([file, mmproj], _) = pair(parent.path(), llm, if llm == "internlm2" { Original } else { Nested });
        let vision = load(&runtime, &file, &mmproj);
        for size in goldens["tiles"].as_array().unwrap() {
            let [w, h, tiles] = [0, 1, 2].map(|i| size[i].as_u64().unwrap() as usize);
            let chunks = vision.tokenize("<__media__>", Path::new("picture"), &[Rgb::black(w, h)]).unwrap();
            assert_eq!(chunks.tokens()[1], 4 * tiles, "{w} x {h}");
        }
        let chunks = vision.tokenize("hell<__media__> t", Path::new("picture"), &[picture(100, 60)]).unwrap();
        let pieces = chunks.pieces(true).unwrap();
        let (mut ids, _) = flattened(&pieces, 302);
        ids.retain(|id| *id != 302);
        assert_eq!(ids, [259, 300, 301, 258], "{llm}");
        agrees(&runtime, &file, &vision, &pieces, (llm, &goldens[llm]), Bounds { embedding: 5e-4, kl: 1e-6 });
        // Tiles are encoded together; from any of them on they are the same.
        let tiles: Vec<usize> = (0..pieces.len()).filter(|&i| matches!(pieces[i], Piece::Media(_))).collect();
        let later = chunks.embedded(&tiles[2..]).unwrap();
        assert_eq!((tiles.len(), later.len()), (7, 5), "{llm}");
        for (media, &place) in later.iter().zip(&tiles[2..]) {
            let Piece::Media(same) = &pieces[place] else { panic!("{place}") };
            assert!(media.layout == same.layout && media.embedding.len() == same.embedding.len(), "{llm} {place}");
            // Of values about 1, by products of other widths.
            assert!(media.embedding.iter().zip(&same.embedding).all(|(a, b)| (a - b).abs() < 1e-5), "{llm} {place}");
        }
    }
}

/// Several tiles in each of two pictures, with and without room to keep them: the answer of `chat`.
#[test]
fn a_server_answers_as_chat() {
    if common::runtime_dir().is_none() {
        return;
    }
    let parent = tempfile::tempdir().unwrap();
    let ([model, _], _) = pair(parent.path(), "qwen2", Nested);
    let names = ["pictures/red-star.png", "pictures/blue-heart.png"];
    let asked = |first: usize| -> String {
        let mut command = program("chat");
        command.arg(&model);
        for name in [names[first], names[1 - first]] {
            command.arg("--image").arg(common::root().join("demo").join(name));
        }
        let done =
            command.args(["-p", "hello", "--", "--temp", "0", "-n", "24", "-t", "1", "-c", "512"]).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        text(&done.stdout).trim().into()
    };
    let wanted = [asked(0), asked(1)];
    assert!(wanted[0] != wanted[1] && !wanted[0].is_empty(), "the pictures' order makes no difference: {wanted:?}");
    for room in ["64M", "0"] {
        let served = Served::of(&model, &["--picture-cache", room]);
        for _ in 0..2 {
            for (first, wanted) in wanted.iter().enumerate() {
                let content = json!([about_picture(names[first]), about_picture(names[1 - first]), {"type": "text", "text": "hello"}]);
                let body =
                    json!({"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24});
                assert_eq!(served.chat(&body).text().trim(), wanted, "{room} {first}");
            }
        }
    }
}

/// `vocab.json`, `merges.txt` and `added_tokens_decoder` are what `tokenizer.json` is.
#[test]
fn a_vocabulary_in_three_files() {
    let files = [false, true].map(|apart| {
        let parent = tempfile::tempdir().unwrap();
        let dir = checkpoint(parent.path(), "qwen2", Original);
        if apart {
            let json = tokenizer();
            std::fs::remove_file(dir.join("tokenizer.json")).unwrap();
            std::fs::write(dir.join("vocab.json"), json["model"]["vocab"].to_string()).unwrap();
            let merges: Vec<&str> = json["model"]["merges"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
            std::fs::write(dir.join("merges.txt"), format!("#version: 0.2\n{}\n", merges.join("\n"))).unwrap();
            let added = json["added_tokens"].as_array().unwrap();
            let decoder: serde_json::Map<_, _> = added.iter().map(|t| (t["id"].to_string(), t.clone())).collect();
            let config = json!({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
                                "chat_template": STRINGS, "added_tokens_decoder": decoder});
            std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
        }
        let done = convert(&dir, &parent.path().join("model.gguf"), &F32);
        assert!(done.status.success(), "{}", text(&done.stderr));
        std::fs::read(parent.path().join("model.gguf")).unwrap()
    });
    assert!(files[0] == files[1]);
}

/// `edit` makes the checkpoint one that is refused, with these words and no output.
fn refused(llm: &str, layout: Layout, edit: impl Fn(&mut Value), words: &[&str]) {
    let parent = tempfile::tempdir().unwrap();
    let dir = checkpoint(parent.path(), llm, layout);
    tiny::refused(&dir, if words[0].ends_with(".json") { words[0] } else { "config.json" }, edit, words);
}

#[test]
fn what_the_runtime_cannot_do_is_refused() {
    let [qwen2, qwen3, lm2] = TEXTS;
    let set = |path: &'static str, value: Value| move |j: &mut Value| *j.pointer_mut(path).unwrap() = value.clone();
    refused(
        lm2,
        Original,
        set("/llm_config/model_type", json!("phi3")),
        &["llm_config.model_type", "phi3", "internlm2"],
    );
    refused(
        qwen3,
        Nested,
        set("/text_config/model_type", json!("qwen3_moe")),
        &["text_config.model_type", "qwen3_moe"],
    );
    refused(lm2, Original, set("/llm_config/bias", json!(true)), &["llm_config.bias"]);
    refused(lm2, Original, set("/llm_config/rope_scaling/type", json!("linear")), &["rope_scaling.type", "linear"]);
    refused(lm2, Original, |j| j["llm_config"]["head_dim"] = 32.into(), &["llm_config.head_dim"]);
    refused(qwen2, Original, set("/ps_version", json!("v1")), &["ps_version", "v1"]);
    refused(qwen2, Original, set("/select_layer", json!(-4)), &["select_layer", "-4"]);
    refused(qwen2, Original, set("/use_thumbnail", json!(false)), &["use_thumbnail"]);
    refused(qwen2, Original, set("/use_llm_lora", json!(16)), &["use_llm_lora", "16"]);
    refused(qwen2, Original, set("/force_image_size", json!(112)), &["force_image_size", "112"]);
    refused(qwen2, Original, set("/min_dynamic_patch", json!(7)), &["min_dynamic_patch"]);
    refused(
        qwen2,
        Original,
        set("/vision_config/model_type", json!("uniflow")),
        &["vision_config.model_type", "uniflow"],
    );
    refused(qwen2, Original, set("/vision_config/qk_normalization", json!(true)), &["qk_normalization", "layer_norm"]);
    // Of the tower without biases, one with.
    refused(lm2, Original, set("/vision_config/qkv_bias", json!(true)), &["attn.qkv.bias"]);
    refused(qwen2, Original, set("/vision_config/num_hidden_layers", json!(3)), &["vision_config.num_hidden_layers"]);
    refused(qwen2, Nested, set("/vision_config/image_size", json!([56, 112])), &["vision_config.image_size", "equal"]);
    refused(qwen2, Nested, set("/vision_config/patch_size", json!(28)), &["position_embeddings", "[1, 5, 32]"]);
    refused(qwen2, Nested, |j| j["vision_config"]["use_mean_pooling"] = false.into(), &["use_mean_pooling"]);
    refused(qwen2, Nested, set("/downsample_ratio", json!(0.25)), &["downsample_ratio"]);
    refused(qwen2, Nested, set("/vision_feature_layer", json!([-1, -3])), &["vision_feature_layer"]);
    let file = "preprocessor_config.json";
    refused(qwen2, Nested, set("/size/width", json!(112)), &[file, "`size`", "image_size"]);
    refused(qwen2, Nested, set("/image_processor_type", json!("CLIPImageProcessor")), &[file, "GotOcr2ImageProcessor"]);
    refused(qwen2, Nested, set("/max_patches", json!(100_000)), &[file, "1000"]);
    refused(qwen2, Published, set("/added_tokens/2/content", json!("<image>")), &["tokenizer.json", "<img>"]);
}

#[test]
fn cards() {
    let parent = tempfile::tempdir().unwrap();
    let front = "license: mit\npipeline_tag: image-text-to-text\nlibrary_name: transformers\nbase_model:\n\
                 \x20 - OpenGVLab/InternViT-300M-448px\n  - internlm/internlm2-chat-1_8b\nbase_model_relation: merge\n\
                 language:\n  - multilingual\ntags:\n  - internvl\n  - custom_code";
    for (llm, layout) in [("qwen2", Original), ("internlm2", Original), ("qwen3", Nested)] {
        carded(
            &checkpoint(parent.path(), llm, layout),
            front,
            // What stands in GGUF files is nobody's code.
            &[
                ("license", &["mit"]),
                ("language", &["multilingual"]),
                ("tags", &["gguf", "llama.cpp", "mbq-convert", "q8_0", "internvl"]),
            ],
        );
    }
}

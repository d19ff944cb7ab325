//! LLaVA 1.5 and LLaVA-NeXT checkpoints, made up on the spot: what the two files hold, what is refused, token ids.
mod common;
mod tiny;

use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use common::{root, runtime_dir};
use mbq_convert::runtime::engine::{Compute, Model, Runtime};
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};
use tiny::card::carded;
use tiny::llava::{HEAD_DIM, HIDDEN, KV, VOCAB, checkpoint, tensors};
use tiny::{Naming, convert, text};

/// A GGUF file, read by candle.
struct Read {
    content: Content,
    file: std::fs::File,
}

impl Read {
    fn open(path: &Path) -> Self {
        let mut file = std::fs::File::open(path).unwrap();
        Read { content: Content::read(&mut file).unwrap(), file }
    }

    fn u32(&self, key: &str) -> u32 {
        self.content.metadata[key].to_u32().unwrap()
    }

    fn string(&self, key: &str) -> &str {
        self.content.metadata[key].to_string().unwrap()
    }

    fn values(&mut self, name: &str) -> Vec<f32> {
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu).unwrap();
        tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }
}

/// The two files, in f32.
fn converted(next: bool, naming: Naming, shards: usize) -> (Read, Read) {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), next, naming, shards);
    let output = parent.path().join("model.gguf");
    let types = ["--type", "f32", "--embedding-type", "f32", "--output-type", "f32", "--mmproj-type", "f32"];
    let done = convert(&model, &output, &types);
    assert!(done.status.success(), "{}", text(&done.stderr));
    (Read::open(&output), Read::open(&parent.path().join("mmproj-model-f32.gguf")))
}

#[test]
fn the_text_model_is_llama_cpps_llama() {
    for (next, naming, shards) in [(false, Naming::Published, 1), (true, Naming::Nested, 3)] {
        let (mut model, _) = converted(next, naming, shards);
        assert_eq!((model.string("general.architecture"), model.string("tokenizer.ggml.model")), ("llama", "llama"));
        for (key, value) in
            [("llama.attention.key_length", 32), ("llama.vocab_size", 1216), ("tokenizer.ggml.bos_token_id", 1)]
        {
            assert_eq!(model.u32(key), value, "{key}");
        }
        // Rows i and i + d/2 of each head become neighbours.
        let stored = tensors(next);
        let of = |part: &str| &stored[&format!("language_model.model.layers.1.self_attn.{part}_proj.weight")].1;
        let k = model.values("blk.1.attn_k.weight");
        for row in 0..KV {
            let from = row / HEAD_DIM * HEAD_DIM + row % HEAD_DIM / 2 + row % 2 * (HEAD_DIM / 2);
            assert_eq!(k[row * HIDDEN..][..HIDDEN], of("k")[from * HIDDEN..][..HIDDEN], "row {row}");
        }
        assert_eq!(&model.values("blk.1.attn_v.weight"), of("v"));
    }
}

#[test]
fn towers_end_before_the_last_block() {
    for next in [false, true] {
        let (_, mut mmproj) = converted(next, Naming::Nested, 1);
        assert_eq!(mmproj.u32("clip.vision.block_count"), 2);
        let names = &mmproj.content.tensor_infos;
        assert!(!names.keys().any(|name| name.starts_with("v.blk.2.") || name.contains("post_ln")));
        assert_eq!(names.contains_key("v.image_newline"), next);
        let list = |key: &str| {
            mmproj.content.metadata[key].to_vec().unwrap().iter().map(|v| v.to_i32().unwrap()).collect::<Vec<_>>()
        };
        if next {
            assert_eq!(mmproj.string("clip.projector_type"), "llava_onevision");
            assert_eq!(list("clip.vision.image_grid_pinpoints"), [56, 28, 28, 56, 56, 56]);
            // The runtime's sign for LLaVA-NeXT.
            assert!(!mmproj.content.metadata.contains_key("clip.vision.anyres_max"));
        } else {
            assert_eq!(mmproj.string("clip.projector_type"), "mlp");
            assert_eq!(list("clip.vision.feature_layer"), [2]);
            assert!(mmproj.content.metadata["clip.vision.center_crop"].to_bool().unwrap());
        }
        let class = mmproj.values("v.class_embd");
        assert_eq!(class, tensors(next)["vision_tower.vision_model.embeddings.class_embedding"].1);
    }
}

/// An edit of a checkpoint's JSON file.
type Edit<'e> = &'e dyn Fn(&mut Json);

fn refused(next: bool, file: &str, edit: Edit, words: &[&str]) {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), next, Naming::Published, 1);
    let path = model.join(file);
    let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    let done = convert(&model, &parent.path().join("out.gguf"), &[]);
    let message = text(&done.stderr);
    assert!(!done.status.success(), "{file} {words:?} was let in");
    words.iter().for_each(|word| assert!(message.contains(word), "{word} is not in: {message}"));
    assert!(!parent.path().join("out.gguf").exists());
}

#[test]
fn configurations_that_are_not_understood() {
    let file = "config.json";
    let set = |path: &'static str, value: Json| move |j: &mut Json| *j.pointer_mut(path).unwrap() = value.clone();
    refused(false, file, &set("/vision_feature_layer", json!([-2, -5])), &[file, "vision_feature_layer"]);
    refused(false, file, &set("/vision_feature_select_strategy", json!("full")), &["vision_feature_select_strategy"]);
    refused(false, file, &set("/vision_config/model_type", json!("siglip_vision_model")), &["clip_vision_model"]);
    refused(false, file, &set("/image_token_index", json!(VOCAB)), &["image_token_index", "vocab_size"]);
    refused(false, file, &|j| j["multimodal_projector_bias"] = false.into(), &["multimodal_projector_bias", "mlp"]);
    refused(false, file, &set("/text_config/vocab_size", json!(1215)), &["embed_tokens", "1216"]);
    refused(false, file, &set("/text_config/num_hidden_layers", json!(3)), &["num_hidden_layers"]);
    refused(true, file, &set("/image_grid_pinpoints", json!([[28, 56]])), &["image_grid_pinpoints", "config.json"]);
    // transformers' default is 4096, less than this context.
    let wide = |j: &mut Json| j["text_config"]["max_position_embeddings"] = 8192.into();
    refused(true, file, &wide, &["text_config.sliding_window", "absent"]);
}

#[test]
fn processors_that_are_not_understood() {
    let file = "preprocessor_config.json";
    let kind = |j: &mut Json| j["image_processor_type"] = "SiglipImageProcessor".into();
    refused(false, file, &kind, &[file, "image_processor_type"]);
    refused(false, file, &|j| j["do_center_crop"] = false.into(), &[file, "do_center_crop"]);
    refused(false, file, &|j| j["size"] = json!({"height": 28, "width": 28}), &[file, "shortest_edge"]);
    refused(false, file, &|j| j["size"] = json!({"shortest_edge": 56}), &[file, "`size`", "image_size"]);
    refused(false, file, &|j| j["crop_size"] = 14.into(), &[file, "crop_size"]);
    refused(true, file, &|j| j["resample"] = 2.into(), &[file, "resample"]);
}

#[test]
fn tokenizers_that_llama_cpp_does_not_have() {
    let file = "tokenizer.json";
    refused(false, file, &|j| drop(j["model"]["vocab"].as_object_mut().unwrap().remove("<0x7F>")), &[file, "<0x7F>"]);
    refused(false, file, &|j| j["model"]["byte_fallback"] = false.into(), &[file, "fuse_unk"]);
    refused(false, file, &|j| j["model"]["ignore_merges"] = true.into(), &[file, "ignore_merges"]);
    refused(false, file, &|j| drop(j["model"]["merges"].as_array_mut().unwrap().remove(5)), &[file, "model.merges"]);
    // The merges of one token stand together: it has one score.
    let apart = |j: &mut Json| {
        let merges = j["model"]["merges"].as_array_mut().unwrap();
        let made = |m: &Json| m.as_str().unwrap().replacen(' ', "", 1);
        let twice = merges.windows(2).position(|pair| made(&pair[0]) == made(&pair[1])).unwrap();
        let merge = merges.remove(twice);
        merges.push(merge);
    };
    refused(false, file, &apart, &[file, "model.merges", "one score"]);
    refused(false, file, &|j| j["normalizer"] = json!({"type": "NFKC"}), &[file, "normalizer"]);
    refused(false, file, &|j| j["normalizer"] = Json::Null, &[file, "normalizer", "▁"]);
    refused(false, file, &|j| j["pre_tokenizer"] = json!({"type": "Whitespace"}), &[file, "pre_tokenizer"]);
    refused(false, file, &|j| j["added_tokens"][5]["id"] = VOCAB.into(), &[file, "added_tokens", "1216 rows"]);
}

/// Token ids of strings that break tokenizers, as transformers has them.
#[test]
fn token_ids_are_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let model = checkpoint(folder.path(), false, Naming::Published, 1);
    same_ids(&model, ("ids", 1000), folder.path());
}

/// A checkpoint whose vocabulary is tokenizer.model alone, changed by fields `behind` it: protobuf's last word counts.
fn with_model(parent: &Path, behind: &[u8]) -> PathBuf {
    let dir = checkpoint(parent, false, Naming::Published, 1);
    std::fs::remove_file(dir.join("tokenizer.json")).unwrap();
    let model = std::fs::read(root().join("tests/golden/sentencepiece/tokenizer.model")).unwrap();
    std::fs::write(dir.join("tokenizer.model"), [&model, behind].concat()).unwrap();
    dir
}

/// A field of bytes, shorter than 128.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
}

fn piece(text: &str, kind: u8) -> Vec<u8> {
    field(1, &[field(1, text.as_bytes()), vec![0x15, 0, 0, 0, 0, 0x18, kind]].concat())
}

/// `least`: so many strings at least.
fn same_ids(model: &Path, (key, least): (&str, usize), folder: &Path) {
    let Some(runtime_dir) = runtime_dir() else { return };
    let golden = std::fs::read_to_string(root().join("tests/golden/sentencepiece/ids.json")).unwrap();
    let golden: Json = serde_json::from_str(&golden).unwrap();
    let golden = golden[key].as_array().unwrap();
    assert!(golden.len() > least);
    let path = common::convert(model, "q4_0", folder);
    let runtime = Runtime::open(&runtime_dir).unwrap();
    let compute = Compute { threads: 1, gpu_layers: 0, batch: 512, exact: false };
    let model = Model::load(&runtime, &path, compute, false).unwrap();
    for row in golden {
        let text = row[0].as_str().unwrap();
        assert_eq!(json!(model.tokenize(text, false, true).unwrap()), row[1], "{text:?}");
    }
}

/// Where special tokens do not stand in the text these are sentencepiece's ids, too: the script that wrote them checks.
#[test]
fn token_ids_of_tokenizer_model() {
    let folder = tempfile::tempdir().unwrap();
    let model = with_model(folder.path(), &[]);
    // `<pad>` has no id here: it stands behind the others, or here at the only one that is left.
    std::fs::write(model.join("added_tokens.json"), r#"{"<image>": 1200, "<tool>": 1202}"#).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": "<pad>",
                        "added_tokens_decoder": {"1200": {"content": "<image>", "special": true},
                        "1201": {"content": "<pad>", "special": false}, "1202": {"content": "<tool>", "special": false}}});
    std::fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
    same_ids(&model, ("ids", 1000), folder.path());
    let written = Read::open(&folder.path().join("model.gguf"));
    let list = |key: &str| written.content.metadata[&format!("tokenizer.ggml.{key}")].to_vec().unwrap();
    let (tokens, types, scores) = (list("tokens"), list("token_type"), list("scores"));
    let row =
        |i: usize| (tokens[i].to_string().unwrap().as_str(), types[i].to_i32().unwrap(), scores[i].to_f32().unwrap());
    // As llama.cpp's converter has them; `▁` is followed by letters in the order of their numbers.
    assert_eq!((row(1), row(13), row(1092)), (("<s>", 3, -1000.0), ("<0x0A>", 6, 0.0), ("▁", 1, -833.0)));
    assert_eq!(
        (row(1200), row(1201), row(1202)),
        (("<image>", 3, -1000.0), ("<pad>", 3, -1000.0), ("<tool>", 4, -1000.0))
    );
    assert_eq!(row(1203), ("[PAD1203]", 5, -10000.0));
    assert_eq!(
        (written.u32("tokenizer.ggml.unknown_token_id"), written.u32("tokenizer.ggml.padding_token_id")),
        (0, 1201)
    );
}

#[test]
fn pieces_that_are_cut_out_first() {
    let folder = tempfile::tempdir().unwrap();
    // `add_dummy_prefix` is false.
    let model = with_model(folder.path(), &[piece("<tool>", 4), field(3, &[0x18, 0])].concat());
    std::fs::remove_file(model.join("tokenizer_config.json")).unwrap();
    same_ids(&model, ("user_defined", 100), folder.path());
    let written = Read::open(&folder.path().join("model.gguf"));
    // Nobody else says them.
    assert_eq!((written.u32("tokenizer.ggml.bos_token_id"), written.u32("tokenizer.ggml.eos_token_id")), (1, 2));
    assert!(written.content.metadata["tokenizer.ggml.add_bos_token"].to_bool().unwrap());
}

#[test]
fn sentencepiece_models_that_llama_cpp_does_not_have() {
    let refused = |behind: &[u8], words: &[&str]| {
        let parent = tempfile::tempdir().unwrap();
        let model = with_model(parent.path(), behind);
        let done = convert(&model, &parent.path().join("out.gguf"), &[]);
        let message = text(&done.stderr);
        assert!(!done.status.success(), "{words:?} was let in");
        ["tokenizer.model"]
            .iter()
            .chain(words)
            .for_each(|word| assert!(message.contains(word), "{word} is not in: {message}"));
    };
    refused(&field(2, &[0x18, 1]), &["unigram"]);
    refused(&field(2, &[0x18, 4]), &["model_type is 4"]);
    refused(&field(3, &[0x28, 0]), &["escape"]);
    refused(&piece("▁", 1), &["twice"]);
    refused(&piece("gone", 5), &["piece 1200", "type 5"]);
    refused(&field(1, &field(1, &[0xff])), &["no UTF-8"]);
    // A length beyond the end, a number that does not end, a number of 70 bits, a wire type that is none.
    for bytes in [&[0x0a, 0x7f, 1][..], &[0x80], &[0xff; 12], &[0x0b]] {
        refused(bytes, &["does not end"]);
    }
    let many: Vec<u8> = (0..17).flat_map(|i| piece(&format!("more{i}"), 1)).collect();
    refused(&many, &["1217 pieces", "1216 rows"]);
}

#[test]
fn cards() {
    for next in [false, true] {
        let parent = tempfile::tempdir().unwrap();
        carded(
            &checkpoint(parent.path(), next, Naming::Published, 1),
            "language:\n- en\npipeline_tag: image-text-to-text\nlicense: llama2\ninference: false\ntags: [vision, transformers]",
            &[
                ("license", &["llama2"]),
                ("language", &["en"]),
                ("inference", &[]),
                ("tags", &["gguf", "llama.cpp", "mbq-convert", "q8_0", "vision"]),
            ],
        );
    }
}

//! LLaVA's own layout: what becomes of it is what becomes of the same model in transformers' layout, byte for byte; what is refused;
//! and pictures on a padded square against transformers (`tests/reference/llava_goldens.py`).
mod common;
mod tiny;

use candle_core::quantized::gguf_file::Content;
use common::compared::{Bounds, agrees, flattened, goldens, load, picture};
use mbq_convert::runtime::engine::Runtime;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tiny::{Naming, Tensors, convert, listing, text, write_weights};

/// What llava-hf publishes for Vicuna, Mistral and (as transformers' conversion writes it) Qwen2.
const VICUNA: &str = include_str!("../src/front/llava_original/vicuna.jinja");
const MISTRAL: &str = include_str!("../src/front/llava_original/mistral.jinja");
const QWEN: &str = include_str!("../src/front/llava_original/qwen.jinja");

/// The name that LLaVA's code gives a published tensor of the model, its tower inside.
fn original(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("language_model.") {
        return rest.into();
    }
    if let Some(rest) = name.strip_prefix("vision_tower.") {
        return format!("model.vision_tower.vision_tower.{rest}");
    }
    let name = name.replace("multi_modal_projector.linear_1", "mm_projector.0");
    format!("model.{}", name.replace("multi_modal_projector.linear_2", "mm_projector.2"))
}

/// Where the tower is.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// Its weights in the checkpoint, its configuration in a folder.
    Inside,
    /// A CLIP or SigLIP in the folder, with the half that reads text.
    Beside,
}

struct Kind {
    architecture: &'static str,
    aspect: &'static str,
    template: &'static str,
}

const PAD: Kind = Kind { architecture: "LlavaLlamaForCausalLM", aspect: "pad", template: VICUNA };
const SQUARE: Kind = Kind { architecture: "LlavaLlamaForCausalLM", aspect: "square", template: VICUNA };
const ANYRES: Kind = Kind { architecture: "LlavaMistralForCausalLM", aspect: "anyres", template: MISTRAL };
const ONEVISION: Kind = Kind { architecture: "LlavaQwenForCausalLM", aspect: "anyres_max_9", template: QWEN };

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn write(path: &Path, json: &Value) {
    std::fs::write(path, json.to_string()).unwrap();
}

impl Kind {
    fn next(&self) -> bool {
        self.aspect != "pad" && self.aspect != "square"
    }

    fn tensors(&self) -> Tensors {
        match self.aspect {
            "anyres_max_9" => tiny::tensors(),
            _ => tiny::llava::tensors(self.next()),
        }
    }

    /// The model in transformers' layout.
    fn converted(&self, parent: &Path) -> PathBuf {
        let dir = match self.aspect {
            "anyres_max_9" => tiny::checkpoint(parent, Naming::Published, 1),
            _ => tiny::llava::checkpoint(parent, self.next(), Naming::Published, 1),
        };
        if self.aspect == "pad" {
            let path = dir.join("preprocessor_config.json");
            let mut processor = read(&path);
            processor["image_processor_type"] = "LlavaImageProcessor".into();
            processor["do_pad"] = true.into();
            write(&path, &processor);
        }
        std::fs::write(dir.join("chat_template.jinja"), self.template).unwrap();
        dir
    }

    /// The same in LLaVA's own: `tiny-model`, and beside it `tower`.
    fn own(&self, parent: &Path, place: Place) -> PathBuf {
        let dir = self.converted(parent);
        let (config, processor) = (read(&dir.join("config.json")), read(&dir.join("preprocessor_config.json")));
        for file in ["chat_template.jinja", "preprocessor_config.json", "model.safetensors"] {
            std::fs::remove_file(dir.join(file)).unwrap();
        }
        write(&dir.join("config.json"), &self.own_config(&config));
        let (mut tower, model): (Tensors, Tensors) = self
            .tensors()
            .into_iter()
            .partition(|(name, _)| name.starts_with("vision_tower.") && place == Place::Beside);
        write_weights(&dir, &model.into_iter().map(|(name, t)| (original(&name), t)).collect(), 1);

        let folder = parent.join("tower");
        std::fs::create_dir_all(&folder).unwrap();
        let siglip = self.aspect == "anyres_max_9";
        let mut vision = config["vision_config"].clone();
        if siglip {
            // LLaVA drops the last block of SigLIP.
            vision["num_hidden_layers"] = 3.into();
        }
        let kind = if siglip { "siglip" } else { "clip" };
        write(&folder.join("config.json"), &json!({"model_type": kind, "text_config": {}, "vision_config": vision}));
        let sides = if siglip { json!({"height": 28, "width": 28}) } else { json!(28) };
        let mut own = json!({"size": sides, "resample": 3});
        ["image_mean", "image_std"].iter().for_each(|key| own[key] = processor[key].clone());
        write(&folder.join("preprocessor_config.json"), &own);
        if place == Place::Beside {
            if siglip {
                let last: Tensors = tower
                    .iter()
                    .filter(|(n, _)| n.contains("layers.1."))
                    .map(|(n, t)| (n.clone(), t.clone()))
                    .collect();
                tower.extend(last.into_iter().map(|(n, t)| (n.replace("layers.1.", "layers.2."), t)));
            }
            tower.insert("vision_tower.text_model.final_layer_norm.weight".into(), (vec![8], vec![1.0; 8]));
            tower.insert("vision_tower.logit_scale".into(), (vec![1], vec![1.0]));
            let short = |(name, t): (String, _)| (name.strip_prefix("vision_tower.").unwrap().to_string(), t);
            write_weights(&folder, &tower.into_iter().map(short).collect(), 1);
        }
        dir
    }

    fn own_config(&self, config: &Value) -> Value {
        let mut own = config["text_config"].clone();
        let more = json!({
            "architectures": [self.architecture], "model_type": "llava", "image_aspect_ratio": self.aspect,
            "mm_vision_tower": "somebody/tower", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch", "mm_hidden_size": 64, "mm_use_im_start_end": false,
            "mm_use_im_patch_token": false, "mm_resampler_type": null, "use_mm_proj": true, "tie_word_embeddings": false,
            // False, as in a published fine-tune.
            "text_config": {"model_type": "llama"}, "vision_config": {"hidden_size": 1024}
        });
        own.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        if self.next() {
            own["image_grid_pinpoints"] = config["image_grid_pinpoints"].clone();
            own["mm_patch_merge_type"] = "spatial_unpad".into();
        }
        own
    }
}

/// The bytes of both files.
fn files(model: &Path) -> [Vec<u8>; 2] {
    let folder = tempfile::tempdir().unwrap();
    let done = convert(model, &folder.path().join("o.gguf"), &["--type", "f16", "--offline"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    ["o.gguf", "mmproj-o-f16.gguf"].map(|file| std::fs::read(folder.path().join(file)).unwrap())
}

/// The keys that differ.
fn differing(got: &[Vec<u8>; 2], want: &[Vec<u8>; 2]) -> Vec<String> {
    let content = |bytes: &Vec<u8>| Content::read(&mut std::io::Cursor::new(bytes)).unwrap().metadata;
    let differ = |(got, want): (&Vec<u8>, &Vec<u8>)| {
        let (got, want) = (content(got), content(want));
        let keys: Vec<String> = got.keys().chain(want.keys()).cloned().collect();
        let of = |key: &String| [&got, &want].map(|file| format!("{:.300?}", file.get(key)));
        keys.into_iter()
            .filter(move |key| of(key)[0] != of(key)[1])
            .map(|key| format!("{key}: {:?}", of(&key)))
            .collect::<Vec<_>>()
    };
    got.iter().zip(want).flat_map(differ).collect()
}

#[test]
fn both_layouts_become_the_same_files() {
    for kind in [PAD, SQUARE, ANYRES, ONEVISION] {
        let parent = tempfile::tempdir().unwrap();
        let want = files(&kind.converted(parent.path()));
        for place in [Place::Inside, Place::Beside] {
            let parent = tempfile::tempdir().unwrap();
            let got = files(&kind.own(parent.path(), place));
            assert!(got == want, "{} {}: {:?}", kind.aspect, place == Place::Inside, differing(&got, &want));
        }
    }
}

#[test]
fn a_tower_that_is_null_tells_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let model = ONEVISION.converted(parent.path());
    let want = files(&model);
    let path = model.join("config.json");
    let mut config = read(&path);
    config["mm_vision_tower"] = Value::Null;
    write(&path, &config);
    assert!(files(&model) == want);
}

/// A tokenizer's own template is LLaVA's prompt, and counts.
#[test]
fn a_checkpoints_own_template_is_kept() {
    let parent = tempfile::tempdir().unwrap();
    let model = PAD.own(parent.path(), Place::Inside);
    let template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}";
    let path = model.join("tokenizer_config.json");
    let mut config = read(&path);
    config["chat_template"] = template.into();
    write(&path, &config);
    let out = parent.path().join("o.gguf");
    assert!(convert(&model, &out, &["--offline"]).status.success());
    let file = mbq_convert::gguf::GgufFile::open(&out).unwrap();
    let got = file.metadata.get("tokenizer.chat_template").unwrap().as_str().unwrap();
    // Lines in front begin the next line behind a picture.
    assert!(got.ends_with(template) && got.len() > template.len(), "{got}");
}

/// `edit` of config.json, or of the folders, makes it a model that is refused.
fn refused(kind: &Kind, edit: impl Fn(&mut Value, &Path), words: &[&str]) {
    let parent = tempfile::tempdir().unwrap();
    let model = kind.own(parent.path(), Place::Beside);
    let path = model.join("config.json");
    let mut config = read(&path);
    edit(&mut config, &parent.path().join("tower"));
    write(&path, &config);
    let before = listing(parent.path());
    let done = convert(&model, &parent.path().join("o.gguf"), &["--offline"]);
    let message = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{words:?}: {message}");
    words.iter().for_each(|word| assert!(message.contains(word), "{word}: {message}"));
    assert_eq!(listing(parent.path()), before);
}

#[test]
fn configurations_that_are_not_understood() {
    let set = |key: &'static str, value: Value| move |c: &mut Value, _: &Path| c[key] = value.clone();
    for (key, value) in [
        ("architectures", json!(["Mineru2QwenForCausalLM"])),
        ("mm_projector_type", json!("linear")),
        ("mm_projector_type", Value::Null),
        ("mm_use_im_start_end", json!(true)),
        ("mm_use_im_patch_token", json!(true)),
        ("mm_use_box_start_end", json!(true)),
        ("mm_vision_select_feature", json!("cls_patch")),
        ("mm_vision_select_layer", json!(-9)),
        ("mm_vision_select_layer", json!([-2, -5])),
        ("mm_patch_merge_type", json!("spatial")),
        ("mm_resampler_type", json!("perceiver")),
        ("s2", json!(true)),
        ("image_aspect_ratio", json!("highres")),
        ("image_aspect_ratio", json!("anyres_max_9")),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
        ("hidden_size", json!(64)),
    ] {
        let word = if key == "rope_scaling" { "rope_scaling.type" } else { key };
        let word = if key == "hidden_size" { "shape" } else { word };
        refused(&PAD, set(key, value), &[word]);
    }
    // Canvases in one direction only: LLaVA's code and transformers read them differently.
    refused(&ANYRES, set("image_grid_pinpoints", json!([[28, 56]])), &["image_grid_pinpoints", "both directions"]);
    refused(&ANYRES, set("mm_patch_merge_type", json!("flat")), &["mm_patch_merge_type", "spatial_unpad"]);
    refused(&ONEVISION, set("image_aspect_ratio", json!("anyres")), &["image_aspect_ratio", "SigLIP"]);
}

#[test]
fn towers_that_are_not_there_or_none() {
    let tower = |file: &'static str, key: &'static str, value: Value| {
        move |_: &mut Value, tower: &Path| {
            let mut json = read(&tower.join(file));
            json[key] = value.clone();
            write(&tower.join(file), &json);
        }
    };
    let away = |_: &mut Value, tower: &Path| std::fs::rename(tower, tower.with_file_name("away")).unwrap();
    refused(&PAD, away, &["mm_vision_tower", "somebody/tower", "--offline", "called \"tower\""]);
    let path = |config: &mut Value, _: &Path| config["mm_vision_tower"] = "/home/somebody/vit".into();
    refused(&PAD, path, &["mm_vision_tower", "/home/somebody/vit", "called \"vit\""]);
    let file = "config.json";
    refused(&PAD, tower(file, "model_type", json!("vit")), &["tower/config.json", "model_type", "clip or siglip"]);
    refused(&PAD, tower(file, "quantization_config", json!({"bits": 4})), &["tower/config.json", "4 bits"]);
    let file = "preprocessor_config.json";
    refused(&PAD, tower(file, "size", json!(14)), &["tower/preprocessor_config.json", "`size`"]);
    refused(&PAD, tower(file, "image_mean", Value::Null), &["tower/preprocessor_config.json", "image_mean"]);
    let more = |_: &mut Value, tower: &Path| {
        let weights = [("vision_model.adapter.weight".to_string(), (vec![8], vec![0.0; 8]))];
        write_weights(tower, &weights.into(), 1);
    };
    refused(&PAD, more, &["tower/config.json", "num_hidden_layers", "encoder.layers"]);
}

#[test]
fn padded_pictures_are_transformers() {
    let Some(dir) = common::runtime_dir() else { return };
    let runtime = Runtime::open(&dir).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let model = PAD.converted(parent.path());
    let small = |name: &str, shape: &[usize]| tiny::small(name, shape, &["norm"]);
    write_weights(&model, &tiny::llava::valued(false, small), 1);
    let file = parent.path().join("o.gguf");
    let done = convert(
        &model,
        &file,
        &["--type", "f32", "--embedding-type", "f32", "--output-type", "f32", "--mmproj-type", "f32"],
    );
    assert!(done.status.success(), "{}", text(&done.stderr));
    let vision = load(&runtime, &file, &parent.path().join("mmproj-o-f32.gguf"));
    let goldens = goldens("llava.json");
    for (name, (width, height)) in [("wide", (60, 22)), ("tall", (9, 40))] {
        let prompt = "USER: <__media__>\nWhat is it? ASSISTANT:";
        let chunks = vision.tokenize(prompt, Path::new("picture"), &[picture(width, height)]).unwrap();
        let pieces = chunks.pieces(true).unwrap();
        assert_eq!(json!(flattened(&pieces, 1200).0), goldens[name]["ids"], "{name}");
        agrees(&runtime, &file, &vision, &pieces, (name, &goldens[name]), Bounds { embedding: 3e-4, kl: 1e-6 });
    }
}

//! Checkpoints as people have them that are not a plain model: refused by name, or read as transformers reads them.
mod tiny;

use mbq_convert::gguf::GgufFile;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;
use tiny::{Naming, checkpoint, convert, listing, program, text};

const HEAD: &str = "language_model.lm_head.weight";
const EMBEDDING: &str = "language_model.model.embed_tokens.weight";
const Q: &str = "language_model.model.layers.1.self_attn.q_proj";
const TOWER: &str = "vision_tower.vision_model";

/// Tensor name -> type, shape, bytes.
type Raw = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

fn load(file: &Path) -> Raw {
    let bytes = std::fs::read(file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let all = tensors
        .iter()
        .map(|(name, t)| (name.to_string(), (format!("{:?}", t.dtype()), t.shape().to_vec(), t.data().to_vec())));
    all.collect()
}

fn store(file: &Path, tensors: &Raw) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors {
        let end = data.len() + bytes.len();
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), end]}));
        data.extend(bytes);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    std::fs::write(file, [(header.len() as u64).to_le_bytes().to_vec(), header, data].concat()).unwrap();
}

/// A bf16 tensor of small numbers.
fn bf16(shape: &[usize], seed: u64) -> (String, Vec<usize>, Vec<u8>) {
    let values = tiny::values(shape.iter().product(), seed);
    let bytes = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    ("BF16".into(), shape.to_vec(), bytes)
}

fn zeros(dtype: &str, shape: &[usize], size: usize) -> (String, Vec<usize>, Vec<u8>) {
    (dtype.into(), shape.to_vec(), vec![0; size * shape.iter().product::<usize>()])
}

fn edit_json(path: &Path, change: impl Fn(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

/// A model in a folder of its own, changed, and what the program makes of it.
struct Run {
    parent: tempfile::TempDir,
    done: Output,
}

fn run(change: impl Fn(&Path)) -> Run {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, 1);
    change(&model);
    let out = parent.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let done = convert(&model, &out.join("o.gguf"), &["--type", "f16"]);
    Run { parent, done }
}

impl Run {
    fn file(&self, name: &str) -> PathBuf {
        assert!(self.done.status.success(), "{}", text(&self.done.stderr));
        self.parent.path().join("out").join(name)
    }

    /// Both files' bytes.
    fn files(&self) -> [Vec<u8>; 2] {
        ["o.gguf", "mmproj-o-f16.gguf"].map(|name| std::fs::read(self.file(name)).unwrap())
    }

    fn said(&self, words: &[&str]) {
        let message = text(&self.done.stderr);
        words.iter().for_each(|word| assert!(message.contains(word), "`{word}` is not in: {message}"));
    }
}

fn refused(change: impl Fn(&Path), words: &[&str]) {
    let run = run(change);
    assert_eq!(run.done.status.code(), Some(1), "{words:?}: {}", text(&run.done.stderr));
    run.said(words);
    assert_eq!(listing(&run.parent.path().join("out")), [""; 0]);
}

/// Changes the tensors of `model.safetensors`.
fn tensors(change: impl Fn(&mut Raw)) -> impl Fn(&Path) {
    move |dir| {
        let mut all = load(&dir.join("model.safetensors"));
        change(&mut all);
        store(&dir.join("model.safetensors"), &all);
    }
}

fn config(change: impl Fn(&mut Value)) -> impl Fn(&Path) {
    move |dir| edit_json(&dir.join("config.json"), &change)
}

#[test]
fn adapters_that_are_not_merged() {
    let lora = |at: &str| {
        let names = [format!("{at}.lora_A.default.weight"), format!("{at}.lora_B.default.weight")];
        tensors(move |all| names.iter().for_each(|name| drop(all.insert(name.clone(), bf16(&[8, 256], 1)))))
    };
    refused(lora(Q), &[Q, "lora_A", "1 more", "merge the adapter", "merge_and_unload"]);
    refused(lora(&format!("{TOWER}.encoder.layers.0.self_attn.v_proj")), &[TOWER, "lora_A", "merge the adapter"]);
    for name in [
        format!("{EMBEDDING}.lora_embedding_A.default"),
        format!("{Q}.base_layer.weight"),
        "language_model.lm_head.modules_to_save.default.weight".into(),
        format!("{Q}.lora_magnitude_vector.default.weight"),
    ] {
        refused(tensors(|all| drop(all.insert(name.clone(), bf16(&[8, 256], 1)))), &[&name, "merge the adapter"]);
    }
}

#[test]
fn a_folder_that_is_an_adapter() {
    let adapter = |dir: &Path| {
        let config = json!({"base_model_name_or_path": "org/base", "peft_type": "LORA", "r": 8});
        std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    };
    // transformers would load org/base and apply it, whatever weights lie beside it.
    refused(adapter, &["adapter_config.json", "LORA", "org/base", "beside the weights", "merge it first"]);
    let alone = |dir: &Path| {
        adapter(dir);
        ["config.json", "model.safetensors"].iter().for_each(|file| std::fs::remove_file(dir.join(file)).unwrap());
    };
    refused(alone, &["adapter_config.json", "of org/base, not a model", "merge it first"]);
}

#[test]
fn names_that_wrappers_leave() {
    for (prefix, what) in [
        ("base_model.model.", "PEFT"),
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel"),
        ("_fsdp_wrapped_module.", "FullyShardedDataParallel"),
    ] {
        let rename = tensors(|all| {
            *all = std::mem::take(all).into_iter().map(|(name, t)| (format!("{prefix}{name}"), t)).collect();
        });
        refused(rename, &[&format!("`{prefix}`"), what, "save"]);
    }
    let inside = tensors(|all| {
        let t = all.remove(&format!("{Q}.weight")).unwrap();
        all.insert("language_model.model.layers.1._orig_mod.self_attn.q_proj.weight".into(), t);
    });
    refused(inside, &["`_orig_mod.`", "layers.1"]);
}

/// The forms in which the common quantisers store a linear; with and without the word of config.json.
#[test]
fn weights_that_are_quantised_already() {
    let says =
        |method: &'static str| config(move |c| c["quantization_config"] = json!({"quant_method": method, "bits": 4}));
    let awq = tensors(|all| {
        all.remove(&format!("{Q}.weight"));
        all.insert(format!("{Q}.qweight"), zeros("I32", &[256, 32], 4));
        all.insert(format!("{Q}.qzeros"), zeros("I32", &[2, 32], 4));
        all.insert(format!("{Q}.scales"), zeros("F16", &[2, 256], 2));
    });
    refused(&awq, &["already quantised", "AWQ or GPTQ", Q, "give the original"]);
    let both = |dir: &Path| {
        awq(dir);
        says("awq")(dir);
    };
    refused(both, &["already quantised", "AWQ, 4 bits", Q, "give the original"]);
    let bitsandbytes = tensors(|all| {
        all.insert(format!("{Q}.weight"), zeros("U8", &[32768, 1], 1));
        all.insert(format!("{Q}.weight.absmax"), zeros("U8", &[1024], 1));
    });
    refused(bitsandbytes, &["already quantised", "bitsandbytes", Q, "give the original"]);
    let int8 = tensors(|all| {
        all.insert(format!("{Q}.weight"), zeros("I8", &[256, 256], 1));
        all.insert(format!("{Q}.SCB"), zeros("F32", &[256], 4));
    });
    refused(int8, &["already quantised", "bitsandbytes, 8 bits", Q]);
    let fp8 = tensors(|all| drop(all.insert(format!("{Q}.weight"), zeros("F8_E4M3", &[256, 256], 1))));
    refused(fp8, &["already quantised", "FP8", Q, "give the original"]);
    refused(says("gptq"), &["config.json", "already quantised", "GPTQ, 4 bits", "remove that key"]);
}

#[test]
fn tensors_that_nobody_claims() {
    for (name, shape) in [
        (format!("{Q}.scale"), vec![1]),
        ("language_model.model.layers.0.self_attn.q_norm.weight".into(), vec![64]),
        ("language_model.model.layers.0.self_attn.o_proj.bias".into(), vec![256]),
        ("language_model.model.layers.2.mlp.down_proj.bias".into(), vec![256]),
        ("v_head.summary.weight".into(), vec![1, 256]),
        ("multi_modal_projector.linear_3.weight".into(), vec![256, 256]),
    ] {
        let add = tensors(|all| drop(all.insert(name.clone(), bf16(&shape, 3))));
        refused(add, &[&name, "no part of the model", "not supported"]);
    }
    // config.json of a cut-down model beside the whole one's weights, and the reverse.
    let layers = |n: u64| config(move |c| c["text_config"]["num_hidden_layers"] = n.into());
    refused(layers(2), &["text_config.num_hidden_layers is 2", "layers.2"]);
    refused(layers(4), &["text_config.num_hidden_layers is 4", "layers.2"]);
    refused(config(|c| c["vision_config"]["num_hidden_layers"] = 1.into()), &["vision_config.num_hidden_layers is 1"]);
}

/// What older transformers stored, and what the projector does not read, changes nothing.
#[test]
fn tensors_that_are_not_needed() {
    let plain = run(|_| ()).files();
    let more = run(tensors(|all| {
        let layer = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq";
        all.insert(layer.into(), zeros("F32", &[32], 4));
        all.insert(format!("{TOWER}.embeddings.position_ids"), zeros("I64", &[1, 4], 8));
        all.insert(format!("{TOWER}.head.probe"), bf16(&[1, 1, 64], 5));
        all.insert(format!("{TOWER}.head.mlp.fc1.weight"), bf16(&[128, 64], 5));
    }));
    assert!(more.files() == plain);
    let without = run(tensors(|all| all.retain(|name, _| !name.contains("post_layernorm"))));
    assert!(without.files() == plain);
    // The second block's output is not read, so that the block may be there or not.
    let second = format!("{TOWER}.encoder.layers.1.");
    let first_only = config(|c| c["vision_feature_layer"] = (-2).into());
    let with = run(&first_only).files();
    let cut = run(|dir: &Path| {
        first_only(dir);
        tensors(|all| all.retain(|name, _| !name.starts_with(&second)))(dir);
    });
    assert!(cut.files() == with && with != plain);
}

#[test]
fn a_head_that_is_not_the_embedding() {
    let tie = |outer: bool, inner: bool| {
        config(move |c| {
            c["tie_word_embeddings"] = outer.into();
            c["text_config"]["tie_word_embeddings"] = inner.into();
        })
    };
    // transformers 5: either key ties, and only what is equal.
    for (outer, inner) in [(true, true), (true, false), (false, true)] {
        let kept = run(tie(outer, inner));
        let file = GgufFile::open(&kept.file("o.gguf")).unwrap();
        assert!(file.tensor("output.weight").is_some(), "{outer} {inner}");
        kept.said(&["tie_word_embeddings", HEAD, "kept"]);
        let equal = run(|dir: &Path| {
            tie(outer, inner)(dir);
            tensors(|all| drop(all.insert(HEAD.into(), all[EMBEDDING].clone())))(dir);
        });
        let file = GgufFile::open(&equal.file("o.gguf")).unwrap();
        assert!(file.tensor("output.weight").is_none(), "{outer} {inner}");
        assert!(!text(&equal.done.stderr).contains("tie_word_embeddings"));
        let absent = run(|dir: &Path| {
            tie(outer, inner)(dir);
            tensors(|all| drop(all.remove(HEAD)))(dir);
        });
        assert!(absent.files()[0] == equal.files()[0]);
    }
}

#[test]
fn keys_that_change_the_model() {
    let text_key = |key: &'static str, value: Value| config(move |c| c["text_config"][key] = value.clone());
    let slides = config(|c| {
        let more = json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 0});
        c["text_config"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    });
    refused(slides, &["config.json", "text_config.use_sliding_window", "sliding window"]);
    for (key, value) in [
        ("layer_types", json!(["full_attention", "sliding_attention", "full_attention"])),
        ("qk_norm", json!(true)),
        ("mlp_bias", json!(true)),
        ("partial_rotary_factor", json!(0.5)),
        ("logit_scale", json!(0.5)),
        ("hidden_act", json!("gelu")),
    ] {
        refused(text_key(key, value), &["config.json", &format!("text_config.{key}")]);
    }
    refused(
        text_key("rope_scaling", json!({"type": "yarn", "factor": 4.0})),
        &["text_config.rope_scaling.type", "yarn"],
    );
    refused(text_key("rope_parameters", json!({"rope_type": "linear"})), &["text_config.rope_parameters.rope_type"]);
    // Each of the two is looked at, not only the first.
    let both = config(|c| {
        c["text_config"]["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 1e6});
        c["text_config"]["rope_scaling"] = json!({"rope_type": "linear"});
    });
    refused(both, &["text_config.rope_scaling.rope_type"]);
    refused(text_key("rope_scaling", json!({"type": "default", "mrope_section": [1, 2]})), &["mrope_section"]);
    refused(config(|c| c["vision_config"]["qkv_bias"] = false.into()), &["vision_config.qkv_bias"]);
    refused(config(|c| c["vision_config"]["num_channels"] = 1.into()), &["vision_config.num_channels"]);
    refused(config(|c| c["vision_aspect_ratio"] = "anyres_max_0".into()), &["vision_aspect_ratio"]);
    refused(config(|c| c["multimodal_projector_bias"] = false.into()), &["multi_modal_projector.linear_1.bias"]);
    refused(config(|c| c["transformers_weights"] = "other.safetensors".into()), &["transformers_weights"]);
}

/// As published Qwen2 files have it, and keys that say nothing about the arithmetic.
#[test]
fn keys_that_change_nothing() {
    let plain = run(|_| ()).files();
    let more = run(config(|c| {
        let keys = json!({"use_sliding_window": false, "sliding_window": 131072, "max_window_layers": 2, "rope_scaling": null,
                          "attention_dropout": 0.0, "use_cache": true, "temperature": 1.0, "pruned_heads": {},
                          "mlp_bias": false, "pretraining_tp": 1, "somebodys_own_key": [1, 2]});
        c["text_config"].as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        c["vision_config"]["vision_use_head"] = false.into();
        c["multimodal_projector_bias"] = true.into();
        c["use_image_newline_parameter"] = true.into();
    }));
    assert!(more.files() == plain);
}

/// It can be rounded; that nothing can be asked of it is said.
#[test]
fn a_model_without_a_chat_template() {
    let none = run(|dir| assert!(!dir.join("chat_template.jinja").exists()));
    assert!(none.file("o.gguf").exists());
    none.said(&["has no chat template"]);
    let own = run(|dir| std::fs::write(dir.join("chat_template.jinja"), "{{ messages[0].content }}").unwrap());
    assert!(own.done.status.success() && !text(&own.done.stderr).contains("no chat template"));
}

/// Counts that no machine could hold are compared with the checkpoint before anything is allocated by them.
#[test]
#[cfg(target_os = "linux")]
fn huge_counts_are_refused_without_memory() {
    let change = |key: [&'static str; 2]| config(move |c| c[key[0]][key[1]] = 4294967295u32.into());
    for key in [
        ["text_config", "num_hidden_layers"],
        ["text_config", "vocab_size"],
        ["text_config", "intermediate_size"],
        ["text_config", "hidden_size"],
        ["text_config", "head_dim"],
        ["vision_config", "num_hidden_layers"],
        ["vision_config", "intermediate_size"],
        ["vision_config", "image_size"],
    ] {
        let parent = tempfile::tempdir().unwrap();
        let model = checkpoint(parent.path(), Naming::Published, 1);
        change(key)(&model);
        let mut limited = std::process::Command::new("sh");
        // 2 GB of addresses, of which the program and its threads take a good part.
        limited.args(["-c", "ulimit -v 2000000; exec \"$@\"", "sh"]).arg(program().get_program());
        let done = limited.arg(&model).arg("-o").arg(parent.path().join("o.gguf")).args(["--method", "rtn"]).output();
        let done = done.unwrap();
        assert_eq!(done.status.code(), Some(1), "{key:?}: {}", text(&done.stderr));
        assert!(text(&done.stderr).contains("model"), "{key:?}: {}", text(&done.stderr));
    }
}

/// A newer `model.safetensors` beside the shards and index of an older save: transformers takes the single file.
#[test]
fn a_single_file_wins_over_shards() {
    let plain = run(|_| ()).files();
    let both = run(|dir| {
        let shard = "model-00001-of-00001.safetensors";
        let mut old = load(&dir.join("model.safetensors"));
        old.values_mut().for_each(|(_, _, bytes)| bytes.fill(0));
        store(&dir.join(shard), &old);
        let map: BTreeMap<_, _> = old.keys().map(|name| (name, shard)).collect();
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    });
    assert!(both.files() == plain);
    both.said(&["model.safetensors is read", "index.json"]);
}

/// A shard that holds a copy of a tensor which the index assigns to another shard.
#[test]
fn the_index_decides_between_copies() {
    let name = format!("{Q}.weight");
    let sharded = |dir: &Path, copy: bool, differs: bool| {
        let (mut first, mut second) = (load(&dir.join("model.safetensors")), Raw::new());
        std::fs::remove_file(dir.join("model.safetensors")).unwrap();
        for tensor in first.keys().filter(|n| n.starts_with("vision")).cloned().collect::<Vec<_>>() {
            second.insert(tensor.clone(), first.remove(&tensor).unwrap());
        }
        let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let in_first = first.keys().map(|n| (n.clone(), files[0]));
        let map: BTreeMap<_, _> = in_first.chain(second.keys().map(|n| (n.clone(), files[1]))).collect();
        if copy {
            second.insert(name.clone(), if differs { bf16(&[256, 256], 77) } else { first[&name].clone() });
        }
        store(&dir.join(files[0]), &first);
        store(&dir.join(files[1]), &second);
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    };
    let plain = run(|dir| sharded(dir, false, false)).files();
    let same = run(|dir| sharded(dir, true, false));
    assert!(same.files() == plain && text(&same.done.stderr).find(&name).is_none());
    let other = run(|dir| sharded(dir, true, true));
    assert!(other.files() == plain);
    other.said(&[&name, "model-00002-of-00002.safetensors", "other values"]);
}

/// Tokens that only tokenizer_config.json or added_tokens.json has, with the ids that transformers 5.24's AutoTokenizer
/// gives them: behind the tokenizer's own. `added_tokens.json` counts only where `added_tokens_decoder` is absent.
#[test]
fn tokens_that_tokenizer_json_lacks() {
    let tokens = |config: Value, added: Option<Value>| {
        run(move |dir: &Path| {
            edit_json(&dir.join("tokenizer_config.json"), |c| {
                c.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
            });
            if let Some(added) = &added {
                std::fs::write(dir.join("added_tokens.json"), added.to_string()).unwrap();
            }
        })
    };
    let token = |run: &Run, id: usize| {
        let file = GgufFile::open(&run.file("o.gguf")).unwrap();
        let entry = |list: &str| {
            let key = format!("tokenizer.ggml.{list}");
            file.metadata.get(&key).unwrap().as_array().unwrap().iter().nth(id).unwrap()
        };
        (entry("tokens").as_str().unwrap().to_string(), entry("token_type").as_u64().unwrap())
    };
    let entry = |special: bool| json!({"content": "<answer>", "special": special, "normalized": false});
    let decoder =
        json!({"added_tokens_decoder": {"298": {"content": "<|im_start|>", "special": true}, "302": entry(false)}});
    let run = tokens(decoder.clone(), Some(json!({"<answer>": 302})));
    assert_eq!(token(&run, 302), ("<answer>".into(), 4));
    let run = tokens(json!({"added_tokens_decoder": {"302": entry(true)}}), None);
    assert_eq!(token(&run, 302), ("<answer>".into(), 3));
    let run = tokens(json!({}), Some(json!({"<answer>": 302, "<|im_end|>": 299})));
    assert_eq!(token(&run, 302), ("<answer>".into(), 4));
    let run = tokens(json!({"added_tokens_decoder": {}}), Some(json!({"<answer>": 302})));
    assert_eq!(token(&run, 302), ("[PAD302]".into(), 5));
    let run = tokens(json!({"pad_token": "<pad>", "extra_special_tokens": ["<answer>"]}), None);
    assert_eq!([token(&run, 302), token(&run, 303)], [("<pad>".into(), 3), ("<answer>".into(), 3)]);
    // transformers would give it 302.
    let declared = |dir: &Path| {
        edit_json(&dir.join("tokenizer_config.json"), |c| c["added_tokens_decoder"] = json!({"310": entry(false)}));
    };
    refused(declared, &["tokenizer_config.json", "<answer>", "save the tokenizer again"]);
    let gap = |dir: &Path| edit_json(&dir.join("tokenizer.json"), |c| c["added_tokens"][3]["id"] = 310.into());
    refused(gap, &["tokenizer.json", "<tool>", "310", "301"]);
}

/// The layout that transformers 5 saves: names, one processor file, rotary base in `rope_parameters`, `image_token_id`.
#[test]
fn a_save_of_transformers_5() {
    let plain = run(|_| ()).files();
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Nested, 1);
    edit_json(&model.join("config.json"), |c| {
        let text = c["text_config"].as_object_mut().unwrap();
        let theta = text.remove("rope_theta").unwrap();
        text.insert("rope_parameters".into(), json!({"rope_theta": theta, "rope_type": "default"}));
        text.insert("layer_types".into(), json!(["full_attention", "full_attention", "full_attention"]));
        let id = c.as_object_mut().unwrap().remove("image_token_index").unwrap();
        c["image_token_id"] = id;
        c["dtype"] = "bfloat16".into();
    });
    let flat = model.join("preprocessor_config.json");
    let mut processor: Value = serde_json::from_slice(&std::fs::read(&flat).unwrap()).unwrap();
    processor["image_processor_type"] = "LlavaOnevisionImageProcessor".into();
    let nested =
        json!({"image_processor": processor, "num_image_tokens": 4, "processor_class": "LlavaOnevisionProcessor"});
    std::fs::write(model.join("processor_config.json"), nested.to_string()).unwrap();
    std::fs::remove_file(&flat).unwrap();
    let out = parent.path().join("o.gguf");
    let done = convert(&model, &out, &["--type", "f16"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(std::fs::read(&out).unwrap() == plain[0]);
    assert!(std::fs::read(parent.path().join("mmproj-o-f16.gguf")).unwrap() == plain[1]);
    // What is wrong in the section is named with its path.
    edit_json(&model.join("processor_config.json"), |c| c["image_processor"]["resample"] = 2.into());
    let done = convert(&model, &out, &["--type", "f16"]);
    assert!(
        text(&done.stderr).contains("processor_config.json: key `image_processor.resample`"),
        "{}",
        text(&done.stderr)
    );
}

//! Against the MBQ authors' own code: its batches, sensitivities, losses and grid points (`$MBQ_SHARED/oracle`).
use super::batch::{Kind, Sample};
use super::embed::Embedder;
use super::grid::{Activations, Asymmetric, PerChannel, WeightGrid};
use super::mbq::{Group, Loss};
use super::{CalibrateOptions, Method, Outcome, Switches, TextModel, run};
use crate::checkpoint::Checkpoint;
use crate::convert::{Conversion, ConvertOptions};
use crate::events::Silent;
use crate::front::FoundModel;
use crate::front::testing::decoder;
use crate::ggml::GgmlType;
use crate::gguf::{FileType, TypeChoice};
use crate::hub::Hub;
use crate::runtime::engine::{Compute, Runtime};
use candle_core::{Device, Tensor};
use std::path::{Path, PathBuf};

pub(super) fn oracle() -> Option<PathBuf> {
    let shared = std::env::var_os("MBQ_SHARED").map(|s| Path::new(&s).join("oracle"));
    if shared.is_none() {
        eprintln!("skipped: MBQ_SHARED is not set");
    }
    shared
}

/// The dumped batch; padded as there, or packed.
pub(super) fn batch(runs: &Path, padded: bool) -> Vec<Sample> {
    let t = candle_core::safetensors::load(runs.join("batch.safetensors"), &Device::Cpu).unwrap();
    let (b, n, _) = t["inputs_embeds"].dims3().unwrap();
    let masks = |name: &str| -> Vec<Vec<u8>> { t[name].to_vec2().unwrap() };
    let (vision, caption, attention) = (masks("vision_mask"), masks("caption_mask"), masks("attention_mask"));
    let labels: Vec<Vec<i64>> = t["labels"].to_vec2().unwrap();
    (0..b)
        .map(|i| {
            let real = attention[i].iter().filter(|&&m| m == 1).count();
            let len = if padded { n } else { real };
            let kind = |j: usize| match (vision[i][j], caption[i][j]) {
                (1, _) => Kind::Vision,
                (_, 1) => Kind::Answer,
                _ => Kind::Other,
            };
            Sample {
                embeds: t["inputs_embeds"].get(i).unwrap().narrow(0, 0, len).unwrap(),
                kinds: (0..len).map(kind).collect(),
                ids: labels[i][..len].iter().map(|&l| l.max(0) as u32).collect(),
                real,
                layout: None,
                injections: Vec::new(),
            }
        })
        .collect()
}

fn calibrate(dir: &Path, method: Method, wa: bool, distort: bool, exhaustive: bool, padded: bool) -> Outcome {
    within(20 << 20, dir, method, wa, distort, exhaustive, padded)
}

/// [`calibrate`] with so many bytes of memory.
fn within(
    memory: usize,
    dir: &Path,
    method: Method,
    wa: bool,
    distort: bool,
    exhaustive: bool,
    padded: bool,
) -> Outcome {
    let checkpoint = Checkpoint::open(&dir.join("model")).unwrap();
    let source = decoder(&checkpoint);
    let model = TextModel::new(&source, 512, Device::Cpu).unwrap();
    let w3 = Asymmetric { bits: 3, group: 128 };
    let w4 = PerChannel { bits: 4 };
    let weights: &dyn WeightGrid = if wa { &w4 } else { &w3 };
    let options = CalibrateOptions {
        method,
        weights,
        activations: if wa { Activations::PerToken } else { Activations::Float },
        loss: if method == Method::Awq { Loss::Mse } else { Loss::Mae },
        distort,
        balance: true,
        exhaustive,
        share_heads: false,
        scales: true,
        alpha: 0.5,
        importance: None,
        chunk_tokens: 300,
        memory,
        device_memory: None,
        spill: None,
        compensation: None,
        progress: None,
    };
    run(&model, &batch(&dir.join("runs"), padded), &options, &Silent).unwrap()
}

/// The oracle's name of what precedes a group.
fn previous(layer: usize, group: Group) -> String {
    let rest = match group {
        Group::Qkv => "input_layernorm",
        Group::O => "self_attn.v_proj",
        Group::GateUp => "post_attention_layernorm",
        Group::Down => "mlp.up_proj",
    };
    format!("model.layers.{layer}.{rest}")
}

fn relative(a: f64, b: f64) -> f64 {
    if a == b { 0.0 } else { (a - b).abs() / b.abs().max(f64::MIN_POSITIVE) }
}

/// Median and largest relative difference.
fn spread(a: &[f32], b: &Tensor) -> (f64, f64) {
    let b: Vec<f32> = b.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(a.len(), b.len());
    let mut all: Vec<f64> = a.iter().zip(b).map(|(&a, b)| relative(a.into(), b.into())).collect();
    all.sort_by(f64::total_cmp);
    (all[all.len() / 2], all[all.len() - 1])
}

/// How far median and largest of the losses' relative differences may lie from the authors'.
///
/// Weight only: largest 1e-3, median 1e-6 on a processor with AVX2; onevision's mbq has 1.9e-6 with AVX-512, before and
/// after the decoder took GGUF's order of rows. That order sums Llama's q and k otherwise: llava's mbq with w4a8 went
/// from 1.9e-6 to 2.4e-6 with it. onevision's mbq has 2.7e-6 with w4a8 on AVX-512; older code was not tried
/// there. Where activations are rounded to int8, float32's order of summation
/// decides near ties, and the losses of 16 short samples feel each: two runs of the same arithmetic in torch that
/// differ in nothing else are 3.5e-7 (llava) and 6.0e-7 (onevision) apart in the median and up to 2.5e-4, mae;
/// awq's squared errors 1.5e-6 and 2.0e-6. With `distort` flips feed on through the blocks, by way of the scales too:
/// median 8.8e-5 and 1.3e-4, up to 2.3e-3, single channels of x_max up to 1.6e-3 even with the scales held fast
/// (tests/reference/w4a8_order.py). The bounds are 1.5 to 5 times that.
fn bounds(method: Method, wa: bool, distort: bool) -> (f64, f64) {
    match (wa, distort) {
        (false, _) => (3e-6, 1e-3),
        (true, false) if method == Method::Awq => (3e-6, 3e-3),
        (true, false) => (4e-6, 1e-3),
        (true, true) => (1e-3, 2e-2),
    }
}

/// Every number of one run of the authors' code.
fn compare(model: &str, name: &str, method: Method, wa: bool, distort: bool) {
    let Some(oracle) = oracle() else { return };
    let dir = oracle.join(model);
    let found = calibrate(&dir, method, wa, distort, true, true);
    let run = dir.join("runs").join(name);
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(run.join("report.json")).unwrap()).unwrap();
    let load = |file: &str| candle_core::safetensors::load(run.join(file), &Device::Cpu).unwrap();
    let (scales, x_max) = (load("scales.safetensors"), load("x_max.safetensors"));
    let blocks = report["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), found.blocks.len());
    let mut differences = Vec::new();
    let mut flipped = false;
    for (layer, (theirs, ours)) in blocks.iter().zip(&found.blocks).enumerate() {
        if method == Method::MbqScales {
            for (part, ratio) in [("attn", found.ratios[layer].attn), ("mlp", found.ratios[layer].mlp)] {
                let want = theirs["ratio"][part].as_f64().unwrap();
                assert!(relative(ratio, want) <= 1e-4, "layer {layer} {part}: ratio {ratio}, theirs {want}");
            }
        }
        let groups = theirs["groups"].as_array().unwrap();
        assert_eq!(groups.len(), ours.len(), "layer {layer}");
        for (theirs, ours) in groups.iter().zip(ours) {
            let key = previous(layer, ours.group);
            assert_eq!(theirs["prev"], key.as_str());
            let losses: Vec<f64> = theirs["losses"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            let best = (theirs["best_ratio"].as_f64().unwrap() * 20.0).round() as usize;
            let margin = theirs["margin"].as_f64().unwrap();
            if margin >= if wa && distort { 5e-3 } else { 1e-3 } && !flipped {
                assert_eq!(ours.best, best, "{key}: theirs has margin {margin}");
            }
            // After a flip `distort` goes another way.
            flipped |= distort && ours.best != best;
            if flipped {
                continue;
            }
            let best_differs = ours.best != best;
            for (ours, theirs, what) in [(&ours.x_max, &x_max[&key], "x_max"), (&ours.scales, &scales[&key], "scales")]
            {
                if what == "scales" && best_differs {
                    continue;
                }
                let (middle, worst) = spread(ours, theirs);
                // See below for why; scales that differ by that flip 4-bit weights too, which multiplies it.
                let fine = if wa && distort { middle <= 5e-3 } else { worst <= 1e-5 };
                assert!(fine, "{key}: {what} differ by {middle} (median), {worst} (largest)");
            }
            differences.extend(ours.losses.iter().zip(&losses).map(|(a, &b)| relative(a.unwrap(), b)));
        }
    }
    if !wa && !distort {
        race_agrees(&dir, method, &found);
    }
    differences.sort_by(f64::total_cmp);
    let (median, max) = (differences[differences.len() / 2], differences[differences.len() - 1]);
    println!("{model} {name}: {} losses, median difference {median:.1e}, max {max:.1e}", differences.len());
    let (median_bound, max_bound) = bounds(method, wa, distort);
    assert!(median <= median_bound && max <= max_bound, "median {median}, max {max}");
}

/// The race finds the exhaustive search's points wherever the margin is 1e-3 or more, and the same loss there.
fn race_agrees(dir: &Path, method: Method, all: &Outcome) {
    let pruned = calibrate(dir, method, false, false, false, true);
    let (mut scored, mut groups) = (0, 0);
    for (a, b) in all.blocks.iter().flatten().zip(pruned.blocks.iter().flatten()) {
        (scored, groups) = (scored + b.losses.iter().flatten().count(), groups + 1);
        if a.margin >= 1e-3 {
            assert_eq!(a.best, b.best, "{} {method:?} {:?}: margin {}", dir.display(), a.group, a.margin);
            // Rows are multiplied in other company: another order of summation.
            let d = relative(a.best_loss, b.best_loss);
            assert!(d < 1e-6, "{} {method:?} {:?}: losses differ by {d}", dir.display(), a.group);
        }
    }
    println!("{} {method:?}: {scored} of {} candidates finished", dir.display(), 20 * groups);
    assert!(scored < 10 * groups, "the race dropped too few");
}

/// With next to no memory (everything waits in a file, gradients in several parts, the search gathers piece by piece)
/// and with more than enough: the same to the last bit.
#[test]
fn memory_changes_nothing() {
    let Some(oracle) = oracle() else { return };
    let dir = oracle.join("tiny-onevision");
    for distort in [false, true] {
        let run = |memory| format!("{:?}", within(memory, &dir, Method::MbqScales, distort, distort, false, false));
        assert!(run(1) == run(1 << 40), "distort {distort}");
    }
}

macro_rules! oracle_tests {
    ($($test:ident: $model:literal $run:literal $method:ident $wa:literal $distort:literal;)*) => {
        $(#[test] fn $test() { compare($model, $run, Method::$method, $wa, $distort); })*
    };
}

oracle_tests! {
    onevision_mbq_w3: "tiny-onevision" "mbq-w3g128" Mbq false false;
    onevision_awq_w3: "tiny-onevision" "awq-w3g128" Awq false false;
    onevision_mbq_distort_w3: "tiny-onevision" "mbq-distort-w3g128" Mbq false true;
    onevision_mbq_w4a8: "tiny-onevision" "mbq-w4a8" Mbq true false;
    onevision_awq_w4a8: "tiny-onevision" "awq-w4a8" Awq true false;
    onevision_mbq_distort_w4a8: "tiny-onevision" "mbq-distort-w4a8" Mbq true true;
    llava_mbq_w3: "tiny-llava" "mbq-w3g128" Mbq false false;
    llava_awq_w3: "tiny-llava" "awq-w3g128" Awq false false;
    llava_mbq_distort_w3: "tiny-llava" "mbq-distort-w3g128" Mbq false true;
    llava_mbq_w4a8: "tiny-llava" "mbq-w4a8" Mbq true false;
    llava_awq_w4a8: "tiny-llava" "awq-w4a8" Awq true false;
    llava_mbq_distort_w4a8: "tiny-llava" "mbq-distort-w4a8" Mbq true true;
}

/// SmoothQuant's statistics are the authors' ones: absmax of what enters each linear, and s from them.
#[test]
fn smoothquant_statistics() {
    let Some(oracle) = oracle() else { return };
    for model in ["tiny-onevision", "tiny-llava"] {
        let dir = oracle.join(model);
        // The authors take them sample by sample, without padding, unlike everything else.
        let found = calibrate(&dir, Method::SmoothQuant, true, false, true, false);
        let path = dir.join("runs/sq-w4a8/act_absmax.safetensors");
        let act = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let checkpoint = Checkpoint::open(&dir.join("model")).unwrap();
        let weights = |name: &str| {
            let view = checkpoint.tensor(name).unwrap();
            (checkpoint.f32(name, view.shape).unwrap(), view.shape[1])
        };
        for layer in 0..4 {
            for (norm, linears) in [
                ("attn_norm", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..]),
                ("ffn_norm", &["mlp.gate_proj", "mlp.up_proj"][..]),
            ] {
                let key = format!("model.layers.{layer}.{}", linears[0]);
                let act: Vec<f32> = act[&key].flatten_all().unwrap().to_vec1().unwrap();
                let mut column = vec![0f32; act.len()];
                for l in linears {
                    let (w, cols) = weights(&format!("language_model.model.layers.{layer}.{l}.weight"));
                    w.iter().enumerate().for_each(|(i, w)| column[i % cols] = column[i % cols].max(w.abs()));
                }
                let want: Vec<f32> = act.iter().zip(&column).map(|(a, w)| a.sqrt() / w.max(1e-5).sqrt()).collect();
                let fold = &found.folds[&format!("blk.{layer}.{norm}.weight")];
                let (_, d) = spread(fold.divide_rows.as_ref().unwrap(), &Tensor::new(want, &Device::Cpu).unwrap());
                assert!(d < 1e-4, "{model} {key}: {d}");
            }
        }
    }
}

/// Calls `f` with what makes the samples of the checkpoint in `dir`, its projector in f32; not without a runtime.
fn with_embedder(dir: &Path, f: impl FnOnce(&Embedder)) {
    let Ok(runtime) = crate::runtime::directory(None) else { return eprintln!("skipped: no runtime") };
    let found = FoundModel::find(dir.to_str().unwrap(), None, &Hub::from_env(true), &Silent).unwrap();
    let pair = found.pair().unwrap();
    let work = tempfile::tempdir().unwrap();
    let options = ConvertOptions {
        output: Some(work.path().join("model.gguf")),
        types: TypeChoice::of(FileType::Plain(GgmlType::F16)),
        mmproj_type: Some(GgmlType::F32),
        split_max_size: None,
        origin: found.origin(),
    };
    let mut conversion = Conversion::begin(&pair, &options, &Silent).unwrap();
    let mmproj = conversion.mmproj().unwrap();
    let compute = Compute { threads: 2, gpu_layers: 0, batch: 512, exact: true };
    let runtime = Runtime::open(&runtime).unwrap();
    f(&Embedder::load(&pair.text, mmproj.as_deref(), &runtime, compute, work.path()).unwrap());
}

/// From pictures and text through tower, projector, packing, template and tokenizer: the dumped embeddings.
#[test]
fn embeddings_are_the_processors() {
    let Some(oracle) = oracle() else { return };
    with_embedder(&oracle.join("tiny-onevision/model"), |embedder| dumped_embeddings(&oracle, embedder));
}

fn dumped_embeddings(oracle: &Path, embedder: &Embedder) {
    use super::pairs::Conversation;
    let dir = oracle.join("tiny-onevision");
    let list: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("runs/batch.json")).unwrap()).unwrap();
    let mut differences = Vec::new();
    for (want, entry) in batch(&dir.join("runs"), false).iter().zip(list["samples"].as_array().unwrap()) {
        let text = |key: &str| entry[key].as_str().unwrap();
        let path = oracle.join("data").join(text("image"));
        let image = crate::image::load_rgb(&path).unwrap();
        let messages = Conversation::single(text("question"), text("answer"), true);
        let got = embedder.sample("sample", &messages, &[image], 4096, &mut Vec::new()).unwrap();
        assert_eq!(got.kinds, want.kinds, "{}", path.display());
        // The authors end an answer with the tokenizer's eos token, here the turn ends as the model ends it.
        let n = got.kinds.len() - 1;
        let answers = |s: &Sample| -> Vec<u32> {
            s.ids[..n].iter().zip(&s.kinds).filter(|(_, k)| **k == Kind::Answer).map(|(id, _)| *id).collect()
        };
        assert_eq!(answers(&got), answers(want), "{}", path.display());
        let rows = |s: &Sample| s.embeds.narrow(0, 0, n).unwrap();
        let norm = |t: Tensor| f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
        differences.push(norm((rows(&got) - rows(want)).unwrap()) / norm(rows(want)));
    }
    println!("relative differences {differences:?}");
    // The dump was made with a Pillow that resizes some pictures' columns before their rows, which moves single bytes
    // by one level; transformers with Pillow 11 differs from it by the same 3e-4 on the second picture. The others are
    // equal but for the order of sums.
    assert!(differences.len() == 16 && differences.iter().all(|&d| d < 1e-3), "{differences:?}");
    assert!(differences.iter().filter(|&&d| d < 1e-6).count() >= 8, "{differences:?}");
}

fn demo(file: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

/// Messages in the form that transformers takes.
fn messages(list: &serde_json::Value) -> Vec<crate::prompt::Message> {
    use crate::prompt::{Message, Part};
    let part = |p: &serde_json::Value| match p["text"].as_str() {
        Some(text) => Part::Text(text.into()),
        None => Part::Image,
    };
    let message = |m: &serde_json::Value| {
        let parts = m["content"].as_array().unwrap().iter().map(part).collect();
        Message { role: m["role"].as_str().unwrap().into(), parts }
    };
    list.as_array().unwrap().iter().map(message).collect()
}

/// ChatML with a newline behind the role, in typed parts.
const PLAIN: &str = include_str!("../../tests/golden/conversations.jinja");

/// The demo's checkpoint with another chat template.
fn demo_worded_by(template: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(demo("demo/model")).unwrap().map(|f| f.unwrap()) {
        if file.file_type().unwrap().is_file() {
            std::fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
        }
    }
    let json = serde_json::json!({"chat_template": template}).to_string();
    std::fs::write(dir.path().join("chat_template.json"), json).unwrap();
    dir
}

/// Several turns and pictures, as transformers 5 embeds them (tests/reference/conversation_goldens.py).
#[test]
fn conversations_are_the_processors() {
    let dir = demo_worded_by(PLAIN);
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/golden/conversations.json")).unwrap();
    with_embedder(dir.path(), |embedder| {
        golden.as_array().unwrap().iter().for_each(|want| conversation(embedder, want));
    });
}

/// The demo's token for pictures.
fn image_token() -> u32 {
    let config = std::fs::read(demo("demo/model/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    config["image_token_index"].as_u64().or(config["image_token_id"].as_u64()).unwrap() as u32
}

fn conversation(embedder: &Embedder, want: &serde_json::Value) {
    let paths = want["pictures"].as_array().unwrap().iter().map(|p| demo(p.as_str().unwrap()));
    let pictures: Vec<_> = paths.map(|p| crate::image::load_rgb(&p).unwrap()).collect();
    let got = embedder.sample("it", &messages(&want["messages"]), &pictures, 4096, &mut Vec::new()).unwrap();
    let numbers = |key: &str| want[key].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32);
    let of_text = |ids: &mut dyn Iterator<Item = u32>| -> Vec<u32> {
        ids.zip(&got.kinds).filter(|(_, k)| **k != Kind::Vision).map(|(id, _)| id).collect()
    };
    assert_eq!(got.ids.len(), numbers("ids").count());
    assert_eq!(of_text(&mut got.ids.iter().copied()), of_text(&mut numbers("ids")));
    let kinds = numbers("answers").zip(numbers("ids")).map(|(answer, id)| match (answer, id == image_token()) {
        (1, _) => Kind::Answer,
        (_, true) => Kind::Vision,
        _ => Kind::Other,
    });
    assert_eq!(got.kinds, kinds.collect::<Vec<_>>());
    let rows: Vec<Vec<f32>> = got.embeds.to_vec2().unwrap();
    for (i, (row, want)) in rows.iter().zip(want["embeds"].as_array().unwrap()).enumerate() {
        for (got, want) in [row[0], row[1], row.iter().sum()].iter().zip(want.as_array().unwrap()) {
            let want = want.as_f64().unwrap();
            let off = (f64::from(*got) - want).abs() / want.abs().max(1.0);
            // Sums of 256 values in f32 through the tower: 3e-5 is what was seen at most.
            assert!(off < 1e-4, "row {i}: {got}, transformers {want}");
        }
    }
}

/// The published template words an answer that is given otherwise than the prompt for one that is awaited; answers are
/// told from it all the same. A template that rewrites or drops what was answered is refused.
#[test]
fn answers_are_found_in_any_template() {
    if crate::runtime::directory(None).is_err() {
        return eprintln!("skipped: no runtime");
    }
    let sample = |template: &str| {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/conversations.json")).unwrap();
        let mut made = Err("nothing was made".to_string());
        with_embedder(demo_worded_by(template).path(), |embedder| {
            let messages = messages(&golden[3]["messages"]);
            made = embedder.sample("it", &messages, &[], 4096, &mut Vec::new()).map_err(|e| e.to_string());
        });
        made
    };
    let answers = |s: &Sample| -> Vec<u32> {
        s.ids.iter().zip(&s.kinds).filter(|(_, k)| **k == Kind::Answer).map(|(id, _)| *id).collect()
    };
    let plain = sample(PLAIN).unwrap();
    let published = "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}\
        {% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}\
        {% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}\
        {{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let found = sample(published).unwrap();
    assert_ne!(found.ids, plain.ids);
    assert_eq!(answers(&found), answers(&plain));
    for (template, want) in [
        (
            published.replace("content['text']", "content['text'] | replace('shape', 'form')"),
            "rewrites earlier answers",
        ),
        (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}".into(),
            "drops the assistant's text",
        ),
        (format!("{published}{{% if messages | length > 1 %}}{{{{ raise_exception('no') }}}}{{% endif %}}"), "no"),
    ] {
        let error = sample(&template).unwrap_err();
        assert!(error.starts_with("it: ") && error.contains(want), "{error}");
    }
}

/// The first 32 pairs, as long as the longest of them.
fn padded_samples(testbed: &Path) -> Vec<Sample> {
    use super::pairs;
    let list = pairs::List::read(&testbed.join("calib.json"), None).unwrap();
    let mut samples: Vec<Sample> = Vec::new();
    with_embedder(&testbed.join("model"), |embedder| {
        for index in 0..32 {
            let conversation = list.conversation(index).unwrap();
            let pictures: Vec<_> = conversation.pictures.iter().map(|p| p.load().unwrap()).collect();
            samples.push(embedder.sample("sample", &conversation.messages, &pictures, 4096, &mut Vec::new()).unwrap());
        }
    });
    // The authors' code pads, and its x_max counts the padding: other scales, losses that differ by 1 %.
    let longest = samples.iter().map(|s| s.real).max().unwrap();
    for s in &mut samples {
        let (n, hidden) = s.embeds.dims2().unwrap();
        let zeros = Tensor::zeros((longest - n, hidden), candle_core::DType::F32, &Device::Cpu).unwrap();
        s.embeds = Tensor::cat(&[&s.embeds, &zeros], 0).unwrap();
        s.kinds.resize(longest, Kind::Other);
        s.ids.resize(longest, 0);
    }
    samples
}

/// The testbed's first 32 pairs from pictures to grid points. Minutes long: it runs when MBQ_TESTBED is set
/// (MBQ_EXHAUSTIVE: without the race).
#[test]
fn testbed_points() {
    let Some(oracle) = oracle().filter(|_| std::env::var_os("MBQ_TESTBED").is_some()) else {
        return eprintln!("skipped: MBQ_TESTBED is not set");
    };
    let testbed = oracle.parent().unwrap().join("testbed");
    let checkpoint = Checkpoint::open(&testbed.join("model")).unwrap();
    let start = std::time::Instant::now();
    let samples = padded_samples(&testbed);
    println!("{} tokens, vision {:.1} s", samples.iter().map(|s| s.real).sum::<usize>(), start.elapsed().as_secs_f64());
    let source = decoder(&checkpoint);
    let model = TextModel::new(&source, 4096, Device::Cpu).unwrap();
    let weights = Asymmetric { bits: 3, group: 128 };
    for (name, method, loss) in [("mbq-w3g128", Method::MbqScales, Loss::Mae), ("awq-w3g128", Method::Awq, Loss::Mse)] {
        let start = std::time::Instant::now();
        let switches =
            Switches { exhaustive: Some(std::env::var_os("MBQ_EXHAUSTIVE").is_some()), ..Switches::default() };
        let options = CalibrateOptions { memory: 4 << 30, loss, ..switches.options(method, true, &weights) };
        let found = run(&model, &samples, &options, &Silent).unwrap();
        let path = oracle.join("testbed32").join(name).join("report.json");
        let report: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let (mut same, mut wrong, mut close) = (0, Vec::new(), 0);
        for (layer, (theirs, ours)) in report["blocks"].as_array().unwrap().iter().zip(&found.blocks).enumerate() {
            if method == Method::MbqScales {
                for (part, ratio) in [("attn", found.ratios[layer].attn), ("mlp", found.ratios[layer].mlp)] {
                    let want = theirs["ratio"][part].as_f64().unwrap();
                    assert!(relative(ratio, want) <= 1e-2, "layer {layer} {part}: ratio {ratio}, theirs {want}");
                }
            }
            for (theirs, ours) in theirs["groups"].as_array().unwrap().iter().zip(ours) {
                let best = (theirs["best_ratio"].as_f64().unwrap() * 20.0).round() as usize;
                let margin = theirs["margin"].as_f64().unwrap();
                if best == ours.best {
                    same += 1;
                } else if margin < 5e-3 {
                    close += 1;
                } else {
                    wrong.push(format!("layer {layer} {:?}: {} not {best}, margin {margin}", ours.group, ours.best));
                }
            }
        }
        println!(
            "{name}: {same} same, {close} differ below margin 5e-3, {:.1} s; {wrong:?}",
            start.elapsed().as_secs_f64()
        );
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}

/// The decoder in candle against the runtime's, both in f32, on a sample with a picture: mean divergence at the answer's
/// tokens. `text` and `mmproj` are GGUF files.
fn divergence_from_runtime(text: &Path, mmproj: &Path) -> f64 {
    use super::batch::pack;
    use super::pairs::Conversation;
    use super::stream::Room;
    use crate::runtime::engine::{Decoder, Piece, Vision};
    let runtime = Runtime::open(&crate::runtime::directory(None).unwrap()).unwrap();
    let compute = Compute { threads: 2, gpu_layers: 0, batch: 512, exact: true };
    let pair = crate::front::gguf::pair(text, Some(mmproj)).unwrap();
    let work = tempfile::tempdir().unwrap();
    let embedder = Embedder::load(&pair.text, Some(mmproj), &runtime, compute, work.path()).unwrap();
    let picture = crate::image::load_rgb(&demo("demo/pictures/red-star.png")).unwrap();
    let messages = Conversation::single("What is in the picture?", "A red star, it seems.", true);
    let sample = embedder.sample("it", &messages, std::slice::from_ref(&picture), 4096, &mut Vec::new()).unwrap();
    let answer: Vec<i32> =
        sample.ids.iter().zip(&sample.kinds).filter(|(_, k)| **k == Kind::Answer).map(|(&id, _)| id as i32).collect();

    let model = TextModel::new(&pair.text, sample.kinds.len(), Device::Cpu).unwrap();
    let (batch, x) = pack(&[sample], 4096, &Room::new(&Device::Cpu, usize::MAX, work.path())).unwrap();
    let chunk = &batch.chunks[0];
    let mut x = x.get(0).unwrap();
    for layer in 0..model.text.num_layers {
        let block = model.block(layer).unwrap();
        x = chunk.inject(layer, block.forward(&x, &chunk.spans).unwrap()).unwrap();
    }
    let first = chunk.tokens() - answer.len() - 1;
    let ours = model.head().unwrap().log_probabilities(&x.narrow(0, first, answer.len()).unwrap()).unwrap();
    let ours: Vec<Vec<f32>> = ours.to_vec2().unwrap();

    let eyes = crate::runtime::engine::Model::load(&runtime, text, compute, false).unwrap();
    let template = eyes.template().unwrap().unwrap();
    let prompt = template.prompt(&messages[..1]).unwrap();
    let vision = Vision::load(eyes, mmproj, compute).unwrap();
    let pieces: Vec<Piece> = vision.tokenize(&prompt, Path::new("it"), &[picture]).unwrap().pieces(true).unwrap();
    let mut decoder = Decoder::load(&runtime, text, compute, 4096, Some(&vision)).unwrap();
    decoder.prefill(&pieces).unwrap();
    let mut kl = 0.0;
    decoder
        .score(&[&answer], |_, i, logits| {
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|&l| f64::from(l - most).exp()).sum();
            let theirs = logits.iter().map(|&l| f64::from(l - most) - sum.ln());
            kl += theirs.zip(&ours[i]).map(|(p, &q)| p.exp() * (p - f64::from(q))).sum::<f64>();
        })
        .unwrap();
    kl / answer.len() as f64
}

/// The demo's pair, and every pair `*/model-f16.gguf`, `*/mmproj-f16.gguf` in the folder `MBQ_PAIRS` (docs/families.md).
#[test]
fn decoders_are_the_runtimes() {
    if crate::runtime::directory(None).is_err() {
        return eprintln!("skipped: no runtime");
    }
    let dir = tempfile::tempdir().unwrap();
    let found = FoundModel::find(demo("demo/model").to_str().unwrap(), None, &Hub::from_env(true), &Silent).unwrap();
    let options = ConvertOptions {
        output: Some(dir.path().join("model.gguf")),
        types: TypeChoice::of(FileType::Plain(GgmlType::F16)),
        mmproj_type: None,
        split_max_size: None,
        origin: found.origin(),
    };
    let pair = found.pair().unwrap();
    crate::convert::convert(&pair, &options, &Default::default(), &Silent).unwrap();
    let mut pairs = vec![(dir.path().join("model.gguf"), dir.path().join("mmproj-model-f16.gguf"))];
    for folder in std::env::var_os("MBQ_PAIRS").iter().flat_map(|f| std::fs::read_dir(f).unwrap()) {
        let folder = folder.unwrap().path();
        pairs.push((folder.join("model-f16.gguf"), folder.join("mmproj-f16.gguf")));
    }
    for (text, mmproj) in pairs.iter().filter(|(text, mmproj)| text.exists() && mmproj.exists()) {
        let kl = divergence_from_runtime(text, mmproj);
        println!("{}: {kl:.1e}", text.display());
        // Sums of f32 in another order: 6e-7 was seen at most, of either sign.
        assert!(kl.abs() < 1e-5, "{}: {kl}", text.display());
    }
}

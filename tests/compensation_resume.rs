//! Compensation of a whole made-up model: interrupted and resumed it comes to the same bytes.
mod tiny;

use candle_core::{Device, Tensor};
use mbq_convert::calibrate::batch::{Kind, Sample};
use mbq_convert::calibrate::compensate::{Compensation, CompensationSettings, VisionWeight};
use mbq_convert::calibrate::grid::{Activations, Asymmetric};
use mbq_convert::calibrate::importance::Weighting;
use mbq_convert::calibrate::mbq::Loss;
use mbq_convert::calibrate::store::{JobId, Store};
use mbq_convert::calibrate::{CalibrateOptions, Method, Outcome, TextModel, run};
use mbq_convert::events::{Event, Observer, Silent};
use mbq_convert::front::{FoundModel, Pair};
use mbq_convert::ggml::GgmlType;
use mbq_convert::gguf::plan::text;
use mbq_convert::gguf::{Encoder, TypeChoice};
use mbq_convert::hub::Hub;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

/// Three samples of 20 vision tokens and 10 of text.
fn samples() -> Vec<Sample> {
    let sample = |seed: u64| {
        let embeds = Tensor::from_vec(tiny::values(30 * tiny::HIDDEN, seed), (30, tiny::HIDDEN), &Device::Cpu).unwrap();
        let kinds = (0..30).map(|i| [Kind::Other, Kind::Vision, Kind::Vision, Kind::Answer][(i + 7) / 10]).collect();
        Sample::new(embeds, kinds, (0..30).map(|i| (i * 7 % tiny::VOCAB) as u32).collect())
    };
    (1..4).map(sample).collect()
}

/// Panics once `block` is finished, and keeps the notes.
#[derive(Default)]
struct Interrupt {
    block: Option<&'static str>,
    notes: Mutex<Vec<String>>,
}

impl Observer for Interrupt {
    fn event(&self, event: Event) {
        match event {
            Event::Advance { detail, .. } => assert!(Some(detail.as_str()) != self.block, "interrupted"),
            Event::Note(note) => self.notes.lock().unwrap().push(note),
            _ => {}
        }
    }
}

/// One linear is of a type without feedback, `v` and `o` are of other blocks than the rest.
fn types(pair: &Pair) -> BTreeMap<String, GgmlType> {
    let choice = TypeChoice::of("mbq3".parse().unwrap());
    let linears = text(&pair.text.tensors, &choice).into_iter().filter(|t| t.is_decoder_linear);
    let ty = |name: &str| match name {
        n if n.contains("attn_v") => GgmlType::Q4_0,
        n if n.contains("attn_output") => GgmlType::Q3_K,
        n if n.contains("ffn_up") => GgmlType::TQ2_0,
        _ => GgmlType::MBQ3,
    };
    linears.map(|t| (t.name.clone(), ty(&t.name))).collect()
}

fn calibrate(model: &Path, work: &Path, method: Method, stop: Option<&'static str>) -> Result<Outcome, String> {
    observed(1 << 20, model, work, method, &Interrupt { block: stop, ..Default::default() })
}

/// [`calibrate`] with so many bytes of memory, and an observer.
fn observed(
    memory: usize,
    model: &Path,
    work: &Path,
    method: Method,
    observer: &dyn Observer,
) -> Result<Outcome, String> {
    let found = FoundModel::find(model.to_str().unwrap(), None, &Hub::from_env(true), &Silent).unwrap();
    let pair = found.pair().unwrap();
    let job = JobId {
        model: model.display().to_string(),
        weights: pair.text.values.fingerprint(),
        settings: format!("{method:?}"),
    };
    let model = TextModel::new(&pair.text, 64, Device::Cpu).unwrap();
    let settings = CompensationSettings {
        vision: if method == Method::Mbq { VisionWeight::Ratio } else { VisionWeight::Fixed(0.5) },
        damping: 0.01,
        search_levels: true,
        target: 1.0,
        residual: true,
        two_sided: true,
    };
    let store = Store::new(work.join("store"));
    let compensation = Compensation { settings, types: types(&pair), store };
    let options = CalibrateOptions {
        method,
        weights: &Asymmetric { bits: 3, group: 128 },
        activations: Activations::Float,
        loss: Loss::Mae,
        distort: false,
        balance: true,
        exhaustive: false,
        share_heads: false,
        scales: true,
        importance: Some(Weighting::Balanced),
        alpha: 0.5,
        chunk_tokens: 32,
        memory,
        device_memory: None,
        spill: Some(work.into()),
        compensation: Some(&compensation),
        progress: Some((work.join("progress.json"), job)),
    };
    run(&model, &samples(), &options, observer).map_err(|e| e.to_string())
}

fn bytes(work: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(work.join("store")).unwrap().map(|f| f.unwrap().path());
    files.map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&p).unwrap())).collect()
}

#[test]
fn a_resumed_run_gives_the_same_bytes() {
    let parent = tempfile::tempdir().unwrap();
    let model = tiny::checkpoint(parent.path(), tiny::Naming::Published, 1);
    for method in [Method::Gptq, Method::Mbq] {
        let dir = |name: &str| {
            let dir = parent.path().join(format!("{name}-{method:?}"));
            std::fs::create_dir_all(&dir).unwrap();
            dir
        };
        let (whole, cut) = (dir("whole"), dir("cut"));
        let first = calibrate(&model, &whole, method, None).unwrap();
        assert_eq!(first.compensated.len(), tiny::LAYERS);
        // 7 linears a block, one of them without feedback.
        assert_eq!(bytes(&whole).len(), 6 * tiny::LAYERS);
        for linear in first.compensated.iter().flat_map(|b| &b.linears) {
            assert!(linear.gain < 1.0, "{method:?} {linear:?}");
        }
        let interrupted = std::panic::catch_unwind(|| calibrate(&model, &cut, method, Some("block 1")));
        assert!(interrupted.is_err());
        assert_eq!(bytes(&cut).len(), 6 * 2, "two blocks were finished");
        let second = calibrate(&model, &cut, method, None).unwrap();
        assert_eq!(bytes(&cut), bytes(&whole));
        assert_eq!(second.folds, first.folds);
        let errors = |o: &Outcome| -> Vec<f64> {
            o.compensated.iter().flat_map(|b| b.linears.iter().flat_map(|l| [l.gain, l.error])).collect()
        };
        for (a, b) in errors(&second).iter().zip(errors(&first)) {
            // serde_json reads numbers to within one unit of the last place.
            assert!((a / b - 1.0).abs() < 1e-14, "{a} {b}");
        }

        // What the progress file says is there has to be there, and whole.
        let name = "blk.0.attn_q.weight.mbq3";
        std::fs::write(cut.join("store").join(name), [0; 52]).unwrap();
        let error = calibrate(&model, &cut, method, None).unwrap_err();
        assert!(error.contains(name) && error.contains("another size"), "{error}");
        std::fs::remove_file(cut.join("store").join(name)).unwrap();
        let error = calibrate(&model, &cut, method, None).unwrap_err();
        assert!(error.contains(name) && error.contains("is missing"), "{error}");
    }
}

/// The checkpoint's weights are others by now: what was done of the first is not continued. Another job is refused.
#[test]
fn a_replaced_checkpoint_starts_over() {
    let parent = tempfile::tempdir().unwrap();
    let dir = |name: &str| {
        std::fs::create_dir(parent.path().join(name)).unwrap();
        parent.path().join(name)
    };
    let model = tiny::checkpoint(parent.path(), tiny::Naming::Published, 1);
    let (cut, whole) = (dir("cut"), dir("whole"));
    let interrupted = std::panic::catch_unwind(|| calibrate(&model, &cut, Method::Gptq, Some("block 1")));
    assert!(interrupted.is_err());
    let error = calibrate(&model, &cut, Method::Mbq, None).unwrap_err();
    assert!(error.contains("another calibration"), "{error}");
    let mut tensors = tiny::tensors();
    tensors.get_mut("language_model.model.layers.0.mlp.down_proj.weight").unwrap().1[5] += 0.5;
    tiny::checkpoint_with(parent.path(), tiny::Naming::Published, 1, tensors);
    calibrate(&model, &whole, Method::Gptq, None).unwrap();
    let observer = Interrupt::default();
    observed(1 << 20, &model, &cut, Method::Gptq, &observer).unwrap();
    assert!(bytes(&cut) == bytes(&whole), "two models are mixed");
    let notes = observer.notes.lock().unwrap().join("\n");
    assert!(notes.contains("tiny-model") && notes.contains("starting over"), "{notes}");
}

/// A tensor that was compensated and is not there is not rounded to nearest in its stead.
#[test]
fn a_missing_tensor_is_named_when_the_model_is_written() {
    let parent = tempfile::tempdir().unwrap();
    let model = tiny::checkpoint(parent.path(), tiny::Naming::Published, 1);
    calibrate(&model, parent.path(), Method::Gptq, None).unwrap();
    let found = FoundModel::find(model.to_str().unwrap(), None, &Hub::from_env(true), &Silent).unwrap();
    let pair = found.pair().unwrap();
    let compensation = Compensation {
        settings: CompensationSettings::GPTQ,
        types: types(&pair),
        store: Store::new(parent.path().join("store")),
    };
    for (name, &ty) in &compensation.types {
        let has = compensation.encode(name, &[], ty).unwrap().is_some();
        assert_eq!(has, ty != GgmlType::TQ2_0, "{name}");
    }
    let name = "blk.1.attn_q.weight";
    std::fs::remove_file(parent.path().join("store").join(format!("{name}.mbq3"))).unwrap();
    let error = compensation.encode(name, &[], GgmlType::MBQ3).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("is missing"), "{error}");
    assert!(compensation.encode("output_norm.weight", &[], GgmlType::F32).unwrap().is_none());
}

/// One byte of memory, so that every stream waits in the file, and more than enough: the same to the last bit.
#[test]
fn memory_changes_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let model = tiny::checkpoint(parent.path(), tiny::Naming::Published, 1);
    let run = |memory: usize| {
        let work = parent.path().join(memory.to_string());
        std::fs::create_dir_all(&work).unwrap();
        (format!("{:?}", observed(memory, &model, &work, Method::Mbq, &Silent).unwrap()), bytes(&work))
    };
    assert!(run(1) == run(1 << 40));
}

/// A weight, a bias, a norm's gain that is not a number: refused with its name, whatever the method.
#[test]
fn weights_that_are_not_finite_are_named() {
    let names = ["mlp.up_proj.weight", "self_attn.k_proj.bias", "post_attention_layernorm.weight"];
    for (i, (name, value)) in names.into_iter().zip([f32::NAN, f32::INFINITY, f32::NEG_INFINITY]).enumerate() {
        let name = format!("language_model.model.layers.1.{name}");
        let parent = tempfile::tempdir().unwrap();
        let mut tensors = tiny::tensors();
        tensors.get_mut(&name).unwrap().1[i + 3] = value;
        let model = tiny::checkpoint_with(parent.path(), tiny::Naming::Published, 1, tensors);
        for method in [Method::Gptq, Method::Mbq] {
            let error = calibrate(&model, &parent.path().join("work"), method, None).unwrap_err();
            assert!(error.contains(&name) && error.contains(&(i + 3).to_string()), "{error}");
        }
    }
}

//! Compensation of a whole made-up model: interrupted and resumed it comes to the same bytes.
mod tiny;

use candle_core::{Device, Tensor};
use mbq_convert::calibrate::batch::{Kind, Sample};
use mbq_convert::calibrate::compensate::{Compensation, Settings, Store, Vision};
use mbq_convert::calibrate::grid::{Activations, Asymmetric};
use mbq_convert::calibrate::importance::Weighting;
use mbq_convert::calibrate::mbq::Loss;
use mbq_convert::calibrate::{Method, Model, Options, Outcome, run};
use mbq_convert::checkpoint::Checkpoint;
use mbq_convert::events::{Event, Observer};
use mbq_convert::ggml::GgmlType;
use mbq_convert::gguf::TypeChoice;
use mbq_convert::gguf::plan::text;
use mbq_convert::model::llava_onevision::LlavaOnevision;
use std::collections::BTreeMap;
use std::path::Path;

/// Three samples of 20 vision tokens and 10 of text.
fn samples() -> Vec<Sample> {
    let sample = |seed: u64| {
        let embeds = Tensor::from_vec(tiny::values(30 * tiny::HIDDEN, seed), (30, tiny::HIDDEN), &Device::Cpu).unwrap();
        let kinds = (0..30).map(|i| [Kind::Other, Kind::Vision, Kind::Vision, Kind::Answer][(i + 7) / 10]).collect();
        Sample::new(embeds, kinds, (0..30).map(|i| (i * 7 % tiny::VOCAB) as u32).collect())
    };
    (1..4).map(sample).collect()
}

/// Panics once `block` is finished.
struct Interrupt(Option<&'static str>);

impl Observer for Interrupt {
    fn event(&self, event: Event) {
        if let Event::Advance { detail, .. } = event {
            assert!(Some(detail.as_str()) != self.0, "interrupted");
        }
    }
}

/// Every third linear is of a type without feedback, `v` of other blocks than the rest.
fn types(model: &LlavaOnevision) -> BTreeMap<String, GgmlType> {
    let choice = TypeChoice::of("mbq3".parse().unwrap());
    let linears = text(&model.text, &choice).into_iter().filter(|t| t.is_decoder_linear);
    let ty = |name: &str| match name {
        n if n.contains("v_proj") => GgmlType::Q4_0,
        n if n.contains("up_proj") => GgmlType::Q3_K,
        _ => GgmlType::MBQ3,
    };
    linears.map(|t| (t.source.clone(), ty(&t.source))).collect()
}

fn calibrate(model: &Path, work: &Path, method: Method, stop: Option<&'static str>) -> Result<Outcome, String> {
    within(1 << 20, model, work, method, stop)
}

/// [`calibrate`] with so many bytes of memory.
fn within(
    memory: usize,
    model: &Path,
    work: &Path,
    method: Method,
    stop: Option<&'static str>,
) -> Result<Outcome, String> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let config = LlavaOnevision::read(&checkpoint).unwrap();
    let model = Model::new(&checkpoint, &config.text, 64, Device::Cpu).unwrap();
    let settings = Settings {
        vision: if method == Method::Mbq { Vision::Ratio } else { Vision::Fixed(0.5) },
        damping: 0.01,
        order: method == Method::Mbq,
        search_levels: true,
        target: 1.0,
        residual: true,
    };
    let store = Store::new(work.join("store"));
    let compensation = Compensation { settings, types: types(&config), store };
    let options = Options {
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
        progress: Some((work.join("progress.json"), "job".into())),
    };
    run(&model, &samples(), &options, &Interrupt(stop)).map_err(|e| e.to_string())
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
        let name = "language_model.model.layers.0.self_attn.q_proj.weight.mbq3";
        std::fs::write(cut.join("store").join(name), [0; 52]).unwrap();
        let error = calibrate(&model, &cut, method, None).unwrap_err();
        assert!(error.contains(name) && error.contains("another size"), "{error}");
        std::fs::remove_file(cut.join("store").join(name)).unwrap();
        let error = calibrate(&model, &cut, method, None).unwrap_err();
        assert!(error.contains(name) && error.contains("is missing"), "{error}");
    }
}

/// One byte of memory, so that every stream waits in the file, and more than enough: the same to the last bit.
#[test]
fn memory_changes_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let model = tiny::checkpoint(parent.path(), tiny::Naming::Published, 1);
    let run = |memory: usize| {
        let work = parent.path().join(memory.to_string());
        std::fs::create_dir_all(&work).unwrap();
        (format!("{:?}", within(memory, &model, &work, Method::Mbq, None).unwrap()), bytes(&work))
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

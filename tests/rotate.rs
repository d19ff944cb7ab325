//! A rotated checkpoint computes the same, picture and text.
use candle_core::{Device, Tensor};
use mbq_convert::calibrate::Model;
use mbq_convert::calibrate::pairs::Conversation;
use mbq_convert::checkpoint::Checkpoint;
use mbq_convert::events::{Event, Observer};
use mbq_convert::image::load_rgb;
use mbq_convert::model::llava_onevision::{Embedder, LlavaOnevision};
use mbq_convert::rotate::rotate;
use mbq_convert::text::Span;
use std::path::Path;

struct Silent;

impl Observer for Silent {
    fn event(&self, _: Event) {}
}

/// Log-probabilities after every token of a question about a picture, by our own decoder in f32.
fn log_probabilities(dir: &Path) -> Tensor {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let picture = demo.join("pictures/red-star.png");
    let checkpoint = Checkpoint::open(dir).unwrap();
    let config = LlavaOnevision::read(&checkpoint).unwrap();
    let embedder = Embedder::load(&config, &checkpoint, &Device::Cpu).unwrap();
    let rgb = load_rgb(&picture).unwrap();
    let messages = Conversation::single("What is in the picture?", "a red star", true);
    let sample = embedder.sample("red star", &messages, &[rgb], 4096).unwrap();
    let model = Model::new(&checkpoint, &config.text, sample.real, Device::Cpu).unwrap();
    let span = [Span::new(0, sample.real)];
    let mut x = sample.embeds;
    for layer in 0..config.text.num_layers {
        x = model.block(layer).unwrap().forward(&x, &span).unwrap();
    }
    model.head().unwrap().log_probabilities(&x).unwrap()
}

#[test]
fn computes_the_same() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("rotated");
    rotate(&Checkpoint::open(&model).unwrap(), &out, 1, &Silent).unwrap();
    let (plain, rotated) = (log_probabilities(&model), log_probabilities(&out));
    let largest = (plain - rotated).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    // Weights are rounded to f32 once more (6e-8), through 4 blocks and a head, at log-probabilities of up to 30; one tensor
    // left as it was changes them by more than 1.
    assert!(largest < 1e-3, "{largest}");

    let checkpoint = Checkpoint::open(&out).unwrap();
    let before = Checkpoint::open(&model).unwrap();
    let norm = "language_model.model.layers.0.input_layernorm.weight";
    let gains = |c: &Checkpoint| c.f32(norm, c.tensor(norm).unwrap().shape).unwrap();
    assert!(gains(&checkpoint).iter().all(|&g| g == 1.0) && gains(&before).iter().any(|&g| g != 1.0));
    let down = "language_model.model.layers.1.mlp.down_proj.weight";
    let values = |c: &Checkpoint| c.f32(down, c.tensor(down).unwrap().shape).unwrap();
    assert!(values(&checkpoint) != values(&before), "nothing was rotated");

    // It is not written over.
    let error = rotate(&before, &out, 1, &Silent).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something was left beside");
}

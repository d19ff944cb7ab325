//! A converted pair against what transformers makes of the same checkpoint (`tests/reference/*_goldens.py`).
#![allow(dead_code)] // Each test crate uses its own part.
use super::root;
use mbq_convert::gguf::GgufFile;
use mbq_convert::image::Rgb;
use mbq_convert::runtime::engine::{Compute, Decoder, Model, Piece, Runtime, Vision};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

pub const COMPUTE: Compute = Compute { threads: 2, gpu_layers: 0, batch: 512, exact: true };

/// A golden file, below tests/golden/.
pub fn goldens(file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(root().join("tests/golden").join(file)).unwrap()).unwrap()
}

/// Shape, in torch's order, and values of an f32 tensor.
pub fn f32s(file: &GgufFile, name: &str) -> (Vec<usize>, Vec<f32>) {
    let t = file.tensors.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("{name} is missing"));
    let data = file.data(t).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    (t.shape.iter().rev().copied().collect(), data.collect())
}

/// `pixels` of tests/reference/qwen_vl_goldens.py.
pub fn picture(width: usize, height: usize) -> Rgb {
    let mut picture = Rgb::black(width, height);
    for (i, value) in picture.data.iter_mut().enumerate() {
        let (x, y, c) = (i / 3 % width, i / 3 / width, i % 3);
        *value = ((7 * x + 13 * y + 50 * c + x * y / 9) % 256) as u8;
    }
    picture
}

/// Both files, loaded.
pub fn load(runtime: &Arc<Runtime>, file: &Path, mmproj: &Path) -> Vision {
    Vision::load(Model::load(runtime, file, COMPUTE, false).unwrap(), mmproj, COMPUTE).unwrap()
}

/// Token ids, `of_picture` for those of a picture, and the pictures' embeddings.
pub fn flattened(pieces: &[Piece], of_picture: i32) -> (Vec<i32>, Vec<f64>) {
    let (mut ids, mut embedding) = (Vec::new(), Vec::new());
    for piece in pieces {
        match piece {
            Piece::Text(tokens) => ids.extend(tokens),
            Piece::Media(media) => {
                ids.extend(vec![of_picture; media.tokens]);
                embedding.extend(media.embedding.iter().map(|v| f64::from(*v)));
            }
        }
    }
    (ids, embedding)
}

/// How far the runtime may be from transformers.
pub struct Bounds {
    /// Relative L2 of the pictures' embeddings.
    pub embedding: f64,
    /// Divergence of the next token's distribution, nats.
    pub kl: f64,
}

/// The embeddings in `pieces`, and what follows the prompt with them, are those of `golden`, within `bounds`.
pub fn agrees(
    runtime: &Arc<Runtime>,
    file: &Path,
    vision: &Vision,
    pieces: &[Piece],
    (name, golden): (&str, &Value),
    bounds: Bounds,
) {
    let numbers = |v: &Value| -> Vec<f64> { v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect() };
    let (_, embedding) = flattened(pieces, 0);
    let want = numbers(&golden["embedding"]);
    assert_eq!(embedding.len(), want.len(), "{name}");
    let square = |v: f64| v * v;
    let error: f64 = embedding.iter().zip(&want).map(|(got, want)| square(got - want)).sum();
    let error = (error / want.iter().map(|w| square(*w)).sum::<f64>()).sqrt();
    let mut decoder = Decoder::load(runtime, file, COMPUTE, 512, Some(vision)).unwrap();
    decoder.prefill(pieces).unwrap();
    let mut logits = Vec::new();
    decoder.score(&[&[0]], |_, _, row| logits = row.iter().map(|v| f64::from(*v)).collect()).unwrap();
    let max = logits.iter().copied().fold(f64::MIN, f64::max);
    let total = max + logits.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
    let want = numbers(&golden["logprobs"]);
    let kl: f64 = want.iter().zip(&logits).map(|(p, q)| p.exp() * (p - (q - total))).sum();
    eprintln!("{name}: embeddings {error:.1e}, divergence {kl:.1e}");
    assert!(error < bounds.embedding, "{name}: embeddings differ by {error:.1e}");
    assert!(kl.abs() < bounds.kl, "{name}: divergence {kl:.1e}");
}

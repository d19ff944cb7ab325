//! Sequences of one context: what one computes does not depend on what others do beside it.
mod common;

use common::served::demo;
use mbq_convert::image;
use mbq_convert::runtime;
use mbq_convert::runtime::engine::{BatchEntry, Compute, Decoder, Model, Runtime, Sequences, Vision};
use std::path::{Path, PathBuf};

const PROMPT: usize = 40;
const STEPS: usize = 30;
const COUNT: i32 = 4;

fn token(sequence: i32, at: usize) -> i32 {
    3 + (sequence * 131 + at as i32 * 37) % 500
}

fn open(path: &Path) -> Sequences {
    let runtime = Runtime::open(&common::runtime_dir().unwrap()).unwrap();
    let compute = Compute { threads: 1, gpu_layers: 0, batch: 512, exact: false };
    let model = Model::load(&runtime, path, compute, true).unwrap();
    Sequences::apart(model, compute, 1024, COUNT as u32).unwrap()
}

fn read_prompt(sequences: &mut Sequences, sequence: i32) {
    let entry = |at| BatchEntry { token: token(sequence, at), position: at as i32, sequence, output: false };
    sequences.decode(&(0..PROMPT).map(entry).collect::<Vec<_>>(), |_, _| {}).unwrap();
}

fn next(sequence: i32, step: usize) -> BatchEntry {
    let at = PROMPT + step;
    BatchEntry { token: token(sequence, at), position: at as i32, sequence, output: true }
}

/// Logits of every step of every sequence, which are alone in their context.
fn alone(path: &Path) -> Vec<Vec<Vec<f32>>> {
    let one = |sequence| {
        let mut sequences = open(path);
        read_prompt(&mut sequences, sequence);
        let mut rows = Vec::new();
        (0..STEPS).for_each(|s| sequences.decode(&[next(sequence, s)], |_, row| rows.push(row.to_vec())).unwrap());
        rows
    };
    (0..COUNT).map(one).collect()
}

/// The same, all in one context and one batch.
fn together(path: &Path) -> Vec<Vec<Vec<f32>>> {
    let mut sequences = open(path);
    (0..COUNT).for_each(|s| read_prompt(&mut sequences, s));
    let mut rows = vec![Vec::new(); COUNT as usize];
    for step in 0..STEPS {
        let batch: Vec<_> = (0..COUNT).map(|s| next(s, step)).collect();
        sequences.decode(&batch, |i, row| rows[i].push(row.to_vec())).unwrap();
    }
    rows
}

/// `MBQ_MODEL` names another model, of which only the difference is told.
#[test]
fn others_do_not_change_a_sequence() {
    let Some(demo) = demo() else { return };
    let chosen = std::env::var_os("MBQ_MODEL");
    let path = chosen.as_deref().map_or(demo, Path::new);
    let (alone, together) = (alone(path), together(path));
    let mut most = 0f32;
    for (a, b) in alone.iter().flatten().zip(together.iter().flatten()) {
        most = a.iter().zip(b).fold(most, |most, (a, b)| most.max((a - b).abs()));
    }
    eprintln!("{}: logits differ by {most} at most", path.display());
    assert!(alone[0] != alone[1], "the sequences are different ones");
    assert!(chosen.is_some() || most < 1e-3, "{most}");
}

/// Questions about one picture that are answered together, sharing it, are answered as each alone. `MBQ_MODEL`, `MBQ_MMPROJ` and
/// `MBQ_PICTURES` (a folder) name others, of which only the number of differences is told.
#[test]
fn questions_about_one_picture_are_answered_together() {
    let Some(demo) = demo() else { return };
    let named = |name| std::env::var_os(name).map(PathBuf::from);
    let chosen = named("MBQ_MODEL");
    let model = chosen.clone().unwrap_or(demo.into());
    let mmproj = named("MBQ_MMPROJ").unwrap_or_else(|| runtime::find_mmproj(&model).unwrap());
    let pictures = named("MBQ_PICTURES").unwrap_or_else(|| common::root().join("demo/calib/images"));
    let runtime = Runtime::open(&common::runtime_dir().unwrap()).unwrap();
    // Sums in one order, whatever else is in the batch: kernels for many columns add up otherwise.
    let compute = Compute { threads: 1, gpu_layers: 0, batch: 512, exact: true };
    let vision = Vision::load(Model::load(&runtime, &model, compute, false).unwrap(), &mmproj, compute).unwrap();
    let mut decoder = Decoder::load_for(QUESTIONS.len(), &runtime, &model, compute, 2048, Some(&vision)).unwrap();
    let (mut answers, mut differ) = (0, 0);
    let mut files: Vec<_> = std::fs::read_dir(pictures).unwrap().map(|f| f.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "png"));
    files.sort();
    for file in files.iter().take(12) {
        let picture = image::load::load_rgb(file).unwrap();
        let prompt = |question: &&str| {
            let text = format!("<|im_start|>user\n<__media__>\n{question}<|im_end|>\n<|im_start|>assistant\n");
            let chunks = vision.tokenize(&text, file, std::slice::from_ref(&picture)).unwrap();
            (chunks.pieces(true).unwrap(), 12)
        };
        let prompts: Vec<_> = QUESTIONS.iter().map(prompt).collect();
        let together = decoder.answer(&prompts).unwrap();
        for ((pieces, limit), together) in prompts.iter().zip(&together) {
            decoder.prefill(pieces).unwrap();
            let alone = decoder.generate(&[], *limit).unwrap();
            differ += usize::from(alone != *together);
            answers += 1;
        }
    }
    eprintln!("{}: {differ} of {answers} answers differ", model.display());
    assert!(answers == 60 && (chosen.is_some() || differ == 0), "{differ} of {answers}");
}

const QUESTIONS: [&str; 5] = [
    "What is in the picture?",
    "What color is the background?",
    "Where?",
    "How many things are there in it?",
    "Describe it.",
];

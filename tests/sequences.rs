//! Sequences of one context: what one computes does not depend on what others do beside it.
mod common;

use common::served::demo;
use mbq_convert::runtime::engine::{BatchEntry, Compute, Model, Runtime, Sequences};
use std::path::Path;

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

//! Where a file's types lose what: per kind of linear the relative squared error of its weights, each input channel
//! weighed by the mean square of its activations (an importance matrix), mean over the blocks.
//!
//! ```text
//! cargo run --release --example tensor_errors -- f16.gguf imatrix.gguf q3_k.gguf mbq3.gguf ...
//! ```
//!
//! Columns: `weighted`: sum_j E[x_j^2] (w - v)^2 / sum_j E[x_j^2] w^2 over the rows; `plain`: the same with every
//! channel alike; `top`: `weighted` over the 1 % of channels with the largest E[x^2] alone; `share`: these channels'
//! part of the error. The files must hold the reference's own weights: scales that were folded in would be counted
//! as errors.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use mbq_convert::ggml::dequantize;
use mbq_convert::gguf::GgufFile;

#[derive(Parser)]
struct Args {
    /// The model in f16 or f32
    reference: PathBuf,
    /// Importance matrix, of `mbq-convert imatrix` or llama-imatrix
    imatrix: PathBuf,
    /// The same model in other types
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

const KINDS: [&str; 7] = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// A GGUF file whose tensors are read one by one.
struct Tensors(GgufFile);

impl Tensors {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self(GgufFile::open(path)?))
    }

    fn read(&self, name: &str) -> Result<Vec<f32>> {
        let found = self.0.tensor(name);
        let info = found.with_context(|| format!("{}: no tensor {name}", self.0.path.display()))?;
        let ty = info.ty().with_context(|| format!("{name}: type {} is not known", info.type_id))?;
        Ok(dequantize(ty, self.0.data(info))?)
    }

    /// Mean of x^2 per input channel of a linear.
    fn mean_squares(&self, linear: &str) -> Result<Vec<f64>> {
        let count = f64::from(self.read(&format!("{linear}.counts"))?[0]);
        Ok(self.read(&format!("{linear}.in_sum2"))?.into_iter().map(|s| f64::from(s) / count).collect())
    }
}

/// The four numbers of the table for one linear.
fn errors(reference: &[f32], other: &[f32], importance: &[f64]) -> [f64; 4] {
    let channels = importance.len();
    let (mut lost, mut had) = (vec![0f64; channels], vec![0f64; channels]);
    for (row, near) in reference.chunks_exact(channels).zip(other.chunks_exact(channels)) {
        for (j, (w, v)) in row.iter().zip(near).enumerate() {
            lost[j] += f64::from(w - v).powi(2);
            had[j] += f64::from(*w).powi(2);
        }
    }
    let mut order: Vec<usize> = (0..channels).collect();
    order.sort_by(|a, b| importance[*b].total_cmp(&importance[*a]));
    let top = &order[..channels.div_ceil(100)];
    let weigh = |values: &[f64], over: &[usize]| over.iter().map(|j| importance[*j] * values[*j]).sum::<f64>();
    let all = weigh(&lost, &order);
    [
        all / weigh(&had, &order),
        lost.iter().sum::<f64>() / had.iter().sum::<f64>(),
        weigh(&lost, top) / weigh(&had, top),
        weigh(&lost, top) / all,
    ]
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (reference, imatrix) = (Tensors::open(&args.reference)?, Tensors::open(&args.imatrix)?);
    let layers = (0..).take_while(|l| reference.0.tensor(&format!("blk.{l}.attn_q.weight")).is_some()).count();
    ensure!(layers > 0, "{}: no tensor blk.0.attn_q.weight", args.reference.display());
    for path in &args.files {
        let file = Tensors::open(path)?;
        println!("{}", path.display());
        println!("  {:12} {:>9} {:>9} {:>9} {:>9}", "", "weighted", "plain", "top", "share");
        for kind in KINDS {
            let mut sums = [0f64; 4];
            for layer in 0..layers {
                let name = format!("blk.{layer}.{kind}.weight");
                let (w, v) = (reference.read(&name)?, file.read(&name)?);
                let importance = imatrix.mean_squares(&name)?;
                ensure!(w.len() == v.len() && w.len() % importance.len() == 0, "{name}: other shapes");
                for (sum, value) in sums.iter_mut().zip(errors(&w, &v, &importance)) {
                    *sum += value / layers as f64;
                }
            }
            let [weighted, plain, top, share] = sums;
            println!("  {kind:12} {weighted:9.5} {plain:9.5} {top:9.5} {share:9.3}");
        }
    }
    Ok(())
}

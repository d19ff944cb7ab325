//! SmoothQuant (arXiv 2211.10438): s = absmax(x)^alpha / absmax(W)^(1 - alpha), no search.
use super::mbq::Group;
use super::pass::Pass;
use crate::text::Block;
use crate::text::ops::column_max;
use candle_core::Result;

/// Scales of the two groups that follow a norm. `pass` has kept maxima.
pub fn block(block: &Block, pass: &Pass, alpha: f32) -> Result<Vec<(Group, Vec<f32>)>> {
    let mut out = Vec::new();
    for group in [Group::Qkv, Group::GateUp] {
        let mut weights: Vec<f32> = Vec::new();
        for &name in group.linears() {
            let part = column_max(&block.linear(name).weight)?;
            weights.resize(part.len(), 0.0);
            weights.iter_mut().zip(part).for_each(|(a, b)| *a = a.max(b));
        }
        let act = pass.maxima(group).iter();
        let scales = act.zip(weights).map(|(a, w)| (a.powf(alpha) / w.max(1e-5).powf(1.0 - alpha)).max(1e-5));
        out.push((group, scales.collect()));
    }
    Ok(out)
}

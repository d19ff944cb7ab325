//! SmoothQuant (arXiv 2211.10438): s = absmax(x)^alpha / absmax(W)^(1 - alpha), no search.
use super::mbq::Group;
use crate::model::decoder::{Block, Trace};
use crate::model::ops::column_abs;
use candle_core::Result;

/// Scales of the two groups that follow a norm.
pub fn block(block: &Block, traces: &[Trace], alpha: f32) -> Result<Vec<(Group, Vec<f32>)>> {
    let mut out = Vec::new();
    for group in [Group::Qkv, Group::GateUp] {
        let inputs = traces.iter().map(|t| if group == Group::Qkv { &t.attn_in } else { &t.mlp_in });
        let act = column_max(inputs)?;
        let weights = column_max(group.linears().iter().map(|&n| &block.linear(n).weight))?;
        let scales = act.iter().zip(weights).map(|(a, w)| (a.powf(alpha) / w.max(1e-5).powf(1.0 - alpha)).max(1e-5));
        out.push((group, scales.collect()));
    }
    Ok(out)
}

/// Largest |x| of each column over several matrices.
pub(super) fn column_max<'a>(xs: impl Iterator<Item = &'a candle_core::Tensor>) -> Result<Vec<f32>> {
    let mut max: Vec<f32> = Vec::new();
    for x in xs {
        let (_, part) = column_abs(x)?;
        max.resize(part.len(), 0.0);
        max.iter_mut().zip(part).for_each(|(a, b)| *a = a.max(b));
    }
    Ok(max)
}

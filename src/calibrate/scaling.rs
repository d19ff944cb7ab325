//! Scales of a group of linears, put where they belong: into a block, to try them, and into the folds that the writer
//! applies tensor by tensor.
use crate::quant::fold::Folds;
use crate::text::{Block, Group, LinearName, Producer, in_block};
use candle_core::{Result, Tensor};

/// Where several query heads read one value head: the mean of x_max over them, for each of them.
pub(super) fn share(block: &Block, x_max: &[f32]) -> Result<Vec<f32>> {
    let (repeats, dim) = block.head_shape();
    let mut out = x_max.to_vec();
    for part in out.chunks_mut(repeats * dim) {
        for j in 0..dim {
            let mean = (0..repeats).map(|r| part[r * dim + j]).sum::<f32>() / repeats as f32;
            (0..repeats).for_each(|r| part[r * dim + j] = mean);
        }
    }
    Ok(out)
}

/// o's input scales, as v's outputs take them.
fn unshare(scales: &[f32], repeats: usize, dim: usize) -> Vec<f32> {
    scales.chunks(repeats * dim).flat_map(|part| part[..dim].to_vec()).collect()
}

/// Folds a group's scales into the block: what produces x is divided, the group's columns are multiplied.
pub fn apply(block: &mut Block, group: Group, scales: &[f32]) -> Result<()> {
    let device = block.norm1.device().clone();
    let s = Tensor::from_slice(scales, scales.len(), &device)?;
    for &name in group.linears() {
        let weight = block.linear(name).weight.broadcast_mul(&s)?;
        block.linear_mut(name).weight = weight;
    }
    let producer = match group.producer() {
        Producer::AttnNorm => {
            block.norm1 = (&block.norm1 / &s)?;
            return Ok(());
        }
        Producer::MlpNorm => {
            block.norm2 = (&block.norm2 / &s)?;
            return Ok(());
        }
        Producer::Linear(name) => name,
    };
    let s = if producer == LinearName::V {
        let (repeats, dim) = block.head_shape();
        let s = unshare(scales, repeats, dim);
        Tensor::from_slice(&s, s.len(), &device)?
    } else {
        s
    };
    let linear = block.linear_mut(producer);
    linear.weight = linear.weight.broadcast_div(&s.unsqueeze(1)?)?;
    if let Some(bias) = &linear.bias {
        linear.bias = Some((bias / &s)?);
    }
    Ok(())
}

/// Writes a group's scales down as folds of the tensors they change.
pub(super) fn fold(folds: &mut Folds, layer: usize, block: &Block, group: Group, scales: Vec<f32>) {
    let mut divide = |tensor: String, s: &[f32]| {
        folds.entry(tensor).or_default().divide_rows = Some(s.to_vec());
    };
    match group.producer() {
        Producer::AttnNorm => divide(in_block(layer, "attn_norm.weight"), &scales),
        Producer::MlpNorm => divide(in_block(layer, "ffn_norm.weight"), &scales),
        Producer::Linear(producer) => {
            let s = if producer == LinearName::V {
                let (repeats, dim) = block.head_shape();
                unshare(&scales, repeats, dim)
            } else {
                scales.clone()
            };
            divide(producer.weight(layer), &s);
            if block.linear(producer).bias.is_some() {
                divide(producer.bias(layer), &s);
            }
        }
    }
    for name in group.linears() {
        folds.entry(name.weight(layer)).or_default().multiply_cols = Some(scales.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::fold::Fold;
    use crate::text::tests::golden;
    use candle_core::Tensor;

    fn relative(got: &Tensor, want: &Tensor) -> f32 {
        let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        norm(&(got - want).unwrap()) / norm(want)
    }

    fn folded(t: &Tensor, fold: Option<&Fold>) -> Tensor {
        let vector = |v: &[f32]| Tensor::from_slice(v, v.len(), t.device()).unwrap();
        let mut t = t.clone();
        if let Some(rows) = fold.and_then(|f| f.divide_rows.as_deref()) {
            let by = vector(rows);
            let by = if t.rank() == 2 { by.unsqueeze(1).unwrap() } else { by };
            t = t.broadcast_div(&by).unwrap();
        }
        if let Some(cols) = fold.and_then(|f| f.multiply_cols.as_deref()) {
            t = t.broadcast_mul(&vector(cols)).unwrap();
        }
        t
    }

    /// Scales of all four groups, under grouped queries and with biases: the block's output stays what it was, whether the
    /// search applies them or the writer's folds; and nothing outside the block is touched, so that an output head that
    /// shares the embedding's weights stays what it was too.
    #[test]
    fn folding_changes_nothing_in_full_precision() {
        let (golden, block, spans) = golden();
        let x = crate::text::tests::tensor(&golden["x"], &[8, 12]);
        let want = block.forward(&x, &spans).unwrap();
        let scale = |i: usize| [0.25f32, 3.0, 0.9, 1.7, 12.0][i % 5];
        let (mut scaled, mut folds) = (block.clone(), Folds::new());
        for group in Group::ALL {
            let n = block.linear(group.linears()[0]).weight.dim(1).unwrap();
            let scales: Vec<f32> = match group {
                // Two query heads of width 4 read one value head.
                Group::O => (0..n).map(|i| scale(i / 8 * 4 + i % 4)).collect(),
                _ => (0..n).map(scale).collect(),
            };
            apply(&mut scaled, group, &scales).unwrap();
            fold(&mut folds, 3, &block, group, scales);
        }
        // f32 through about ten products: 1e-7 was seen.
        let off = relative(&scaled.forward(&x, &spans).unwrap(), &want);
        assert!(off < 1e-5, "{off}");

        let of = |name: String| folds.get(&name);
        let mut written = block.clone();
        written.norm1 = folded(&block.norm1, of(in_block(3, "attn_norm.weight")));
        written.norm2 = folded(&block.norm2, of(in_block(3, "ffn_norm.weight")));
        for name in LinearName::ALL {
            let linear = written.linear_mut(name);
            linear.weight = folded(&linear.weight, of(name.weight(3)));
            linear.bias = linear.bias.as_ref().map(|b| folded(b, of(name.bias(3))));
        }
        let off = relative(&written.forward(&x, &spans).unwrap(), &want);
        assert!(off < 1e-5, "{off}");
        assert!(folds.keys().all(|name| name.starts_with("blk.3.")), "{:?}", folds.keys());
        // norm1, norm2, seven weights, v's bias.
        assert_eq!(folds.len(), 10);
    }
}

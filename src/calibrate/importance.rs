//! The importance matrix: per input channel of a linear the mean of x^2, by which ggml's quantisers weigh errors.
//! Counted over vision and answer tokens; with balance, a vision token counts r times an answer token, as in
//! [`super::mbq`].
use super::CalibrateError;
use super::batch::{Batch, Chunk, Kind};
use super::mbq::Ratios;
use crate::Error;
use crate::ggml::GgmlType;
use crate::gguf::plan::Planned;
use crate::gguf::{Array, GgufError, GgufFile, Header, Output};
use crate::quant::fold::Folds;
use crate::text::{Group, Trace};
use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// How tokens count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weighting {
    /// Vision and answer tokens alike.
    Image,
    /// Vision tokens by their layer's ratio r.
    Balanced,
}

/// The importance of channels that no token reached, in parts of the mean: too little to be felt beside others.
const DEAD: f64 = 1e-6;

/// Weighted sums of x^2 per channel.
#[derive(Debug, Clone, Default)]
struct Sums {
    squares: Vec<f64>,
    weight: f64,
}

impl Sums {
    /// Says in words why nothing can be weighed by these.
    fn check(&self) -> std::result::Result<(), String> {
        if let Some(channel) = self.squares.iter().position(|v| !v.is_finite() || *v < 0.0) {
            return Err(format!("channel {channel} is {}, negative or not finite", self.squares[channel]));
        }
        match self.squares.iter().all(|v| *v == 0.0) {
            true => Err("all are 0".into()),
            false => Ok(()),
        }
    }
}

/// The importance of every linear's input channels, by the weight's name.
#[derive(Debug, Clone, Default)]
pub struct Importance {
    sums: BTreeMap<String, Sums>,
    samples: usize,
    longest: usize,
    /// Vision and answer tokens.
    tokens: usize,
}

impl Importance {
    pub fn new(batch: &Batch) -> Self {
        let tokens = batch.vision + batch.answer;
        Importance { sums: BTreeMap::new(), samples: batch.samples, longest: batch.longest, tokens }
    }

    /// Adds a chunk's full-precision pass through a layer. `ratios` as for [`Weighting::Balanced`].
    pub fn add(&mut self, layer: usize, chunk: &Chunk, t: &Trace, ratios: Option<Ratios>) -> Result<()> {
        let inputs = Group::ALL.map(|group| (t.input(group), ratios.map(|r| group.ratio(r)), group.linears()));
        for (x, ratio, names) in inputs {
            let weights: Vec<f32> = chunk
                .kinds
                .iter()
                .map(|kind| match kind {
                    Kind::Answer => 1.0,
                    Kind::Vision => ratio.unwrap_or(1.0) as f32,
                    Kind::Other => 0.0,
                })
                .collect();
            let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
            let row = Tensor::from_vec(weights, (1, chunk.tokens()), x.device())?;
            let squares: Vec<f32> = row.matmul(&x.sqr()?)?.flatten_all()?.to_vec1()?;
            for name in names {
                let sums = self.sums.entry(name.weight(layer)).or_default();
                sums.squares.resize(squares.len(), 0.0);
                sums.squares.iter_mut().zip(&squares).for_each(|(s, &q)| *s += f64::from(q));
                sums.weight += total;
            }
        }
        Ok(())
    }

    /// The mean of x^2 per channel, of every linear's input. A channel that was 0 on all tokens gets `DEAD` of the
    /// channels' mean: ggml's quantisers store zeros for blocks that nothing weighs, whatever the weights are.
    pub fn means(&self) -> BTreeMap<String, Vec<f32>> {
        let mean = |s: &Sums| {
            let least = DEAD * s.squares.iter().sum::<f64>() / s.squares.len() as f64;
            s.squares.iter().map(|&q| (if q == 0.0 { least } else { q } / s.weight) as f32).collect()
        };
        self.sums.iter().map(|(name, sums)| (name.clone(), mean(sums))).collect()
    }

    /// The same for the weights as folded: where columns are multiplied by s, their input is divided by it.
    pub fn folded(&self, folds: &Folds) -> BTreeMap<String, Vec<f32>> {
        let mut means = self.means();
        for (name, mean) in &mut means {
            if let Some(scales) = folds.get(name).and_then(|f| f.multiply_cols.as_ref()) {
                mean.iter_mut().zip(scales).for_each(|(m, s)| *m /= s * s);
            }
        }
        means
    }

    /// Checks that every linear has an importance to go by.
    ///
    /// # Errors
    /// A linear's inputs were 0 on all tokens, or not finite.
    pub fn check(&self) -> std::result::Result<(), Error> {
        for (name, sums) in &self.sums {
            sums.check().map_err(|problem| CalibrateError::Importance { tensor: name.clone(), problem })?;
        }
        Ok(())
    }

    /// Reads a file that llama-imatrix or [`Importance::write`] wrote.
    ///
    /// # Errors
    /// Not such a file, a linear's row is missing or of another length, or its sums are all 0, negative or not finite.
    pub fn read(path: &Path, linears: &[Planned]) -> std::result::Result<Self, Error> {
        let fail = |problem: String| Error::from(CalibrateError::File { path: path.into(), problem });
        let file = GgufFile::open(path).map_err(GgufError::from)?;
        let values = |name: String, want: usize| -> std::result::Result<Vec<f64>, Error> {
            let info = file
                .tensor(&name)
                .ok_or_else(|| fail(format!("no tensor `{name}`: is it an importance matrix of this model?")))?;
            if info.ty() != Some(GgmlType::F32) || info.elements() != want {
                return Err(fail(format!("tensor `{name}`: expected {want} values in f32")));
            }
            let values =
                file.data(info).chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
            Ok(values.collect())
        };
        let mut this = Importance::default();
        for tensor in linears {
            let squares = values(format!("{}.in_sum2", tensor.name), tensor.row())?;
            let weight = values(format!("{}.counts", tensor.name), 1)?[0];
            if !(weight.is_finite() && weight > 0.0) {
                return Err(fail(format!("tensor `{}.counts`: {weight} tokens were counted", tensor.name)));
            }
            let sums = Sums { squares, weight };
            let gather = "gather the matrix again, with more text or pictures";
            sums.check().map_err(|problem| fail(format!("tensor `{}.in_sum2`: {problem}; {gather}", tensor.name)))?;
            this.sums.insert(tensor.name.clone(), sums);
        }
        Ok(this)
    }

    /// Writes the file that llama-quantize's `--imatrix` takes (llama.cpp, common/imatrix-loader.cpp): per tensor
    /// `.in_sum2`, the sum of x^2, and `.counts`, the tokens, a whole number; the sums are scaled to fit it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, linears: &[Planned], dataset: &str, path: &Path) -> std::result::Result<(), Error> {
        let means = self.means();
        let (mut header, mut data) = (Header::default(), Vec::new());
        let keys = &mut header.metadata;
        keys.set("general.type", "imatrix").set_array("imatrix.datasets", Array::strings(&[dataset]));
        keys.set("imatrix.chunk_count", self.samples as u32).set("imatrix.chunk_size", self.longest as u32);
        for tensor in linears {
            let Some(mean) = means.get(&tensor.name) else { continue };
            header.add_tensor(&format!("{}.in_sum2", tensor.name), GgmlType::F32, &[mean.len(), 1])?;
            header.add_tensor(&format!("{}.counts", tensor.name), GgmlType::F32, &[1, 1])?;
            data.push(mean.iter().map(|m| m * self.tokens as f32).collect());
            data.push(vec![self.tokens as f32]);
        }
        let mut output = Output::create(path)?;
        output.write(&header.encode())?;
        for values in data {
            let mut bytes: Vec<u8> = values.iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
            bytes.resize(bytes.len().next_multiple_of(header.alignment() as usize), 0);
            output.write(&bytes)?;
        }
        Ok(Output::publish(vec![output])?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::TextModel;
    use super::super::batch::pack;
    use super::super::stream::Room;
    use super::super::tests::{batch, oracle};
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::front::testing::decoder;
    use crate::ggml::{dequantize, quantize_rows};
    use crate::gguf::FileType;
    use candle_core::Device;

    /// Against hooks on transformers' linears (tests/reference/importance_goldens.py), vision tokens at 1 and at 0.25.
    #[test]
    fn means_are_those_of_transformers() {
        let Some(oracle) = oracle() else { return };
        let dir = oracle.join("tiny-onevision");
        let golden: BTreeMap<String, BTreeMap<String, Vec<f64>>> =
            serde_json::from_str(include_str!("../../tests/golden/importance.json")).unwrap();
        let checkpoint = Checkpoint::open(&dir.join("model")).unwrap();
        let source = decoder(&checkpoint);
        let model = TextModel::new(&source, 512, Device::Cpu).unwrap();
        let room = Room::new(&Device::Cpu, usize::MAX, &dir);
        let (batch, first) = pack(&batch(&dir.join("runs"), false), 300, &room).unwrap();
        for (key, ratio) in [("image", None), ("quarter", Some(Ratios { attn: 0.25, mlp: 0.25 }))] {
            let (mut x, mut importance) = (first.copy().unwrap(), Importance::new(&batch));
            for layer in 0..model.text.num_layers {
                let block = model.block(layer).unwrap();
                for (c, chunk) in batch.chunks.iter().enumerate() {
                    let t = block.trace(&x.get(c).unwrap(), &chunk.spans, &|x| Ok(x.clone())).unwrap();
                    importance.add(layer, chunk, &t, ratio).unwrap();
                    x.set(c, block.output(&t).unwrap()).unwrap();
                }
            }
            let means = importance.means();
            assert_eq!(means.len(), golden.len());
            for (name, want) in &golden {
                for (got, want) in means[name].iter().step_by(16).zip(&want[key]) {
                    // f32 here and f32 there through four blocks: 1e-5 of each other were seen, 1e-4 is allowed.
                    let off = (f64::from(*got) - want).abs() / want;
                    assert!(off < 1e-4, "{name} {key}: {got}, transformers {want}");
                }
            }
        }
    }

    /// Nothing to weigh by is an error in words, dead channels beside living ones are none.
    #[test]
    fn empty_importance_is_refused() {
        for (squares, problem) in [
            (vec![0.0, 0.0], "all are 0"),
            (vec![1.0, f64::NAN], "channel 1 is NaN"),
            (vec![f64::INFINITY, 1.0], "channel 0 is inf"),
            (vec![-1.0, 1.0], "channel 0 is -1"),
            (vec![0.0, 1.0], ""),
        ] {
            let importance =
                Importance { sums: [("w".to_owned(), Sums { squares, weight: 2.0 })].into(), ..Importance::default() };
            match importance.check() {
                Ok(()) => assert_eq!(problem, ""),
                Err(e) => assert!(e.to_string().starts_with("w: ") && e.to_string().contains(problem), "{e}"),
            }
        }
    }

    /// Channels that no token reached keep their weights, in blocks of their own and beside others, in every type that
    /// takes an importance matrix.
    #[test]
    fn dead_channels_keep_their_weights() {
        let w: Vec<f32> =
            (0..512u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0).collect();
        let squares = (0..512).map(|i| if i < 288 { 0.0 } else { 2.0 }).collect();
        let sums = [("w".to_owned(), Sums { squares, weight: 2.0 })].into();
        let importance = Importance { sums, ..Importance::default() }.means();
        for ty in ["q4_0", "q5_k", "q6_k", "q4_k", "q3_k", "q2_k", "iq4_xs", "iq3_s", "iq3_xxs"] {
            let Ok(FileType::Plain(ty)) = ty.parse() else { panic!("{ty}") };
            let bytes = quantize_rows(ty, &w, 512, Some(&importance["w"])).unwrap();
            let read = dequantize(ty, &bytes).unwrap();
            for range in [0..256, 256..288, 288..512] {
                let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
                let error =
                    square(&mut range.clone().map(|i| read[i] - w[i])) / square(&mut range.clone().map(|i| w[i]));
                // Rounding's own error is at most .3 here; weights that are lost make it 1.
                assert!(error.sqrt() < 0.5, "{ty} {range:?}: {}", error.sqrt());
            }
        }
    }

    /// Columns multiplied by s see inputs divided by s.
    #[test]
    fn folded_scales_divide_twice() {
        let sums = Sums { squares: vec![8.0, 18.0], weight: 2.0 };
        let importance = Importance { sums: [("w".to_owned(), sums)].into(), ..Importance::default() };
        let mut folds = Folds::new();
        folds.entry("w".into()).or_default().multiply_cols = Some(vec![2.0, 0.5]);
        assert_eq!(importance.folded(&folds)["w"], [1.0, 36.0]);
    }
}

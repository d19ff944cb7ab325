//! A Hugging Face checkpoint's tensors under GGUF's names.
use super::{FrontError, TensorSpec, Tensors};
use crate::Error;
use crate::checkpoint::{Checkpoint, Dtype};
use crate::ggml::GgmlType;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// A row of a family's table: GGUF's tensor, and which one of the checkpoint's it is.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub tensor: TensorSpec,
    /// The checkpoint's canonical name.
    pub from: String,
    map: RowMap,
    /// The checkpoint stores what differs from 1: a gain of `1 + w`.
    plus_one: bool,
    /// Its heads lie in groups with those of other rows.
    groups: Option<Groups>,
}

/// Heads of `head_dim` rows in groups of `of`, of which a row of the table has `heads`, from `first` on.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Groups {
    head_dim: usize,
    first: usize,
    heads: usize,
    of: usize,
}

/// Where a row's values lie in the checkpoint's tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
enum RowMap {
    /// In the same order.
    Same,
    /// Heads so wide have their rows in another order: i and i + d/2 become 2i and 2i + 1.
    Neighbours(usize),
    /// They are the rows from `first` on, of `of`.
    Rows { first: usize, of: usize },
    /// A convolution over `of` pictures in a row, `[out, in, of, height, width]`: the part that sees picture `frame`.
    Frame { frame: usize, of: usize },
}

impl Row {
    fn new(name: impl Into<String>, from: impl Into<String>, shape: &[usize], stored: GgmlType) -> Self {
        Row {
            tensor: TensorSpec::new(name, shape, stored),
            from: from.into(),
            map: RowMap::Same,
            plus_one: false,
            groups: None,
        }
    }

    /// A vector, or a small table: f32 in files that quantise nothing.
    pub fn vector(name: impl Into<String>, from: impl Into<String>, shape: &[usize]) -> Self {
        Row::new(name, from, shape, GgmlType::F32)
    }

    /// A matrix or a convolution: f16 there.
    pub fn matrix(name: impl Into<String>, from: impl Into<String>, shape: &[usize]) -> Self {
        Row::new(name, from, shape, GgmlType::F16)
    }

    /// Weight and bias of a linear `[out, in]`.
    pub fn linear(name: &str, from: &str, shape: [usize; 2]) -> [Self; 2] {
        let weight = Row::matrix(format!("{name}.weight"), format!("{from}.weight"), &shape);
        [weight, Row::vector(format!("{name}.bias"), format!("{from}.bias"), &shape[..1])]
    }

    /// Gain of a norm, and its bias where it `is_layer_norm`.
    pub fn norm(name: &str, from: &str, width: usize, is_layer_norm: bool) -> Vec<Self> {
        let kinds: &[&str] = if is_layer_norm { &["weight", "bias"] } else { &["weight"] };
        kinds.iter().map(|kind| Row::vector(format!("{name}.{kind}"), format!("{from}.{kind}"), &[width])).collect()
    }

    /// The same in f32, though it is a matrix.
    pub fn in_f32(mut self) -> Self {
        self.tensor.stored = GgmlType::F32;
        self
    }

    /// A gain `1 + w` of which the checkpoint has `w`.
    pub fn plus_one(self) -> Self {
        Row { plus_one: true, ..self }
    }

    /// The same with the rows of heads of `head_dim` reordered.
    pub fn neighbours(self, head_dim: usize) -> Self {
        Row { map: RowMap::Neighbours(head_dim), ..self }
    }

    /// Part `part` of a tensor that holds `parts` of this shape one below the other, such as q, k and v.
    pub fn part(self, part: usize, parts: usize) -> Self {
        let rows = self.tensor.shape[0];
        Row { map: RowMap::Rows { first: part * rows, of: parts * rows }, ..self }
    }

    /// Heads `heads` of every `of` of a tensor, one below the other: q, k or v of a tensor that holds them side by side for
    /// each key.
    pub fn grouped(self, head_dim: usize, heads: Range<usize>, of: usize) -> Self {
        Row { groups: Some(Groups { head_dim, first: heads.start, heads: heads.len(), of }), ..self }
    }

    /// What a convolution `[out, in, height, width]` does to picture `frame` of the `of` that the checkpoint's sees.
    pub fn frame(self, frame: usize, of: usize) -> Self {
        Row { map: RowMap::Frame { frame, of }, ..self }
    }

    /// The shape of the checkpoint's tensor.
    pub fn stored_shape(&self) -> Vec<usize> {
        let mut shape = self.tensor.shape.clone();
        match self.map {
            RowMap::Same | RowMap::Neighbours(_) => (),
            RowMap::Rows { of, .. } => shape[0] = of,
            RowMap::Frame { of, .. } => shape.insert(2, of),
        }
        if let Some(groups) = self.groups {
            shape[0] = shape[0] / groups.heads * groups.of;
        }
        shape
    }

    /// Where value `at` lies in the checkpoint's tensor, and how many from there on lie in order.
    fn run(&self, at: usize) -> (usize, usize) {
        let (from, run) = self.map_run(at);
        let Some(Groups { head_dim, first, heads, of }) = self.groups else { return (from, run) };
        let size = head_dim * self.tensor.shape[1..].iter().product::<usize>();
        let (head, inside) = (from / size, from % size);
        ((head / heads * of + first + head % heads) * size + inside, run.min(size - inside))
    }

    /// The same but for [`Groups`].
    fn map_run(&self, at: usize) -> (usize, usize) {
        let shape = &self.tensor.shape;
        let cols: usize = shape[1..].iter().product();
        match self.map {
            RowMap::Same => (at, self.tensor.elements() - at),
            RowMap::Rows { first, .. } => (first * cols + at, self.tensor.elements() - at),
            RowMap::Neighbours(d) => {
                let (r, c) = (at / cols, at % cols);
                let row = r / d * d + r % d / 2 + r % 2 * (d / 2);
                (row * cols + c, cols - c)
            }
            RowMap::Frame { frame, of } => {
                let plane: usize = shape[2..].iter().product();
                let (channel, pixel) = (at / plane, at % plane);
                ((channel * of + frame) * plane + pixel, plane - pixel)
            }
        }
    }
}

/// Tensors of a checkpoint, each under the name that a family's table gives it.
pub(crate) struct Renamed<'a> {
    checkpoint: &'a Checkpoint,
    rows: BTreeMap<String, Row>,
}

impl<'a> Renamed<'a> {
    /// # Errors
    /// A tensor is missing, has another shape or no floating-point type.
    pub fn new(checkpoint: &'a Checkpoint, rows: &[Row]) -> Result<Self, Error> {
        rows.iter().try_for_each(|row| checkpoint.check(&row.from, &row.stored_shape()))?;
        Ok(Renamed { checkpoint, rows: rows.iter().map(|row| (row.tensor.name.clone(), row.clone())).collect() })
    }

    fn row(&self, name: &str) -> Result<&Row, Error> {
        let missing = || FrontError::Tensor {
            file: self.checkpoint.dir().into(),
            name: name.into(),
            problem: "is not in the family's table".into(),
        };
        Ok(self.rows.get(name).ok_or_else(missing)?)
    }
}

impl Tensors for Renamed<'_> {
    fn values(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>, Error> {
        let row = self.row(name)?;
        let shape = row.stored_shape();
        let mut values = Vec::with_capacity(range.len());
        let mut at = range.start;
        while at < range.end {
            let (from, run) = row.run(at);
            let n = run.min(range.end - at);
            let mut part = self.checkpoint.f32_range(&row.from, &shape, from..from + n)?;
            if row.plus_one {
                part.iter_mut().for_each(|w| *w += 1.0);
            }
            // One run is most often all of it: no copy.
            if n == range.len() {
                return Ok(part);
            }
            values.extend(part);
            at += n;
        }
        Ok(values)
    }

    fn bytes(&self, name: &str) -> Option<(GgmlType, &[u8])> {
        let plain = |row: &&Row| row.map == RowMap::Same && !row.plus_one && row.groups.is_none();
        let row = self.rows.get(name).filter(plain)?;
        let view = self.checkpoint.tensor(&row.from).ok()?;
        let ty = match view.dtype {
            Dtype::F32 => GgmlType::F32,
            Dtype::F16 => GgmlType::F16,
            Dtype::BF16 => GgmlType::BF16,
            _ => return None,
        };
        Some((ty, view.bytes))
    }

    fn release(&self, name: &str) {
        if let Some(row) = self.rows.get(name) {
            self.checkpoint.release(&row.from);
        }
    }

    fn path(&self, _: &str) -> &Path {
        self.checkpoint.dir()
    }

    fn origin<'n>(&'n self, name: &'n str) -> &'n str {
        self.rows.get(name).map_or(name, |row| &row.from)
    }

    fn fingerprint(&self) -> String {
        self.checkpoint.fingerprint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where each value of a row lies.
    fn sources(row: &Row) -> Vec<usize> {
        (0..row.tensor.elements()).map(|at| row.run(at).0).collect()
    }

    /// As `reshape(heads, 2, d/2, cols).swapaxes(1, 2)`, two heads of four rows.
    #[test]
    fn halves_become_neighbours() {
        let row = Row::vector("blk.0.attn_q.bias", "", &[8]).neighbours(4);
        assert_eq!(sources(&row), [0, 2, 1, 3, 4, 6, 5, 7]);
        let row = Row::matrix("blk.0.attn_q.weight", "", &[4, 2]).neighbours(4);
        assert_eq!(sources(&row), [0, 1, 4, 5, 2, 3, 6, 7]);
    }

    /// As `reshape(2, 4, 2)` (two groups of two queries, a key and a value, heads of two rows): `[:, :2]`, `[:, 2]` with the
    /// rows of a head as neighbours, `[:, 3]`.
    #[test]
    fn heads_in_groups() {
        let q = Row::vector("blk.0.attn_q.bias", "", &[8]).grouped(2, 0..2, 4);
        assert_eq!((q.stored_shape(), sources(&q)), (vec![16], vec![0, 1, 2, 3, 8, 9, 10, 11]));
        let v = Row::matrix("blk.0.attn_v.weight", "", &[4, 1]).grouped(2, 3..4, 4);
        assert_eq!((v.stored_shape(), sources(&v)), (vec![16, 1], vec![6, 7, 14, 15]));
        assert_eq!(v.run(0), (6, 2), "up to the end of the head");
        let k = Row::vector("blk.0.attn_k.bias", "", &[8]).neighbours(4).grouped(4, 1..2, 3);
        assert_eq!((k.stored_shape(), sources(&k)), (vec![24], vec![4, 6, 5, 7, 16, 18, 17, 19]));
    }

    /// As `split(2)[1]` of `[6, 2]` by threes.
    #[test]
    fn a_part_of_fused_rows() {
        let row = Row::matrix("v.blk.0.attn_k.weight", "", &[2, 2]).part(1, 3);
        assert_eq!((row.stored_shape(), sources(&row)), (vec![6, 2], vec![4, 5, 6, 7]));
    }

    /// As `[:, :, 1]` of `arange(2 * 3 * 2 * 2).reshape(1, 2, 3, 2, 2)`.
    #[test]
    fn a_frame_of_a_convolution() {
        let row = Row::matrix("v.patch_embd.weight.1", "", &[1, 2, 2, 2]).frame(1, 3);
        assert_eq!((row.stored_shape(), sources(&row)), (vec![1, 2, 3, 2, 2], vec![4, 5, 6, 7, 16, 17, 18, 19]));
        assert_eq!(row.run(5), (17, 3), "up to the end of the plane");
    }
}

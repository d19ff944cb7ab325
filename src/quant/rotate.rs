//! A rotation of the residual stream (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406): a checkpoint that
//! computes the same, in which no channel of the stream stands out.
//!
//! With Q orthogonal, a stream x becomes x Q. What writes to it (embedding, projector, newline, o, down) is multiplied
//! by Q, what reads from it (q, k, v, gate, up, head) by Q^T on the other side. An RMS norm commutes with Q once its gain
//! is moved into the linears behind it, so gains become 1 and a tied head becomes a tensor of its own.
//!
//! Q is a Hadamard matrix times an orthonormal cosine transform (for what is odd in the width), columns' signs drawn at
//! random: a row of n weights is rotated in O(n log n), and the matrix is made only for devices, on which a product is quicker.
use crate::random::Rng;
use pulp::NullaryFnOnce;
use rayon::prelude::*;
use std::f64::consts::PI;

/// An orthogonal matrix of `n` rows.
#[derive(Debug, Clone)]
pub struct Rotation {
    signs: Vec<f64>,
    /// The odd part m of n = 2^k m.
    cosines: Vec<f64>,
    odd: usize,
}

impl Rotation {
    /// Of width `n`; another `seed` draws other signs.
    pub fn new(n: usize, seed: u64) -> Self {
        let odd = n >> n.trailing_zeros();
        let mut random = Rng::new(seed);
        let signs = (0..n).map(|_| if random.next_u64() >> 63 == 0 { 1.0 } else { -1.0 }).collect();
        // DCT-II, orthonormal: row k, column j.
        let cosine = |k: usize, j: usize| {
            let norm = if k == 0 { 1.0 } else { 2f64.sqrt() } / (odd as f64).sqrt();
            norm * (PI * (j as f64 + 0.5) * k as f64 / odd as f64).cos()
        };
        let cosines = (0..odd * odd).map(|i| cosine(i / odd, i % odd)).collect();
        Rotation { signs, cosines, odd }
    }

    /// Width.
    pub fn len(&self) -> usize {
        self.signs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.signs.is_empty()
    }

    /// x Q, in place. `x` is as wide as the matrix.
    pub fn apply(&self, x: &mut [f64]) {
        self.transform::<1>(x.as_chunks_mut().0);
    }

    /// The same of L vectors, an entry of each beside one another.
    #[inline(always)]
    fn transform<const L: usize>(&self, x: &mut [[f64; L]]) {
        let (n, m) = (self.len(), self.odd);
        let each = |x: &mut [f64; L], by: f64| x.iter_mut().for_each(|x| *x *= by);
        x.iter_mut().zip(&self.signs).for_each(|(x, &s)| each(x, s));
        let mut part = vec![[0.0; L]; m];
        for x in x.chunks_exact_mut(m) {
            for (p, row) in part.iter_mut().zip(self.cosines.chunks_exact(m)) {
                *p = [0.0; L];
                for (c, x) in row.iter().zip(x.iter()) {
                    p.iter_mut().zip(x).for_each(|(p, x)| *p += c * x);
                }
            }
            x.copy_from_slice(&part);
        }
        // Fast Walsh-Hadamard transform over the power of two.
        let mut half = m;
        while half < n {
            for pair in x.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().flatten().zip(b.iter_mut().flatten()) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let scale = 1.0 / ((n / m) as f64).sqrt();
        x.iter_mut().for_each(|x| each(x, scale));
    }

    /// The matrix, row by row.
    pub fn matrix(&self) -> Vec<f32> {
        let n = self.len();
        let mut rows = vec![0f32; n * n];
        rows.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| {
            let mut x = vec![0.0; n];
            x[i] = 1.0;
            self.apply(&mut x);
            row.iter_mut().zip(x).for_each(|(v, x)| *v = x as f32);
        });
        rows
    }

    /// W Q of `[rows, n]`: what reads from the stream. `gain` is the norm's before it.
    pub fn readers(&self, w: &mut [f32], gain: Option<&[f32]>) {
        let n = self.len();
        w.par_chunks_mut(n * SIDE).for_each(|rows| {
            let mut x = vec![[0.0; SIDE]; n];
            for (side, row) in rows.chunks_exact(n).enumerate() {
                match gain {
                    None => x.iter_mut().zip(row).for_each(|(x, &v)| x[side] = f64::from(v)),
                    Some(gain) => x.iter_mut().zip(row).zip(gain).for_each(|((x, &v), &g)| {
                        x[side] = f64::from(v) * f64::from(g);
                    }),
                }
            }
            pulp::Arch::new().dispatch(Transform(self, &mut x));
            for (side, row) in rows.chunks_exact_mut(n).enumerate() {
                row.iter_mut().zip(&x).for_each(|(v, x)| *v = x[side] as f32);
            }
        });
    }

    /// Q^T W of `[n, cols]`: what writes to the stream.
    pub fn writers(&self, w: &[f32], cols: usize) -> Vec<f32> {
        let n = self.len();
        // Columns side by side, `[n, SIDE]` each time.
        let done: Vec<Vec<[f32; SIDE]>> = (0..cols)
            .into_par_iter()
            .step_by(SIDE)
            .map(|start| {
                let len = SIDE.min(cols - start);
                let mut x = vec![[0.0; SIDE]; n];
                for (x, row) in x.iter_mut().zip(w.chunks_exact(cols)) {
                    x.iter_mut().zip(&row[start..start + len]).for_each(|(x, &v)| *x = f64::from(v));
                }
                pulp::Arch::new().dispatch(Transform(self, &mut x));
                x.iter().map(|x| x.map(|x| x as f32)).collect()
            })
            .collect();
        let mut out = vec![0f32; n * cols];
        out.par_chunks_mut(cols.max(1)).enumerate().for_each(|(i, row)| {
            row.chunks_mut(SIDE).zip(&done).for_each(|(row, done)| row.copy_from_slice(&done[i][..row.len()]));
        });
        out
    }
}

/// Vectors that are rotated side by side.
const SIDE: usize = 8;

/// [`Rotation::transform`] for the widest vectors that the processor has; a closure may not be inlined there.
struct Transform<'a>(&'a Rotation, &'a mut [[f64; SIDE]]);

impl NullaryFnOnce for Transform<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.0.transform(self.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Q Q^T = 1 for widths with and without an odd part, and no entry is far from the mean size 1/sqrt(n).
    #[test]
    fn is_orthogonal_and_spread_out() {
        for n in [8, 12, 96, 448] {
            let q = Rotation::new(n, 1);
            let row = |i: usize| {
                let mut x = vec![0.0; n];
                x[i] = 1.0;
                q.apply(&mut x);
                x
            };
            let rows: Vec<Vec<f64>> = (0..n).map(row).collect();
            for (i, a) in rows.iter().enumerate() {
                // The cosine transform's entries are at most sqrt(2) times the mean size.
                assert!(a.iter().all(|v| v.abs() < 1.42 / (n as f64).sqrt()), "{n}");
                for (j, b) in rows.iter().enumerate() {
                    let dot: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                    let want = if i == j { 1.0 } else { 0.0 };
                    // A few hundred roundings of f64.
                    assert!((dot - want).abs() < 1e-13, "{n}: {i} {j} {dot}");
                }
            }
        }
    }

    /// A writer's and a reader's rotations cancel.
    #[test]
    fn readers_undo_writers() {
        let (n, cols) = (24, 5);
        let q = Rotation::new(n, 7);
        let w: Vec<f32> = (0..n * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 10.0).collect();
        let r: Vec<f32> = (0..3 * n).map(|i| ((i * 53 % 97) as f32 - 48.0) / 10.0).collect();
        let gain: Vec<f32> = (0..n).map(|i| 1.0 + i as f32 / 8.0).collect();
        let product = |r: &[f32], gain: &dyn Fn(usize) -> f32, w: &[f32]| -> Vec<f64> {
            let term = |i: usize, j: usize, k: usize| f64::from(r[i * n + k] * gain(k)) * f64::from(w[k * cols + j]);
            (0..3 * cols).map(|c| (0..n).map(|k| term(c / cols, c % cols, k)).sum()).collect()
        };
        let before = product(&r, &|k| gain[k], &w);
        let mut rotated = r.clone();
        q.readers(&mut rotated, Some(&gain));
        let after = product(&rotated, &|_| 1.0, &q.writers(&w, cols));
        for (a, b) in before.iter().zip(&after) {
            // Both factors were rounded to f32, sums of 24 products of up to 100.
            assert!((a - b).abs() < 2e-3, "{a} {b}");
        }
    }

    /// Rows and columns that are rotated side by side have the bits of those that are rotated alone, the last ones too.
    #[test]
    fn side_by_side_is_one_by_one() {
        for n in [12, 64, 56] {
            let (q, count) = (Rotation::new(n, 3), 2 * SIDE + 3);
            let w: Vec<f32> = (0..n * count).map(|i| (i * 37 % 101) as f32 / 7.0 - 6.0).collect();
            let gain: Vec<f32> = (0..n).map(|i| 1.0 + i as f32 / 9.0).collect();
            let alone = |x: Vec<f64>| -> Vec<f32> {
                let mut x = x;
                q.apply(&mut x);
                x.into_iter().map(|x| x as f32).collect()
            };
            let mut rows = w.clone();
            q.readers(&mut rows, Some(&gain));
            for (row, was) in rows.chunks(n).zip(w.chunks(n)) {
                assert_eq!(row, alone(was.iter().zip(&gain).map(|(&v, &g)| f64::from(v) * f64::from(g)).collect()));
            }
            let columns = q.writers(&w, count);
            for j in 0..count {
                let of = |w: &[f32]| -> Vec<f32> { (0..n).map(|i| w[i * count + j]).collect() };
                assert_eq!(of(&columns), alone(of(&w).into_iter().map(f64::from).collect()));
            }
        }
    }
}

//! Grouped-query attention and its vector-Jacobian product, sample by sample. Queries are taken a part at a time, with
//! the keys that any of them sees: what no query of a part sees is left out.
use super::ops::{add_to, masked_softmax, rms_backward, rms_norm, softmax_backward};
use super::rope::{Rope, Turn};
use super::sample::Span;
use candle_core::{Result, Tensor};
use std::ops::Range;

/// Bytes of attention scores that are held at once, where one key head's are not more.
pub const SCORES: usize = 256 << 20;

/// Queries whose scores are made together, about; keys that none of them sees are left out.
const QUERIES: usize = if cfg!(test) { 2 } else { 86 };

/// Divides `n` queries, one or more; no part is empty.
fn query_parts(n: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    let parts = (n / QUERIES).clamp(1, 8);
    (0..parts).map(move |i| n * i / parts..n * (i + 1) / parts)
}

/// `all` `[heads, n, d]` with `part`, of fewer rows, added to its rows from `from` on; zeros where there is no `all` yet.
fn add_rows(all: Option<Tensor>, part: Tensor, from: usize, n: usize) -> Result<Tensor> {
    let rows = part.dim(1)?;
    let Some(all) = all else { return part.pad_with_zeros(1, from, n - from - rows) };
    let sum = add_to(part, &all.narrow(1, from, rows)?)?;
    let mut parts = vec![sum];
    if from > 0 {
        parts.insert(0, all.narrow(1, 0, from)?);
    }
    if from + rows < n {
        parts.push(all.narrow(1, from + rows, n - from - rows)?);
    }
    Tensor::cat(&parts, 1)
}

/// A block's attention, but for its linears.
#[derive(Debug, Clone)]
pub struct Attention {
    pub rope: Rope,
    /// Gains of the norms over a head's q and k.
    pub q_norm: Option<Tensor>,
    pub k_norm: Option<Tensor>,
    pub eps: f64,
    pub kv_heads: usize,
    /// Query heads per key head.
    pub repeats: usize,
    pub head_dim: usize,
    /// Scores are multiplied by it.
    pub scale: f64,
    /// How many tokens a token sees, itself included; none: all before it.
    pub window: Option<usize>,
}

/// Some queries, by their places in a sample, and the keys that they see between them.
struct QueryPart {
    queries: Range<usize>,
    keys: Range<usize>,
    /// Of each query, among these keys.
    seen: Vec<Range<usize>>,
}

impl Attention {
    /// `[n, heads * d]` to `[heads, n, d]`.
    pub(super) fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (n, width) = x.dims2()?;
        x.reshape((n, width / self.head_dim, self.head_dim))?.transpose(0, 1)?.contiguous()
    }

    /// The inverse of `split`.
    pub(super) fn join(&self, x: &Tensor) -> Result<Tensor> {
        let (heads, n, d) = x.dims3()?;
        x.transpose(0, 1)?.contiguous()?.reshape((n, heads * d))
    }

    /// Query heads that share a key head stand below one another, so that no key is copied:
    /// `[heads, n, d]` to `[kv_heads, repeats * n, d]`.
    fn stack(&self, q: &Tensor) -> Result<Tensor> {
        let (_, n, d) = q.dims3()?;
        q.contiguous()?.reshape((self.kv_heads, self.repeats * n, d))
    }

    /// The inverse of `stack`.
    fn unstack(&self, q: &Tensor) -> Result<Tensor> {
        q.reshape((self.kv_heads * self.repeats, q.dim(1)? / self.repeats, self.head_dim))
    }

    /// Key heads whose scores are made together, for `rows` queries of `keys` keys: first, how many.
    fn head_parts(&self, rows: usize, keys: usize) -> impl Iterator<Item = (usize, usize)> {
        let each = 4 * self.repeats * rows * keys;
        let (all, step) = (self.kv_heads, (SCORES / each.max(1)).clamp(1, self.kv_heads));
        (0..all).step_by(step).map(move |at| (at, step.min(all - at)))
    }

    /// Divides queries at `positions` of the sample.
    fn parts(&self, span: &Span, positions: &[usize]) -> impl DoubleEndedIterator<Item = QueryPart> {
        query_parts(positions.len()).map(|queries| {
            let all: Vec<Range<usize>> =
                positions[queries.clone()].iter().map(|&t| span.seen(t, self.window)).collect();
            let start = all.iter().map(|seen| seen.start).min().unwrap_or(0);
            let keys = start..all.iter().map(|seen| seen.end).max().unwrap_or(0);
            // A query of padding may see nothing but padding: one key then, so that its sum is not zero.
            let real = |seen: &Range<usize>| seen.start - start..seen.end.min(span.real).max(seen.start + 1) - start;
            QueryPart { queries, keys, seen: all.iter().map(real).collect() }
        })
    }

    fn probabilities(&self, q: &Tensor, k: &Tensor, part: &QueryPart) -> Result<Tensor> {
        masked_softmax(q.matmul(&k.t()?)?, self.scale, &part.seen)
    }

    /// Queries or keys `[heads, n, d]`, normed and turned.
    fn turned(&self, x: Tensor, norm: Option<&Tensor>, turn: &Turn) -> Result<Tensor> {
        let x = match norm {
            Some(gain) => rms_norm(&x, gain, self.eps)?,
            None => x,
        };
        turn.apply(&x, false)
    }

    /// The gradient at `x` from that at what [`Attention::turned`] made of it.
    fn turned_backward(&self, x: &Tensor, norm: Option<&Tensor>, turn: &Turn, g: &Tensor) -> Result<Tensor> {
        let g = turn.apply(g, true)?;
        match norm {
            Some(gain) => rms_backward(x, gain, self.eps, &g),
            None => Ok(g),
        }
    }

    /// The heads' outputs, of each span's keys and values; `q` holds only the packed matrix's rows `rows`, in order.
    pub(super) fn forward(
        &self,
        q: &Tensor,
        keys: &[(Tensor, Tensor)],
        spans: &[Span],
        rows: Option<&[u32]>,
    ) -> Result<Tensor> {
        let mut outs = Vec::with_capacity(spans.len());
        let mut from = 0;
        for (span, (k, v)) in spans.iter().zip(keys) {
            let positions: Vec<usize> = match rows {
                None => (0..span.len).collect(),
                Some(rows) => {
                    let inside =
                        rows.iter().map(|&t| t as usize).filter(|t| (span.start..span.start + span.len).contains(t));
                    inside.map(|t| t - span.start).collect()
                }
            };
            let n = positions.len();
            if n == 0 {
                continue;
            }
            let turn = self.rope.of(span)?;
            let heads = self.split(&q.narrow(0, from, n)?)?;
            let of_rows = if n == span.len { None } else { Some(turn.rows(&positions)?) };
            let heads = self.turned(heads, self.q_norm.as_ref(), of_rows.as_ref().unwrap_or(&turn))?;
            let (k, v) = (self.turned(self.split(k)?, self.k_norm.as_ref(), &turn)?, self.split(v)?);
            for part in self.parts(span, &positions) {
                let (len, keys) = (part.queries.len(), part.keys.len());
                let q = self.stack(&heads.narrow(1, part.queries.start, len)?)?;
                let mut out = Vec::new();
                for (at, heads) in self.head_parts(len, keys) {
                    let of = |t: &Tensor| t.narrow(0, at, heads)?.narrow(1, part.keys.start, keys);
                    let p = self.probabilities(&q.narrow(0, at, heads)?, &of(&k)?, &part)?;
                    out.push(p.matmul(&of(&v)?)?);
                }
                outs.push(self.join(&self.unstack(&Tensor::cat(&out, 0)?)?)?);
            }
            from += n;
        }
        Tensor::cat(&outs, 0)
    }

    /// Gradients at packed q, k, v, from `g` at the heads' outputs.
    pub(super) fn backward(
        &self,
        [q, k, v]: [&Tensor; 3],
        spans: &[Span],
        g: &Tensor,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (mut g_q, mut g_k, mut g_v) = (Vec::new(), Vec::new(), Vec::new());
        for span in spans {
            let of = |t: &Tensor| self.split(&t.narrow(0, span.start, span.len)?);
            let (of_q, of_k, of_v) = self.span_backward([&of(q)?, &of(k)?, &of(v)?], span, &of(g)?)?;
            g_q.push(of_q);
            g_k.push(of_k);
            g_v.push(of_v);
        }
        Ok((Tensor::cat(&g_q, 0)?, Tensor::cat(&g_k, 0)?, Tensor::cat(&g_v, 0)?))
    }

    /// The same of one sample, heads split.
    fn span_backward(&self, [q, k, v]: [&Tensor; 3], span: &Span, g: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let turn = self.rope.of(span)?;
        let (q_norm, k_norm) = (self.q_norm.as_ref(), self.k_norm.as_ref());
        let turned_q = self.turned(q.clone(), q_norm, &turn)?;
        let turned_k = self.turned(k.clone(), k_norm, &turn)?;
        let positions: Vec<usize> = (0..span.len).collect();
        // The last queries see most keys: what the others add to keys' gradients is added to those of these.
        let (mut span_q, mut span_k, mut span_v) = (Vec::new(), None, None);
        for part in self.parts(span, &positions).rev() {
            let (len, keys) = (part.queries.len(), part.keys.len());
            let of = |t: &Tensor| self.stack(&t.narrow(1, part.queries.start, len)?);
            let (q, g) = (of(&turned_q)?, of(g)?);
            let (mut of_q, mut of_k, mut of_v) = (Vec::new(), Vec::new(), Vec::new());
            for (at, heads) in self.head_parts(len, keys) {
                let of = |t: &Tensor| t.narrow(0, at, heads);
                let seen = |t: &Tensor| of(t)?.narrow(1, part.keys.start, keys);
                let (q, k, v, g) = (of(&q)?, seen(&turned_k)?, seen(v)?, of(&g)?);
                let p = self.probabilities(&q, &k, &part)?;
                of_v.push(p.t()?.matmul(&g)?);
                let g_p = g.matmul(&v.t()?)?;
                let g_s = softmax_backward(&p, g_p, self.scale)?;
                of_q.push(g_s.matmul(&k)?);
                of_k.push(g_s.t()?.matmul(&q)?);
            }
            span_q.push(self.unstack(&Tensor::cat(&of_q, 0)?)?);
            span_k = Some(add_rows(span_k, Tensor::cat(&of_k, 0)?, part.keys.start, span.len)?);
            span_v = Some(add_rows(span_v, Tensor::cat(&of_v, 0)?, part.keys.start, span.len)?);
        }
        span_q.reverse();
        let (Some(g_k), Some(g_v)) = (span_k, span_v) else { candle_core::bail!("a sample has no tokens") };
        let g_q = self.turned_backward(q, q_norm, &turn, &Tensor::cat(&span_q, 1)?)?;
        let g_k = self.turned_backward(k, k_norm, &turn, &g_k)?;
        Ok((self.join(&g_q)?, self.join(&g_k)?, self.join(&g_v)?))
    }
}

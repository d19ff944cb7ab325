"""Goldens for src/eval/stats.rs, from numpy and scipy in float64. Writes tests/golden/eval_stats.json.

    python tests/reference/eval_goldens.py     (needs numpy, scipy)
"""
import json
import pathlib

import numpy as np
import scipy.special
import scipy.stats

rng = np.random.default_rng(7)
out = {}

# KL of rows of f32 logits: scipy's log_softmax and rel_entr in float64.
p = rng.normal(size=(6, 40)).astype(np.float32) * np.array([[1], [5], [20], [0.1], [3], [3]], dtype=np.float32)
q = p + rng.normal(size=p.shape).astype(np.float32) * np.array([[0.1], [1], [3], [0], [1e-3], [1e-4]], dtype=np.float32)
lp, lq = (scipy.special.log_softmax(x.astype(np.float64), axis=1) for x in (p, q))
out["kl"] = {
    "p": p.tolist(),
    "q": q.tolist(),
    "kl": scipy.special.rel_entr(np.exp(lp), np.exp(lq)).sum(axis=1).tolist(),
    "nll_q_7": (-lq[:, 7]).tolist(),
}

values = rng.gamma(0.5, size=101)
out["quantile"] = {"values": values.tolist(), "q": [0, 0.025, 0.5, 0.99, 1], "expected": np.quantile(values, [0, 0.025, 0.5, 0.99, 1]).tolist()}


# SplitMix64 in Python integers, written from the paper's description.
def splitmix(seed):
    mask = (1 << 64) - 1
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)


# Ratio bootstrap over clusters: the same stream of draws, everything else by numpy.
sums, counts = rng.gamma(0.7, size=60), rng.integers(1, 9, size=60).astype(float)
stream = splitmix(20260)
index = np.array([[(next(stream) * 60) >> 64 for _ in range(60)] for _ in range(500)])
draws = sums[index].sum(axis=1) / counts[index].sum(axis=1)
# An interval from scipy's own generator and resampling, to be met roughly.
scipy_ci = scipy.stats.bootstrap((sums, counts), lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis), paired=True,
                                 vectorized=True, n_resamples=20000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
out["bootstrap"] = {
    "sum": sums.tolist(), "count": counts.tolist(), "seed": 20260, "resamples": 500,
    "value": sums.sum() / counts.sum(), "low": np.quantile(draws, 0.025), "high": np.quantile(draws, 0.975),
    "scipy_low": scipy_ci.low, "scipy_high": scipy_ci.high,
}

pairs = [(0, 0), (1, 0), (3, 3), (5, 17), (40, 61), (0, 12), (900, 1000), (2, 1500)]
out["mcnemar"] = [{"b": b, "c": c, "p": scipy.stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0} for b, c in pairs]

small = rng.normal(0.4, 1, size=11)
large = rng.normal(0.12, 1, size=200)
out["sign_flip"] = [
    {"d": d.tolist(), "exact": exact,
     "p": scipy.stats.permutation_test((d,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", vectorized=True,
                                       n_resamples=np.inf if exact else 200000, rng=np.random.default_rng(2)).pvalue}
    for d, exact in [(small, True), (large, False)]
]
ps = rng.uniform(size=9) ** 3
# False discovery control has no Holm in scipy: adjusted values from the definition, by sorting.
order = np.argsort(ps)
holm = np.empty(9)
holm[order] = np.minimum(1, np.maximum.accumulate(ps[order] * (9 - np.arange(9))))
out["holm"] = {"p": ps.tolist(), "adjusted": holm.tolist()}

path = pathlib.Path(__file__).parents[1] / "golden" / "eval_stats.json"
path.write_text(json.dumps(out) + "\n")
print(path, path.stat().st_size)

"""Column-by-column rounding with error feedback, as the GPTQ paper (arXiv 2210.17323) has it: the Cholesky factor of
the inverse of H, no blocks of columns, float64. Writes tests/golden/feedback.json.

    python feedback_goldens.py

Levels are the paper's 3-bit grid on groups of 128 with d and m as halfs; codes are chosen against those. The seed is the
first whose decisions all stand clear of a tie by MARGIN (of a step for codes and zero points, of a half's ulp for d), so
that float32 must come to the same codes.
"""

import json
from pathlib import Path

import numpy as np

GROUP, ROWS, COLS, TOKENS, DAMPING, MARGIN = 128, 10, 256, 400, 0.01, 1e-4


def problem(seed):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(COLS, COLS)) / np.sqrt(COLS) + np.eye(COLS)
    x = rng.normal(size=(TOKENS, COLS)) @ mix * np.exp(rng.normal(size=COLS))
    x[:, 17] = 0  # a dead channel
    # The test reads what the file says: float32 values in full.
    h = (x.T @ x / TOKENS).astype(np.float32).astype(np.float64)
    w = (rng.normal(size=(ROWS, COLS)) * 0.05 + 0.01).astype(np.float32).astype(np.float64)
    return h, w


def distance_to_tie(v):
    return abs(v - np.floor(v) - 0.5)


def levels(w, margins):
    step = max(w.max() - w.min(), 1e-5) / 7
    zero = min(max(-np.round(w.min() / step), 0), 7)
    margins.append(distance_to_tie(w.min() / step))
    d = np.float16(step)
    ulp = float(np.spacing(d))
    margins.append(distance_to_tie(step / ulp))
    m = np.float16(-float(d) * zero)
    return float(d), float(m)


def code(w, d, m, margins):
    at = (w - m) / d
    if -0.5 < at < 7.5 or min(abs(at + 0.5), abs(at - 7.5)) < MARGIN:
        margins.append(distance_to_tie(at))
    return min(max(np.round(at), 0), 7)


def run(seed):
    h, w0 = problem(seed)
    diagonal = np.diag(h).copy()
    dead = diagonal == 0
    # As the implementation has it: dead channels count with the mean, the others are damped by its share.
    lift = np.where(dead, diagonal.mean(), DAMPING * diagonal.mean())
    damped = h + np.diag(lift)
    u = np.linalg.cholesky(np.linalg.inv(damped)).T
    codes, values, margins = np.zeros((ROWS, COLS), int), np.zeros((ROWS, COLS)), []
    plain = np.zeros((ROWS, COLS))
    for r in range(ROWS):
        w = w0[r].copy()
        for k in range(COLS):
            if k % GROUP == 0:
                d, m = levels(w[k : k + GROUP], margins)
                d0, m0 = levels(w0[r, k : k + GROUP], [])
            codes[r, k] = code(w[k], d, m, margins)
            values[r, k] = d * codes[r, k] + m
            plain[r, k] = d0 * code(w0[r, k], d0, m0, []) + m0
            w[k:] -= (w[k] - values[r, k]) / u[k, k] * u[k, k:]
    error = lambda v: float(np.einsum("ri,ij,rj->", w0 - v, damped, w0 - v))
    return min(margins), h, w0, codes, error(values), error(plain)


for seed in range(2000):
    margin, h, w, codes, error, plain = run(seed)
    if margin > MARGIN:
        break
else:
    raise SystemExit("no seed keeps clear of ties")
golden = {
    "made_by": "tests/reference/feedback_goldens.py",
    "rows": ROWS,
    "cols": COLS,
    "damping": DAMPING,
    "margin": margin,
    "error": error,
    "error_nearest": plain,
    "seed": seed,
    # Lower triangle, row by row; float32 in hexadecimal bits.
    "h": np.concatenate([h[i, : i + 1] for i in range(COLS)]).astype("<f4").tobytes().hex(),
    "w": w.astype("<f4").tobytes().hex(),
    "codes": "".join(map(str, codes.reshape(-1))),
}
path = Path(__file__).resolve().parent.parent / "golden" / "feedback.json"
path.write_text(json.dumps(golden, indent=1) + "\n")
print(seed, margin, error, plain, error / plain, path.stat().st_size)

"""Draws docs/quality.svg from docs/data/quality.tsv: python docs/data/plot.py"""
import csv
import math
from pathlib import Path

HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 820, 560, 60, 190, 84, 48
X, Y = (29.8e6, 81e6), (1e-4, 5.0)
# class, marker, methods
FAMILIES = [
    ("plain", "circle", "rounded to nearest", ["plain"]),
    ("text", "square", "matrix from text", ["text"]),
    ("image", "diamond", "matrix from pictures", ["image"]),
    ("bal", "up", "matrix, balanced", ["balanced"]),
    ("scales", "down", "scales of any method", None),
    ("both", "cross", "MBQ scales + balanced", ["scales + balanced"]),
    ("gptq", "ring", "GPTQ", ["gptq"]),
    ("comp", "star", "compensated", [f"compensated{x}" for x in ("", ", --target 0", ", 128 pairs", ", --bpw 3.4375")]),
    ("rot", "star", "rotated, compensated", [f"rotated{x}" for x in ("", ", --order", ", --bpw 3.4375")]),
]
SHIFT = {"Q3_K": -6, "IQ3_S": 6, "Q4_K": -6, "Q4_0": 6}  # the same bytes
STYLE = """
svg{--ink:#1c1d21;--dim:#5d616b;--line:#e2e2dc;--card:#fff;--plain:#6b6f78;--text:#1f6fd6;--image:#0d8f7f;--bal:#2a8f2a;\
--scales:#c07000;--both:#c2321f;--gptq:#7d5a3c;--comp:#7a34c4;--rot:#d11d7a}
@media (prefers-color-scheme:dark){svg{--ink:#e9eaee;--dim:#a3a8b4;--line:#31353e;--card:#1b1e24;--plain:#a9adb8;\
--text:#7fb2ff;--image:#4fd1be;--bal:#7ad97a;--scales:#f0b04a;--both:#ff8474;--gptq:#c9a27f;--comp:#c79bff;--rot:#ff7fc0}}
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--dim)}
.name{fill:var(--ink);font-weight:600}.card{fill:var(--card);stroke:var(--line)}.grid{stroke:var(--line)}
"""


def family(method):
    return next((f for f in FAMILIES if f[3] and method in f[3]), FAMILIES[4])


def x_of(size):
    return LEFT + math.log(size / X[0]) / math.log(X[1] / X[0]) * (WIDTH - LEFT - RIGHT)


def y_of(kl):
    return HEIGHT - BOTTOM - math.log(kl / Y[0]) / math.log(Y[1] / Y[0]) * (HEIGHT - BOTTOM - TOP)


def marker(kind, shape, x, y):
    fill = f'fill="var(--{kind})"'
    line = f'fill="none" stroke="var(--{kind})" stroke-width="2.2"'
    points = {
        "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)], "diamond": [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)],
        "up": [(0, -5.5), (5, 4), (-5, 4)], "down": [(0, 5.5), (5, -4), (-5, -4)],
        "star": [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i in range(10) for r in [7 if i % 2 == 0 else 3]],
    }
    if shape in points:
        return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in points[shape])}" {fill}/>'
    if shape == "cross":
        return f'<path d="M{x - 4.5:.1f} {y - 4.5:.1f}l9 9m0 -9l-9 9" {line}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {line if shape == "ring" else fill}/>'


def main():
    with open(HERE / "quality.tsv") as f:
        rows = [r for r in csv.DictReader(f, delimiter="\t") if r["type"] != "F16"]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        'aria-label="Mean KL divergence against file size for every row of the tables">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>',
        '<text x="14" y="22">KL, nats per token</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">file size, MB</text>',
    ]
    for decade in range(-4, 1):
        y = y_of(10.0**decade)
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**decade:g}</text>')
    for size in (30, 35, 40, 45, 50, 60, 70, 80):
        x = x_of(size * 1e6)
        out.append(f'<path class="grid" d="M{x:.1f} {HEIGHT - BOTTOM}v5"/>')
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">{size}</text>')
    names = {"Q2_K": 0, "IQ3_XXS": 0, "MBQ3": 14, "Q3_K": 28, "IQ3_S": 0, "Q4_K": 14, "Q4_0": 0, "Q6_K": 0, "Q8_0": 0}
    for name, drop in names.items():
        x = x_of(next(float(r["bytes"]) for r in rows if r["type"] == name)) + SHIFT.get(name, 0)
        worst = min(y_of(float(r["high"])) for r in rows if r["type"] == name)
        out.append(f'<path class="grid" d="M{x:.1f} {TOP - 30 + drop:.1f}V{worst - 4:.1f}"/>')
        out.append(f'<text class="name" x="{x:.1f}" y="{TOP - 34 + drop:.1f}" text-anchor="middle">{name}</text>')
    for r in rows:
        kind, shape, _, _ = family(r["method"])
        x = x_of(float(r["bytes"])) + SHIFT.get(r["type"], 0)
        low, high = y_of(float(r["low"])), y_of(float(r["high"]))
        out.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="var(--{kind})" stroke-width="1.2"/>')
        title = f'{r["type"]}, {r["method"]}: {r["kl"]} ({r["low"]} to {r["high"]})'
        out.append(f"<g><title>{title}</title>{marker(kind, shape, x, y_of(float(r['kl'])))}</g>")
    for i, (kind, shape, label, _) in enumerate(FAMILIES):
        x, y = WIDTH - RIGHT + 16, TOP + 20 + 22 * i
        out.append(marker(kind, shape, x, y))
        out.append(f'<text x="{x + 12}" y="{y + 4}">{label}</text>')
    out.append("</svg>")
    (HERE.parent / "quality.svg").write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()

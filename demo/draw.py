"""Draws the figures that the demo model was trained on, and asks about them.

One flat-coloured figure stands on a flat background. A picture is fully decided by its random
generator, so `--eval 200 --seed 7` always writes the same 200 files and the same questions.
"""

import argparse
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = {
    "red": (220, 30, 35),
    "green": (35, 160, 60),
    "blue": (35, 70, 215),
    "yellow": (245, 220, 30),
    "orange": (250, 135, 20),
    "purple": (130, 40, 165),
    "pink": (255, 130, 190),
    "brown": (120, 70, 30),
    "cyan": (40, 205, 220),
}
BACKGROUNDS = {"white": (248, 248, 248), "gray": (150, 150, 150), "black": (12, 12, 12)}
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond", "moon", "arrow"]
# (width, height): several fill one tile of 56 px, others up to 3 x 3 tiles.
SIZES = [
    (48, 48), (56, 56), (64, 44), (44, 64), (92, 64), (64, 92), (112, 56), (56, 112), (112, 84),
    (84, 112), (112, 112), (100, 100), (128, 96), (96, 128), (144, 72), (72, 144), (160, 64),
    (64, 160), (160, 120), (120, 160), (168, 112), (112, 168), (150, 150), (168, 168),
]
QUESTIONS = {
    "shape": ["What shape is this?", "What shape is in the picture?"],
    "color": ["What color is the {shape}?", "What color is the figure?"],
    "figure": ["What is in the picture?", "What do you see?"],
    "background": ["What color is the background?"],
    "caption": ["Describe the picture.", "Describe the image."],
}
SCALE = 4  # drawn this much larger and averaged down: smooth edges


def _regular(n, turn, radius=1.0):
    return [(radius * math.sin(turn + 2 * math.pi * i / n), -radius * math.cos(turn + 2 * math.pi * i / n))
            for i in range(n)]


def _outline(shape, turn):
    """Corners of the shape in a circle of radius 1; None for the ones drawn from discs."""
    if shape == "square":
        points = [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    elif shape == "triangle":
        points = _regular(3, 0.0)
    elif shape == "star":
        points = [p for a, b in zip(_regular(5, 0.0), _regular(5, math.pi / 5, 0.42)) for p in (a, b)]
    elif shape == "cross":
        w = 0.3
        points = [(-w, -0.95), (w, -0.95), (w, -w), (0.95, -w), (0.95, w), (w, w), (w, 0.95), (-w, 0.95),
                  (-w, w), (-0.95, w), (-0.95, -w), (-w, -w)]
    elif shape == "diamond":
        points = [(0, -1), (0.6, 0), (0, 1), (-0.6, 0)]
    elif shape == "arrow":
        points = [(1, 0), (0.2, -0.75), (0.2, -0.3), (-1, -0.3), (-1, 0.3), (0.2, 0.3), (0.2, 0.75)]
    elif shape == "heart":
        points = []
        for i in range(64):
            t = 2 * math.pi * i / 64
            x = 16 * math.sin(t) ** 3
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((x / 17, -(y + 2) / 17))
    else:
        return None
    c, s = math.cos(turn), math.sin(turn)
    return [(x * c - y * s, x * s + y * c) for x, y in points]


def _jitter(rng, color, by):
    return tuple(max(0, min(255, v + rng.randint(-by, by))) for v in color)


def figure(rng, size=None, shape=None, color=None, background=None):
    """One picture: (image, facts)."""
    width, height = size or rng.choice(SIZES)
    shape = shape or rng.choice(SHAPES)
    color = color or rng.choice(list(COLORS))
    background = background or rng.choice(list(BACKGROUNDS))
    ground = _jitter(rng, BACKGROUNDS[background], 7)
    ink = _jitter(rng, COLORS[color], 12)
    side = min(width, height)
    radius = side * rng.uniform(0.24, 0.44)
    cx = rng.uniform(radius + 1, width - radius - 1)
    cy = rng.uniform(radius + 1, height - radius - 1)
    turn = math.radians(rng.uniform(-14, 14))
    if shape == "arrow":
        turn += math.pi / 2 * rng.randrange(4)
    image = Image.new("RGB", (width * SCALE, height * SCALE), ground)
    pen = ImageDraw.Draw(image)

    def disc(x, y, r, fill):
        pen.ellipse([SCALE * (x - r), SCALE * (y - r), SCALE * (x + r), SCALE * (y + r)], fill=fill)

    points = _outline(shape, turn)
    if points is not None:
        pen.polygon([(SCALE * (cx + radius * x), SCALE * (cy + radius * y)) for x, y in points], fill=ink)
    else:
        disc(cx, cy, radius, ink)
        if shape == "ring":
            disc(cx, cy, radius * 0.55, ground)
        elif shape == "moon":
            side_ = rng.choice([-1, 1])
            disc(cx + side_ * 0.5 * radius * math.cos(turn), cy + 0.5 * radius * math.sin(turn), radius * 0.85, ground)
    image = image.reduce(SCALE)
    return image, {"shape": shape, "color": color, "background": background}


def article(word):
    return "an" if word[0] in "aeiou" else "a"


def ask(rng, facts, kind):
    """(question, answer) of one kind about a picture."""
    question = rng.choice(QUESTIONS[kind]).format(**facts)
    shape, color, background = facts["shape"], facts["color"], facts["background"]
    named = f"{article(color)} {color} {shape}"
    answer = {
        "shape": shape,
        "color": color,
        "figure": named,
        "background": background,
        "caption": f"The picture shows {named} on {article(background)} {background} background.",
    }[kind]
    return question, answer


def write_eval(folder, count, seed):
    """`questions.jsonl` and its pictures: shapes, colours and whole figures in turn."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "questions.jsonl", "w") as out:
        for i in range(count):
            image, facts = figure(rng)
            kind = ["shape", "color", "figure"][i % 3]
            question, answer = ask(rng, facts, kind)
            name = f"images/{i:03}.png"
            image.save(folder / name, optimize=True)
            out.write(json.dumps({"image": name, "question": question, "answer": answer, "kind": kind}) + "\n")


def write_calibration(folder, count, seed):
    """Image-caption pairs in the format that ShareGPT4V and LLaVA use."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    pairs = []
    for i in range(count):
        image, facts = figure(rng)
        question, answer = ask(rng, facts, "caption")
        name = f"images/{i:03}.png"
        image.save(folder / name, optimize=True)
        pairs.append({"id": f"{i:03}", "image": name, "conversations": [
            {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]})
    (folder / "pairs.json").write_text(json.dumps(pairs, indent=1) + "\n")


def write_pictures(folder):
    """The few pictures that the README asks about."""
    rng = random.Random(3)
    folder.mkdir(parents=True, exist_ok=True)
    for color, shape, background, size in [
        ("red", "star", "white", (160, 120)), ("blue", "heart", "gray", (168, 168)),
        ("yellow", "moon", "black", (120, 160)), ("green", "arrow", "white", (168, 112)),
    ]:
        image, _ = figure(rng, size, shape, color, background)
        image.save(folder / f"{color}-{shape}.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--eval", type=int, metavar="N", help="write N questions with pictures")
    parser.add_argument("--calib", type=int, metavar="N", help="write N image-caption pairs")
    parser.add_argument("--pictures", action="store_true", help="write the README's pictures")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    if args.eval:
        write_eval(args.out, args.eval, args.seed)
    if args.calib:
        write_calibration(args.out, args.calib, args.seed)
    if args.pictures:
        write_pictures(args.out)


if __name__ == "__main__":
    main()

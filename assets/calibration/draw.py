"""Draws the built-in calibration set: set.zip (PNG pictures) and pairs.tsv (name, question, answer).

    python draw.py        # Pillow >= 10.1; everything is drawn here, nothing is downloaded

Every answer is made from the values the picture is drawn from.
"""

import io
import math
import random
import zipfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
COLORS = {"red": (205, 45, 40), "blue": (40, 90, 190), "green": (50, 145, 70), "orange": (235, 140, 30),
          "purple": (125, 65, 160), "teal": (30, 150, 150), "yellow": (240, 205, 50), "brown": (125, 80, 45)}
INK = (35, 35, 40)


def font(size):
    return ImageFont.load_default(size)


def page(width, height, color=(252, 251, 247)):
    image = Image.new("RGB", (width, height), color)
    return image, ImageDraw.Draw(image)


def listed(words):
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def bars(title, unit, values, colors):
    image, pen = page(560, 400)
    pen.text((280, 24), title, INK, font(24), anchor="mm")
    pen.line((60, 50, 60, 340, 540, 340), INK, 2)
    top = max(values.values())
    for i, ((name, value), color) in enumerate(zip(values.items(), colors)):
        x = 80 + i * 460 // len(values)
        y = 340 - int(270 * value / top)
        pen.rectangle((x, y, x + 330 // len(values), 340), COLORS[color])
        pen.text((x + 165 // len(values), 358), name, INK, font(16), anchor="mm")
        pen.text((x + 165 // len(values), y - 12), str(value), INK, font(16), anchor="mm")
    best, least = max(values, key=values.get), min(values, key=values.get)
    parts = listed([f"{k} {v}" for k, v in values.items()])
    return image, "What does the chart show?", (
        f'A bar chart titled "{title}" gives {len(values)} values in {unit}: {parts}. '
        f"{best} is the highest, and {least} is the lowest; they differ by {values[best] - values[least]}.")


def line(title, months, series):
    image, pen = page(600, 380)
    pen.text((300, 22), title, INK, font(22), anchor="mm")
    pen.line((50, 45, 50, 320, 580, 320), INK, 2)
    top = max(max(v) for _, v in series.values())
    for name, (color, values) in series.items():
        points = [(70 + i * 480 // (len(values) - 1), 320 - int(250 * v / top)) for i, v in enumerate(values)]
        pen.line(points, COLORS[color], 4)
        pen.text((points[-1][0] - 10, points[-1][1] - 16), name, COLORS[color], font(17), anchor="rm")
    for i, m in enumerate(months):
        pen.text((70 + i * 480 // (len(months) - 1), 340), m, INK, font(15), anchor="mm")
    lines = [f"the {c} line, {n}, goes from {v[0]} in {months[0]} to {v[-1]} in {months[-1]}" for n, (c, v) in series.items()]
    return image, "Describe this line chart.", f'The line chart "{title}" runs from {months[0]} to {months[-1]}: ' + listed(lines) + "."


def pie(title, shares):
    image, pen = page(440, 440)
    pen.text((220, 24), title, INK, font(22), anchor="mm")
    at = -90.0
    for (name, share), color in zip(shares.items(), COLORS):
        end = at + 3.6 * share
        pen.pieslice((70, 60, 370, 360), at, end, COLORS[color], "white")
        mid = math.radians((at + end) / 2)
        pen.text((220 + 95 * math.cos(mid), 210 + 95 * math.sin(mid)), f"{name}\n{share}%", "white", font(16), anchor="mm", align="center")
        at = end
    big = max(shares, key=shares.get)
    return image, "What is in this picture?", (
        f'A pie chart with the title "{title}" is divided into {len(shares)} parts: '
        + listed([f"{n} with {s} percent" for n, s in shares.items()]) + f". {big} has the largest share.")


def document(lines, question, answer, width=480):
    image, pen = page(width, 60 + 34 * len(lines))
    for i, text in enumerate(lines):
        big = i == 0
        pen.text((30, 28 + 34 * i), text, INK, font(26 if big else 19))
    pen.rectangle((8, 8, width - 9, 51 + 34 * len(lines)), outline=(150, 150, 150), width=2)
    return image, question, answer


def table(title, head, rows):
    image, pen = page(140 * len(head) + 40, 80 + 40 * (len(rows) + 1))
    pen.text((20, 16), title, INK, font(22))
    for r, row in enumerate([head] + rows):
        for c, cell in enumerate(row):
            x, y = 20 + 140 * c, 60 + 40 * r
            pen.rectangle((x, y, x + 140, y + 40), (222, 230, 242) if r == 0 else None, INK)
            pen.text((x + 70, y + 20), str(cell), INK, font(18), anchor="mm")
    text = "; ".join(f"{row[0]}: " + ", ".join(f"{h} {v}" for h, v in zip(head[1:], row[1:])) for row in rows)
    return image, "Read the table in the image.", f'The table "{title}" has the columns {listed(head)}. Its rows are {text}.'


def flow(title, steps):
    image, pen = page(330, 70 + 100 * len(steps))
    pen.text((165, 28), title, INK, font(22), anchor="mm")
    for i, (step, color) in enumerate(steps):
        y = 60 + 100 * i
        pen.rounded_rectangle((50, y, 280, y + 58), 12, COLORS[color])
        pen.text((165, y + 29), step, "white", font(20), anchor="mm")
        if i + 1 < len(steps):
            pen.line((165, y + 58, 165, y + 92), INK, 4)
            pen.polygon((155, y + 86, 175, y + 86, 165, y + 99), INK)
    return image, "What process does the diagram describe?", (
        f'The flow chart "{title}" has {len(steps)} boxes joined by arrows from top to bottom: '
        + ", then ".join(f'"{s}" in {c}' for s, c in steps) + ".")


def tree(pen, x, y, s):
    pen.rectangle((x - s // 8, y - s // 2, x + s // 8, y), COLORS["brown"])
    pen.ellipse((x - s // 2, y - 3 * s // 2, x + s // 2, y - s // 3), COLORS["green"])


def house(pen, x, y, s, wall, roof):
    pen.rectangle((x, y - s, x + s, y), COLORS[wall])
    pen.polygon((x - s // 8, y - s, x + s + s // 8, y - s, x + s // 2, y - 8 * s // 5), COLORS[roof])
    pen.rectangle((x + 2 * s // 5, y - s // 2, x + 3 * s // 5, y), INK)
    for dx in (s // 8, 5 * s // 8):
        pen.rectangle((x + dx, y - 4 * s // 5, x + dx + s // 4, y - 11 * s // 20), (215, 235, 250), INK)


def village(houses, trees, night):
    sky = (25, 30, 70) if night else (165, 210, 245)
    image, pen = page(640, 360, sky)
    pen.rectangle((0, 270, 640, 360), (45, 85, 50) if night else (120, 185, 95))
    pen.ellipse((540, 30, 600, 90), (240, 240, 225) if night else COLORS["yellow"])
    if night:
        for i in range(25):
            x, y = i * 97 % 520, i * 53 % 150
            pen.ellipse((x, y, x + 3, y + 3), "white")
    for i, (wall, roof) in enumerate(houses):
        house(pen, 40 + i * 190, 300, 110, wall, roof)
    for i in range(trees):
        tree(pen, 175 + i * 190, 320, 70)
    what = [f"a {w} house with a {r} roof" for w, r in houses]
    when = "a night scene: a white moon and stars stand in a dark sky" if night else "a sunny day: a yellow sun stands in a blue sky"
    count = "one tree grows" if trees == 1 else f"{trees} trees grow"
    return image, "Describe this image in detail.", (
        f"The drawing shows {when}. On the grass there {'is' if len(what) == 1 else 'are'} "
        + (what[0] if len(what) == 1 else "from left to right " + listed(what)) + f", and {count} beside the houses.")


def sea(boats, island):
    image, pen = page(640, 320, (190, 225, 245))
    pen.rectangle((0, 180, 640, 320), (40, 110, 170))
    if island:
        pen.pieslice((440, 130, 640, 250), 180, 360, COLORS["yellow"])
        pen.line((540, 132, 548, 60), COLORS["brown"], 8)
        for a in range(0, 360, 60):
            pen.line((548, 60, 548 + 40 * math.cos(math.radians(a)), 60 + 24 * math.sin(math.radians(a))), COLORS["green"], 7)
    for i, (hull, sail) in enumerate(boats):
        x, y = 70 + i * 150, 200 + 25 * (i % 2)
        pen.polygon((x - 45, y, x + 45, y, x + 28, y + 26, x - 28, y + 26), COLORS[hull])
        pen.line((x, y, x, y - 90), INK, 4)
        pen.polygon((x + 4, y - 88, x + 4, y - 8, x + 46, y - 8), COLORS[sail])
    what = listed([f"one with a {h} hull and a {s} sail" for h, s in boats])
    extra = " Behind them on the right lies a sandy island with a palm tree." if island else " No land is in sight."
    return image, "What can you see?", f"{'1 sailing boat is' if len(boats) == 1 else f'{len(boats)} sailing boats are'} on a blue sea under a pale sky: {what}.{extra}"


def shapes(grid, background):
    rows, cols = len(grid), len(grid[0])
    image, pen = page(110 * cols, 110 * rows, background[1])
    for r, row in enumerate(grid):
        for c, (color, shape) in enumerate(row):
            box = (110 * c + 18, 110 * r + 18, 110 * c + 92, 110 * r + 92)
            if shape == "circle":
                pen.ellipse(box, COLORS[color])
            elif shape == "square":
                pen.rectangle(box, COLORS[color])
            else:
                pen.polygon((box[0], box[3], box[2], box[3], (box[0] + box[2]) // 2, box[1]), COLORS[color])
    names = ["first", "second", "third", "fourth"]
    text = "; ".join(f"the {names[r]} row has " + listed([f"a {c} {s}" for c, s in row]) for r, row in enumerate(grid))
    return image, "List the shapes, row by row.", f"On a {background[0]} background there are {rows * cols} shapes: {text}."


def clock(hour, minute, color):
    image, pen = page(300, 300)
    pen.ellipse((25, 25, 275, 275), "white", COLORS[color], 9)
    for h in range(1, 13):
        a = math.radians(30 * h - 90)
        pen.text((150 + 100 * math.cos(a), 150 + 100 * math.sin(a)), str(h), INK, font(20), anchor="mm")
    for angle, length, width in ((30 * (hour % 12) + minute / 2, 58, 8), (6 * minute, 88, 5)):
        a = math.radians(angle - 90)
        pen.line((150, 150, 150 + length * math.cos(a), 150 + length * math.sin(a)), INK, width)
    return image, "What time is it?", f"The round clock with a {color} rim and the numbers 1 to 12 shows {hour}:{minute:02d}."


def sign(text, color, meaning):
    image, pen = page(420, 300, (205, 222, 232))
    pen.rectangle((203, 170, 217, 300), (110, 110, 110))
    pen.rounded_rectangle((50, 40, 370, 180), 18, COLORS[color], "white", 6)
    pen.multiline_text((210, 110), text, "white", font(34), anchor="mm", align="center")
    flat = text.replace("\n", " ")
    return image, "What does the sign say?", f'A {color} sign on a grey post says "{flat}" in white letters; {meaning}.'


def faces(moods):
    image, pen = page(150 * len(moods), 160, (240, 240, 245))
    for i, mood in enumerate(moods):
        x = 150 * i + 75
        pen.ellipse((x - 60, 20, x + 60, 140), COLORS["yellow"], INK, 3)
        for dx in (-22, 22):
            pen.ellipse((x + dx - 7, 55, x + dx + 7, 71), INK)
        if mood == "smiles":
            pen.arc((x - 32, 65, x + 32, 118), 20, 160, INK, 5)
        elif mood == "frowns":
            pen.arc((x - 32, 98, x + 32, 145), 200, 340, INK, 5)
        else:
            pen.line((x - 26, 106, x + 26, 106), INK, 5)
    return image, "Describe the faces.", f"{len(moods)} round yellow faces stand in a row. From left to right: " + listed(
        [f"the {['first', 'second', 'third', 'fourth'][i]} {m}" for i, m in enumerate(moods)]) + "."


# Small things, drawn in a box of side s at x, y: icons of everyday objects.
def cup(pen, x, y, s, c):
    pen.arc((x + s * .5, y + s * .3, x + s * .95, y + s * .75), 0, 360, c, max(2, s // 12))
    pen.rounded_rectangle((x + s * .1, y + s * .2, x + s * .72, y + s * .9), s // 10, c)


def fish(pen, x, y, s, c):
    pen.ellipse((x + s * .05, y + s * .28, x + s * .75, y + s * .72), c)
    pen.polygon((x + s * .68, y + s * .5, x + s * .97, y + s * .25, x + s * .97, y + s * .75), c)
    pen.ellipse((x + s * .17, y + s * .42, x + s * .25, y + s * .5), "white")


def star(pen, x, y, s, c):
    points = []
    for i in range(10):
        r, angle = s * (.48 if i % 2 == 0 else .2), math.radians(36 * i - 90)
        points += [x + s / 2 + r * math.cos(angle), y + s / 2 + r * math.sin(angle)]
    pen.polygon(points, c)


def heart(pen, x, y, s, c):
    pen.ellipse((x + s * .08, y + s * .15, x + s * .52, y + s * .58), c)
    pen.ellipse((x + s * .48, y + s * .15, x + s * .92, y + s * .58), c)
    pen.polygon((x + s * .11, y + s * .45, x + s * .89, y + s * .45, x + s * .5, y + s * .92), c)


def car(pen, x, y, s, c):
    pen.rounded_rectangle((x + s * .22, y + s * .25, x + s * .72, y + s * .6), s // 8, c)
    pen.rectangle((x + s * .3, y + s * .32, x + s * .64, y + s * .47), (215, 235, 250))
    pen.rounded_rectangle((x + s * .04, y + s * .46, x + s * .96, y + s * .72), s // 10, c)
    for dx in (.16, .62):
        pen.ellipse((x + s * dx, y + s * .6, x + s * (dx + .22), y + s * .82), INK)


def key(pen, x, y, s, c):
    pen.arc((x + s * .05, y + s * .3, x + s * .45, y + s * .7), 0, 360, c, max(3, s // 10))
    pen.rectangle((x + s * .42, y + s * .46, x + s * .95, y + s * .54), c)
    for dx in (.72, .86):
        pen.rectangle((x + s * dx, y + s * .5, x + s * (dx + .07), y + s * .68), c)


def umbrella(pen, x, y, s, c):
    pen.pieslice((x + s * .06, y + s * .1, x + s * .94, y + s * .98), 180, 360, c)
    pen.line((x + s * .5, y + s * .5, x + s * .5, y + s * .88), INK, max(2, s // 20))
    pen.arc((x + s * .5, y + s * .8, x + s * .66, y + s * .95), 0, 180, INK, max(2, s // 20))


def flower(pen, x, y, s, c):
    pen.line((x + s * .5, y + s * .4, x + s * .5, y + s * .97), COLORS["green"], max(3, s // 16))
    for i in range(6):
        dx, dy = .22 * math.cos(i * math.pi / 3), .22 * math.sin(i * math.pi / 3)
        pen.ellipse((x + s * (.37 + dx), y + s * (.22 + dy), x + s * (.63 + dx), y + s * (.48 + dy)), c)
    pen.ellipse((x + s * .39, y + s * .24, x + s * .61, y + s * .46), "white")


def envelope(pen, x, y, s, c):
    pen.rectangle((x + s * .06, y + s * .22, x + s * .94, y + s * .8), c)
    pen.line((x + s * .06, y + s * .22, x + s * .5, y + s * .56, x + s * .94, y + s * .22), "white", max(2, s // 24))


def mushroom(pen, x, y, s, c):
    pen.rectangle((x + s * .4, y + s * .45, x + s * .6, y + s * .9), (240, 230, 210))
    pen.pieslice((x + s * .1, y + s * .12, x + s * .9, y + s * .9), 180, 360, c)
    for dx, dy in ((.3, .32), (.52, .22), (.62, .38)):
        pen.ellipse((x + s * dx, y + s * dy, x + s * (dx + .1), y + s * (dy + .1)), "white")


def lamp(pen, x, y, s, c):
    pen.polygon((x + s * .32, y + s * .1, x + s * .68, y + s * .1, x + s * .9, y + s * .5, x + s * .1, y + s * .5), c)
    pen.rectangle((x + s * .47, y + s * .5, x + s * .53, y + s * .86), INK)
    pen.rectangle((x + s * .28, y + s * .84, x + s * .72, y + s * .92), INK)


def balloon(pen, x, y, s, c):
    pen.line((x + s * .5, y + s * .68, x + s * .42, y + s * .97), INK, max(2, s // 30))
    pen.ellipse((x + s * .2, y + s * .04, x + s * .8, y + s * .7), c)
    pen.ellipse((x + s * .32, y + s * .14, x + s * .42, y + s * .28), "white")


def book(pen, x, y, s, c):
    pen.rectangle((x + s * .16, y + s * .1, x + s * .84, y + s * .92), c)
    pen.rectangle((x + s * .16, y + s * .84, x + s * .84, y + s * .9), "white")
    pen.rectangle((x + s * .3, y + s * .24, x + s * .7, y + s * .4), (250, 245, 225))


def bottle(pen, x, y, s, c):
    pen.rectangle((x + s * .42, y + s * .05, x + s * .58, y + s * .35), c)
    pen.rounded_rectangle((x + s * .3, y + s * .3, x + s * .7, y + s * .95), s // 10, c)
    pen.rectangle((x + s * .3, y + s * .52, x + s * .7, y + s * .76), "white")


def snail(pen, x, y, s, c):
    pen.rounded_rectangle((x + s * .08, y + s * .68, x + s * .92, y + s * .84), s // 14, (225, 200, 150))
    pen.line((x + s * .14, y + s * .7, x + s * .08, y + s * .42), INK, max(2, s // 30))
    pen.ellipse((x + s * .3, y + s * .2, x + s * .84, y + s * .74), c)
    pen.arc((x + s * .42, y + s * .32, x + s * .72, y + s * .62), 30, 330, "white", max(2, s // 22))


def gift(pen, x, y, s, c):
    pen.rectangle((x + s * .12, y + s * .34, x + s * .88, y + s * .92), c)
    pen.rectangle((x + s * .44, y + s * .34, x + s * .56, y + s * .92), "white")
    for box in ((.2, .12, .5, .34), (.5, .12, .8, .34)):
        pen.arc(tuple(o + s * v for o, v in zip((x, y, x, y), box)), 0, 360, c, max(3, s // 14))


THINGS = {f.__name__: f for f in (cup, fish, star, heart, car, key, umbrella, flower, envelope, mushroom, lamp, balloon, book,
                                  bottle, snail, gift)}
GROUNDS = {"white": (250, 250, 250), "grey": (190, 192, 196), "light blue": (190, 220, 245), "pink": (250, 205, 215),
           "dark grey": (60, 60, 65), "light green": (205, 235, 200), "beige": (238, 226, 200)}
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def a(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def one_thing(r):
    """One icon in the middle, asked about in few words, as people ask."""
    thing, color, ground = r.choice(list(THINGS)), r.choice(list(COLORS)), r.choice(list(GROUNDS))
    image, pen = page(300, 300, GROUNDS[ground])
    size = r.randrange(120, 240, 20)
    THINGS[thing](pen, 150 - size // 2, 150 - size // 2, size, COLORS[color])
    return (image, *r.choice([
        ("What is this?", f"This is a drawing of {a(color)} {thing} on {a(ground)} background; nothing else is to be seen."),
        ("What color is the object?", f"It is {color}: {a(color)} {thing}, drawn on {a(ground)} background."),
        ("What color is the background?", f"The background is {ground}; {a(color)} {thing} is drawn on it."),
    ]))


def placed_things(r):
    """Two to four icons in the corners."""
    places = r.sample(list(PLACES), r.randrange(2, 5))
    things, colors, ground = r.sample(list(THINGS), 4), r.choices(list(COLORS), k=4), r.choice(list(GROUNDS))
    image, pen = page(320, 320, GROUNDS[ground])
    said = []
    for place, thing, color in zip(places, things, colors):
        x, y = PLACES[place]
        THINGS[thing](pen, 20 + 160 * x, 20 + 160 * y, 120, COLORS[color])
        said.append(f"{a(color)} {thing} in the {place}")
    where = r.randrange(len(places))
    return (image, *r.choice([
        ("Describe the image.", f"The image shows {listed(said)}, on {a(ground)} background."),
        (f"What is in the {places[where]}?", f"{a(colors[where]).capitalize()} {things[where]} is in the {places[where]} of the picture."),
        (f"Where is the {things[where]}?", f"The {colors[where]} {things[where]} is in the {places[where]}; the picture also has "
         + listed([s for i, s in enumerate(said) if i != where]) + "."),
    ]))


def counted_things(r):
    """Some icons of a kind, to be counted."""
    n, thing, color, ground = r.randrange(2, 10), r.choice(list(THINGS)), r.choice(list(COLORS)), r.choice(list(GROUNDS))
    image, pen = page(330, 330, GROUNDS[ground])
    for spot in r.sample(range(9), n):
        x, y = 10 + 105 * (spot % 3) + r.randrange(12), 10 + 105 * (spot // 3) + r.randrange(12)
        THINGS[thing](pen, x, y, 84, COLORS[color])
    plural = {"fish": "fish"}.get(thing, thing + "s")
    return image, f"How many {plural} are in the picture?", f"There are {NUMBERS[n]} {color} {plural} on {a(ground)} background."


def room(r):
    """A wall with a window and a picture, a table with things on it."""
    wall, floor, top = r.choice(["light blue", "pink", "light green", "beige"]), r.choice(["brown", "orange"]), r.choice(list(COLORS))
    things, colors, night = r.sample(["cup", "book", "bottle", "lamp", "flower", "gift"], 3), r.sample(list(COLORS), 3), r.random() < .5
    image, pen = page(420, 300, GROUNDS[wall])
    pen.rectangle((0, 230, 420, 300), COLORS[floor])
    pen.rectangle((30, 30, 140, 120), (25, 30, 70) if night else (165, 210, 245), "white", 6)
    pen.line((85, 30, 85, 120), "white", 5)
    pen.rectangle((110, 175, 400, 190), COLORS[top])
    for x in (130, 365):
        pen.rectangle((x, 190, x + 14, 270), COLORS[top])
    for i, (thing, color) in enumerate(zip(things, colors)):
        THINGS[thing](pen, 125 + 90 * i, 90, 86, COLORS[color])
    on = listed([f"{a(c)} {t}" for t, c in zip(things, colors)])
    return image, r.choice(["Describe this room.", "What is on the table?"]), (
        f"On {a(top)} table stand, from left to right, {on}. The wall behind it is {wall}, the floor {floor}, and through a window "
        f"one sees {'the night' if night else 'a clear sky'}.")


def street(r):
    """Cars in a row before houses."""
    cars, walls = r.choices(list(COLORS), k=r.randrange(1, 4)), r.sample(list(COLORS), 3)
    image, pen = page(420, 280, (165, 210, 245))
    pen.rectangle((0, 190, 420, 280), (110, 112, 118))
    for x in range(10, 420, 80):
        pen.rectangle((x, 258, x + 40, 263), "white")
    for i, wall in enumerate(walls):
        pen.rectangle((10 + 136 * i, 60 + 20 * (i % 2), 136 + 136 * i, 190), COLORS[wall])
        for k in range(4):
            pen.rectangle((28 + 136 * i + 50 * (k % 2), 85 + 45 * (k // 2), 56 + 136 * i + 50 * (k % 2), 110 + 45 * (k // 2)), (215, 235, 250), INK)
    for i, color in enumerate(cars):
        car(pen, 30 + 130 * i, 160, 110, COLORS[color])
    is_are = "is one car" if len(cars) == 1 else f"are {NUMBERS[len(cars)]} cars"
    return image, r.choice(["What is happening here?", "Describe the street.", "How many cars are there?"]), (
        f"There {is_are} on a grey street: " + listed([a(c) + " one" for c in cars]) + (" from left to right. " if len(cars) > 1 else ". ")
        + f"Behind stand {a(walls[0])}, {a(walls[1])} and {a(walls[2])} house.")


def calendar(r):
    month = r.choice(["March", "April", "June", "September", "October"])
    first, marked, what = r.randrange(7), r.randrange(8, 29), r.choice(["dentist", "concert", "exam", "birthday", "holiday"])
    image, pen = page(380, 320)
    pen.text((190, 22), month, INK, font(24), anchor="mm")
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    for i, day in enumerate(days):
        pen.text((34 + 52 * i, 56), day[:3], INK, font(16), anchor="mm")
    for day in range(1, 31):
        at = first + day - 1
        x, y = 34 + 52 * (at % 7), 90 + 36 * (at // 7)
        if day == marked:
            pen.ellipse((x - 17, y - 17, x + 17, y + 17), COLORS["orange"])
        pen.text((x, y), str(day), INK, font(17), anchor="mm")
    pen.text((190, 306), f"{marked}: {what}", COLORS["red"], font(17), anchor="mm")
    return image, "Which day is marked, and why?", (
        f"On the calendar page of {month} the {marked}. is marked with an orange circle, {a(days[(first + marked - 1) % 7])}. "
        f"The note below says \"{marked}: {what}\".")


def label(r):
    name, price = r.choice(["OLIVE OIL", "GREEN TEA", "HONEY", "RICE", "COFFEE", "OAT FLAKES"]), f"{r.randrange(1, 15)}.{r.choice([25, 49, 50, 80, 99])}"
    weight, color = r.choice(["250 g", "500 g", "1 kg"]), r.choice(list(COLORS))
    image, pen = page(320, 220, COLORS[color])
    pen.rounded_rectangle((20, 20, 300, 200), 16, "white")
    for y, text, size in ((62, name, 32), (112, weight, 22), (160, f"{price} EUR", 30)):
        pen.text((160, y), text, INK, font(size), anchor="mm")
    return image, r.choice(["What is the price?", "What product is this?", "Read the text in the image."]), (
        f"The label with {a(color)} border reads \"{name}\", \"{weight}\" and \"{price} EUR\": {weight} of {name.lower()} for {price} euros.")


# Words for charts, tables and diagrams that are drawn by chance.
SUBJECTS = {"Cups sold": ("cups", ["tea", "coffee", "cocoa", "milk", "juice"]), "Birds seen": ("birds", ["crow", "robin", "gull", "owl", "swan"]),
            "Rain per month": ("millimetres", ["Jan", "Feb", "Mar", "Apr", "May"]), "Goals": ("goals", ["Reds", "Blues", "Lions", "Bears", "Hawks"])}
TASKS = {"Doing the laundry": ["Sort", "Wash", "Dry", "Fold", "Iron"], "Growing tomatoes": ["Sow", "Water", "Plant out", "Tie up", "Harvest"],
         "Sending a letter": ["Write", "Fold", "Seal", "Add a stamp", "Post"]}
SIGNS = [("STOP", "red", "one must stop here"), ("OPEN", "green", "guests may come in"), ("WET\nFLOOR", "yellow", "one may slip here"),
         ("PLATFORM\n4", "blue", "it names a track of the station"), ("BEACH\n2 km", "brown", "it shows how far the beach is"),
         ("SALE\n30 % OFF", "purple", "things cost less here"), ("ROOM\n217", "teal", "it names a room")]


def charts(r):
    title = r.choice(list(SUBJECTS))
    unit, names = SUBJECTS[title]
    n = r.randrange(3, 6)
    kind = r.randrange(4)
    if kind == 0:
        return bars(title, unit, {k: v for k, v in zip(names, r.sample(range(5, 99), n))}, r.sample(list(COLORS), n))
    if kind == 1:
        series = {k: (c, [r.randrange(5, 60) for _ in range(4)]) for k, c in zip(r.sample(names, 2), r.sample(list(COLORS), 2))}
        return line(title, ["2018", "2019", "2020", "2021"], series)
    if kind == 2:
        cuts = sorted(r.sample(range(8, 92, 4), 2))
        return pie(title, dict(zip(names, (cuts[0], cuts[1] - cuts[0], 100 - cuts[1]))))
    return table(title, ["Name", "Mon", "Tue"], [[k, r.randrange(1, 60), r.randrange(1, 60)] for k in names[:n - 1]])


def drawings(r):
    some = lambda n: r.sample(list(COLORS), n)
    kind = r.randrange(6)
    if kind == 0:
        return village([tuple(some(2)) for _ in range(r.randrange(1, 4))], r.randrange(1, 4), r.random() < .4)
    if kind == 1:
        return sea([tuple(some(2)) for _ in range(r.randrange(1, 4))], r.random() < .5)
    if kind == 2:
        ground = r.choice(list(GROUNDS))
        cols = r.randrange(2, 4)
        grid = [[(r.choice(list(COLORS)), r.choice(["circle", "square", "triangle"])) for _ in range(cols)] for _ in range(r.randrange(1, 4))]
        return shapes(grid, (ground, GROUNDS[ground]))
    if kind == 3:
        return clock(r.randrange(1, 13), r.randrange(0, 60, 5), r.choice(list(COLORS)))
    if kind == 4:
        task = r.choice(list(TASKS))
        steps = r.sample(range(5), r.randrange(3, 5))
        return flow(task, [(TASKS[task][i], c) for i, c in zip(sorted(steps), some(len(steps)))])
    return faces(r.choices(["smiles", "frowns", "looks straight"], k=r.randrange(2, 5)))


def more(r, count):
    """`count` pictures of all kinds in turn."""
    signs = iter(SIGNS)
    kinds = [one_thing, placed_things, charts, counted_things, room, drawings, placed_things, one_thing, street, drawings, charts, label, calendar]
    made = [sign(*s) for s in signs]
    return made + [kinds[i % len(kinds)](r) for i in range(count - len(made))]


def main():
    day = ("white", (250, 250, 250))
    dark = ("dark grey", (60, 60, 65))
    made = [
        bars("Apples picked", "baskets", {"Mon": 12, "Tue": 18, "Wed": 7, "Thu": 15}, ["red", "green", "orange", "blue"]),
        bars("Visitors per year", "thousands", {"2019": 84, "2020": 21, "2021": 37, "2022": 66, "2023": 92}, ["teal"] * 5),
        line("Temperature in degrees", ["Jan", "Mar", "May", "Jul", "Sep"], {"north": ("blue", [2, 6, 13, 19, 14]), "south": ("red", [11, 14, 20, 27, 23])}),
        line("Books lent", ["Q1", "Q2", "Q3", "Q4"], {"novels": ("purple", [310, 280, 240, 330]), "comics": ("orange", [120, 150, 190, 210])}),
        pie("How people come to work", {"train": 40, "bicycle": 25, "car": 20, "on foot": 15}),
        pie("Time in a day", {"sleep": 33, "work": 34, "meals": 8, "other": 25}),
        document(["CORNER BAKERY", "2 x bread rolls      1.40", "1 x rye bread        3.80", "3 x pretzels         2.70", "Total                7.90", "Thank you, come again!"],
                 "What was bought, and what did it cost?", "The receipt of Corner Bakery lists two bread rolls for 1.40, one rye bread for 3.80 and three pretzels for 2.70. The total is 7.90, and below it stands \"Thank you, come again!\"."),
        document(["Dear Anna,", "the parcel arrived on Tuesday.", "The blue mugs are all whole,", "but one lid is missing.", "Could you send another one?", "Best wishes, Tom"],
                 "Summarise the letter.", "In this short letter Tom writes to Anna that the parcel arrived on Tuesday and that the blue mugs are whole. One lid is missing, and he asks her to send another one."),
        document(["Lemon cake", "200 g flour, 150 g sugar", "3 eggs, 120 g butter", "juice of 2 lemons", "Bake 40 minutes at 180 C"],
                 "What is this recipe, and what does it need?", "It is a recipe for lemon cake. It needs 200 g of flour, 150 g of sugar, three eggs, 120 g of butter and the juice of two lemons, and is baked for 40 minutes at 180 degrees Celsius."),
        document(["def area(width, height):", "    if width < 0 or height < 0:", "        return None", "    return width * height"],
                 "What does the code do?", "The Python function named area takes a width and a height. It returns None if either is negative and otherwise their product, the area of a rectangle.", 520),
        document(["Opening hours", "Monday to Friday   9:00 - 18:00", "Saturday          10:00 - 14:00", "Sunday             closed"],
                 "When is the shop open?", "The notice gives the opening hours: Monday to Friday from 9:00 to 18:00 and Saturday from 10:00 to 14:00. On Sunday it is closed."),
        table("Train times", ["Line", "Leaves", "Arrives"], [["S1", "7:05", "7:41"], ["S2", "7:20", "8:02"], ["R9", "7:35", "9:10"]]),
        table("Planets", ["Planet", "Moons", "Days/year"], [["Earth", 1, 365], ["Mars", 2, 687], ["Venus", 0, 225]]),
        flow("Making tea", [("Boil water", "blue"), ("Add tea leaves", "green"), ("Wait 4 minutes", "orange"), ("Pour and serve", "red")]),
        flow("Order handling", [("Receive order", "purple"), ("Check stock", "teal"), ("Pack", "brown"), ("Ship", "blue")]),
        village([("red", "brown"), ("yellow", "blue"), ("teal", "red")], 2, False),
        village([("orange", "purple")], 3, True),
        village([("blue", "orange"), ("purple", "green")], 1, False),
        sea([("red", "yellow"), ("brown", "orange")], True),
        sea([("green", "red"), ("blue", "purple"), ("orange", "teal")], False),
        shapes([[("red", "circle"), ("blue", "square"), ("green", "triangle")], [("yellow", "square"), ("purple", "circle"), ("orange", "circle")]], dark),
        shapes([[("teal", "triangle"), ("teal", "circle")], [("brown", "square"), ("red", "triangle")], [("blue", "circle"), ("green", "square")]], day),
        shapes([[("orange", "square"), ("orange", "square"), ("purple", "triangle"), ("red", "circle")]], day),
        clock(10, 10, "blue"), clock(3, 40, "red"), clock(7, 25, "green"),
        sign("SLOW\nSCHOOL", "blue", "it asks drivers to be careful near a school"),
        sign("EXIT", "green", "it marks the way out"),
        sign("NO\nPARKING", "red", "cars may not be left there"),
        faces(["smiles", "frowns", "looks straight"]),
        faces(["frowns", "smiles", "smiles", "frowns"]),
    ]
    # Kinds alternate, so that a prefix of the set is mixed too.
    random.Random(7).shuffle(made)
    made += more(random.Random(11), 128 - len(made))
    with zipfile.ZipFile(HERE / "set.zip", "w", zipfile.ZIP_STORED) as archive, open(HERE / "pairs.tsv", "w") as pairs:
        for i, (image, question, answer) in enumerate(made):
            name = f"{i:03d}.png"
            data = io.BytesIO()
            image.quantize(48, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
            archive.writestr(zipfile.ZipInfo(name, (2025, 1, 1, 0, 0, 0)), data.getvalue())
            pairs.write(f"{name}\t{question}\t{answer}\n".replace("a orange", "an orange"))


if __name__ == "__main__":
    main()

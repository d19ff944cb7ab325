"""Writes tests/golden/prompts.json: what transformers makes of conversations with published chat templates.

    python tests/reference/prompt_goldens.py PUBLISHED CASES

PUBLISHED holds checkpoints' metadata in folders named org--name, CASES variants of the demo model. Every
different template of both is kept with its source, and rendered by transformers' own render_jinja_template.
Contents are lists of parts, as a processor passes them; a template that cannot take lists gets strings, with
the picture's text in its place and a line end behind the last; one that fails on lists gets them only where pictures are. Further templates are made up for the constructs they use.
"""

import json
import sys
from pathlib import Path

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def turn(role, text, images=0):
    return {"role": role, "parts": [None] * images + [text]}


SYSTEM, ANSWER = turn("system", "Be brief."), turn("assistant", "  A red star.")
QUESTION, PICTURE, TWO = turn("user", "What is it?"), turn("user", "It's \"which\"\n\\n?", 1), turn("user", "Larger?", 2)
TALKS = [
    ([QUESTION], True),
    ([PICTURE], True),
    ([TWO], True),
    ([SYSTEM, QUESTION], True),
    ([SYSTEM, PICTURE], True),
    ([PICTURE, ANSWER], False),
    ([PICTURE, ANSWER, QUESTION], True),
    ([SYSTEM, QUESTION, ANSWER, TWO, ANSWER, PICTURE], True),
    ([SYSTEM, PICTURE, ANSWER, QUESTION, ANSWER], False),
]

# Jinja that transformers takes, one construct or two each; rendered for TALKS[3].
CONSTRUCTS = [
    "{%- generation -%}  a  {%- endgeneration %}\n b",
    "  {% generation %}\n{{ messages[0].role }}\n  {% endgeneration %}\nx",
    "{{ '{% generation %}' }}{# {% generation %} #}{% raw %}{% generation %}{% endraw %}{{ \"a\\\"{% generation %}\" }}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% for m in messages %}{%+ generation %} {{ loop.index }}{% endgeneration %}{% endfor %}",
    "{{ {'a': {'b': 1}}['a']['b'] }}{% if '%}' == '%}' %}{{ '}}' }}{% endif %}{{ {'a': {'b': {}}} }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for i in range(10) %}{% if i == 3 %}{% break %}{% endif %}{{ i }},{% endfor %}",
    "{{ messages[0] | tojson }}|{{ messages | tojson(indent=2) }}|{{ {'b': 1, 'a': [1.5, none, true, 'é\\n']} | tojson(sort_keys=true) }}",
    "{{ {'k': 'é😀<&>\\''} | tojson(ensure_ascii=true) }}|{{ ['é😀<&>', {}] | tojson }}|{{ [] | tojson(indent=4) }}",
    "{{ {'a': [1, 2], 'b': {}} | tojson(separators=(',', ':')) }}|{{ {'a': [1]} | tojson(indent=1, separators=(' ,', ' : ')) }}",
    "{{ [1e16, 1e-5, 0.1, 100.0, 1.5e300] | tojson }} {{ 1e16 }} {{ 2.0 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 5 }}",
    "{{ true }} {{ none }} {{ false }} {{ [1, 'a', none, true] }} {{ {'a': 'it\\'s'} }} {{ missing }}",
    "{% set ns = namespace(n=0, seen=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.seen | join('/') }}",
    "{{ messages[::-1][0].role }} {{ messages[1:][0]['role'] }} {{ 'abc'[::-1] }} {{ 'abc'[1] }} {{ messages[-1].role }} {{ 'abcd'[1:-1] }}",
    "{{ 'a b  c'.split() }} {{ 'a,b,c'.split(',', 1) }} {{ 'a,b'.rsplit(',', 1)[-1] }} {{ ' x '.strip() }}|{{ 'xxay'.lstrip('x') }}|{{ 'ayy'.rstrip('y') }}",
    "{{ 'Hello'.upper() }}{{ 'HELLO wORLD'.title() }}{{ 'hELLO'.capitalize() }}{{ 'aXbX'.replace('X', '-') }}{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('x', 'c')) }}",
    "{{ 'é-x'.find('x') }} {{ 'abc'.index('c') }} {{ 'aab'.count('a') }} {{ '</t>x'.removeprefix('</t>') }} {{ 'a.b.c'.partition('.') | join('|') }}",
    "{% for k, v in messages[0].items() %}{{ k }};{% endfor %}{{ messages[0].get('no', 'default') }} {{ messages[0].keys() | list }} {{ 'role' in messages[0] }}",
    "{% macro m(a, b='x') %}[{{ a }}{{ b }}]{% endmacro %}{{ m(1) }}{{ m(1, b=2) }}",
    "{% macro w() %}<{{ caller() }}>{% endmacro %}{% call w() %}in{% endcall %}{% filter upper %}abc{% endfilter %}",
    "{{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | rejectattr('role', 'eq', 'user') | map(attribute='role') | first }}",
    "{{ tools is none }} {{ tools is defined }} {{ x is defined }} {{ 'a' is string }} {{ [] is sequence }} {{ 'a' is sequence }} {{ {} is mapping }} {{ 'a' is iterable }} {{ 1 is number }} {{ messages is iterable }}",
    "{{ dict(a=1, b='c') }} {{ dict(messages[0], role='x').role }} {{ 'a' ~ 1 ~ 'b' }} {{ 'ab' * 3 }} {{ '%s and %d' | format('x', 3) }}",
    "a\n{% if true %}\n  b\n{% endif %}\n   {# c #}\nd\n  {%- if true -%}  e  {%- endif %}\n",
    "{{ raise_exception('no') }}",
    "{{ messages.append(1) }}",
    "{{ 'a' + 1 }}",
    "{{ missing.field }}",
    "{{ strftime_now('%Y') | length }}{{ strftime_now('%d %b %Y') | length }}",
    "{{ bos_token + messages[0]['role'] + eos_token }}{{ documents is none }}{% if pad_token is defined %}pad{% endif %}",
    "{{ 'x' if false }}|{{ ('a' if true else 'b') }}|{{ none or 'd' }}|{{ '' or 'e' }}|{{ 1 if [] else 2 }}",
    "{%- set a, b = 1, 2 -%}{{ a }}{{ b }}{% set c %}block{% endset %}{{ c | trim }}{{ [3, 1, 2] | sort | join }}{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ loop.first }}{{ loop.last }}{{ m.role }}{% else %}none{% endfor %}{{ loop is defined }}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined }}>{{ loop.nextitem.role if loop.nextitem is defined }};{% endfor %}",
]


def render(source, talk, generate, form, image, mark=None):
    messages = []
    for t in talk:
        if form == "text" or form == "mixed" and None not in t["parts"]:
            content = image * (len(t["parts"]) - 1) + "\n" * (len(t["parts"]) > 1) + t["parts"][-1]
        else:
            content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in t["parts"]]
            if mark:
                content[0]["mark"] = mark
        messages.append({"role": t["role"], "content": content})
    try:
        return render_jinja_template([messages], chat_template=source, add_generation_prompt=generate, **SPECIAL)[0][0]
    except Exception:
        return None


def prompt(source, talk, generate, form, image):
    """A template may take lists from users and strings from the system."""
    text = render(source, talk, generate, form, image)
    return render(source, talk, generate, "mixed", image) if text is None and form == "parts" else text


def form(source, image):
    """Lists, unless they fail or are printed as they are."""
    text = render(source, [QUESTION], True, "parts", image, "printed whole")
    return "parts" if text and "printed whole" not in text and QUESTION["parts"][0] in text else "text"


def picture(source):
    """What a template writes for a picture, as far as the runtime puts it there itself."""
    for text in ("<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>"):
        if text in source:
            return text
    return "<image>"


def templates(folder, kept):
    for path in sorted(folder.glob("*/*")):
        if path.suffix == ".jinja":
            found = path.read_text()
        elif path.suffix == ".json" and path.name.startswith(("chat_template", "tokenizer_config", "processor_config")):
            found = json.loads(path.read_text()).get("chat_template")
        else:
            continue
        if isinstance(found, list):
            found = {t["name"]: t["template"] for t in found}["default"]
        if found and found not in kept:
            kept[found] = f"{path.parent.name}/{path.name}"


def main():
    kept = {}
    for folder in sys.argv[1:3]:
        templates(Path(folder), kept)
    out = {"made_with": f"transformers {transformers.__version__}", "special": SPECIAL, "talks": TALKS, "templates": []}
    for source, name in kept.items():
        image = picture(source)
        how = form(source, image)
        out["templates"].append({
            "name": name, "source": source, "image": image, "form": how,
            "prompts": [prompt(source, *talk, how, image) for talk in TALKS],
        })
    out["constructs"] = [[s, render(s, *TALKS[3], "parts", "<image>")] for s in CONSTRUCTS]
    path = ROOT / "tests/golden/prompts.json"
    path.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(kept)} templates, {path.stat().st_size} bytes")
    for s, r in out["constructs"]:
        print(repr(r), "<-", s[:70])
    for t in out["templates"]:
        print(t["name"], t["form"], [p is not None for p in t["prompts"]])


if __name__ == "__main__":
    main()

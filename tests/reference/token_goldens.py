"""Writes tests/golden/nasty_strings.json: strings that break tokenizers, with the ids of transformers.

    python tests/reference/token_goldens.py TESTBED_MODEL_DIR

The ids are those of the demo model's tokenizer and of the testbed's, made with transformers 4.45.2
(tokenizers 0.20.3), special tokens in the text read as special, none added.
"""

import json
import random
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[2]


def strings():
    out = []
    add = out.append
    # Nothing, single bytes and controls.
    out += [chr(c) for c in range(128)]
    out += [chr(c) for c in range(0x80, 0x100)]
    # Spaces of every kind, alone, doubled, between words, before a newline, at the end.
    spaces = [" ", "\t", "\n", "\r", "\r\n", "\v", "\f", "\u0085", "\u00a0", "\u1680", "\u2000", "\u2003", "\u2009",
              "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\u200b", "\u2060", "\ufeff", "\u180e"]
    for s in spaces:
        out += [s * 2, s * 7, f"a{s}b", f"{s}a", f"a{s}", f"a{s}{s}b", f"a {s} b", f"{s}\n{s}x", f"1{s}2", f"!{s}!"]
    for n in (3, 4, 5, 8, 15, 16, 17, 31, 33, 64, 127):
        out += [" " * n, " " * n + "x", "x" + " " * n, "\n" * n, "\t" * n + "x", "a" * n, "1" * n, "." * n, "=" * n,
                "é" * n, "\r\n" * n]
    # Contractions, in every case and with other apostrophes.
    for word in ["don't", "DON'T", "we're", "I've", "I'm", "she'll", "he'd", "it's", "IT'S", "'s", "'S", "''s", "'sa",
                 "'ll'll", "'Re", "'vE", "can’t", "o'clock", "rock'n'roll", "'tis", "y'all'd've", "x's'", "ſ'ſ", "'ſ",
                 "a'T b'M", "'d1", "1's", " 's", "\n's", "_'s"]:
        add(word)
    # Digits of every script.
    out += ["0123456789", "3.14159", "1,000,000", "1e-5", "0x1F", "v1.2.3", "1st 2nd", "12a34b", "٠١٢٣٤", "०१२३४",
            "①②③", "Ⅳ Ⅷ", "½ ¼ ¾", "x²+y³", "₀₁₂", "１２３", "𝟘𝟙𝟚", "〇一二三", "99 bottles", "2026-11-23T10:00:00Z",
            "+1 (555) 010-0199", "−5 °C", "100%", "$5.00", "٪١٢", "1 2  3   4"]
    # Letters: many scripts, marks that combine, letters without case, ligatures.
    out += ["Ünïcödé", "naïve café", "e\u0301", "a\u0300\u0316\u0327", "Å vs A\u030a", "ﬁ ﬂ ﬃ", "ǅ ǈ ǋ", "ß ẞ", "İstanbul ı",
            "Łódź", "Αθήνα", "Москва", "Привет, мир!", "ქართული", "Հայերեն", "שלום עולם", "שָׁלוֹם", "مرحبا بالعالم",
            "مَرْحَبًا", "\u202eabc\u202c", "a\u200fb\u200ec", "नमस्ते दुनिया", "ক্ষ", "தமிழ்", "తెలుగు", "ಕನ್ನಡ", "മലയാളം",
            "සිංහල", "ภาษาไทย", "กำลัง", "ພາສາລາວ", "မြန်မာ", "ខ្មែរ", "ትግርኛ", "བོད་ཡིག", "ᠮᠣᠩᠭᠣᠯ", "漢字", "中文分词测试", "日本語テキスト",
            "カタカナ ｶﾀｶﾅ", "ひらがな", "한국어 텍스트", "ㅎㅏㄴ", "\u1112\u1161\u11ab", "「括弧」、。", "Ａｂｃ", "𠮷野家", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
            "ᏣᎳᎩ", "ⵜⵉⴼⵉⵏⴰⵖ", "𐍈𐌰", "ꦗꦮ", "𞤀𞤣𞤤", "ʰʷˠ", "ªº", "Ĳĳŉǰΐΰẖ", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙a̴̵̜l̷͎g̨̛o̶"]
    # Emoji: joined, with skin, flags, keycaps, tags, variation selectors, halves of pairs.
    out += ["😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "🇩", "1️⃣2️⃣", "❤️ ❤", "☎︎ ☎️", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "🧑🏿‍🚀",
            "a😀b😀", "😀😀😀😀", " 😀 ", "‍", "a‍b", "©®™", "♥♦♣♠", "→⇒∀∃∈", "█▓▒░", "⠓⠑⠇⠇⠕", "🀄🂡", "🫠🫨", "\U0001fae9", "🩷"]
    # Special tokens, near misses, and special tokens in odd places.
    out += ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>", "<video>", "<|im_start|>user\nhi<|im_end|>\n",
            "<|im_start|><|im_start|>", "a<|im_end|>b", " <|im_end|> ", "<|im_end|>\n\n", "<|im_end>", "<|im_end|", "|im_end|>",
            "<|IM_END|>", "< |im_end|>", "<|im_end |>", "<|im_endoftext|>", "<<|im_end|>>", "<image><image>", "<image>\nWhat?",
            "< image>", "<Image>", "<image", "image>", "<images>", "</image>", "<s>", "</s>", "<pad>", "<unk>", "[INST]", "<0x0A>",
            "<|endoftext|>'s", "'<|endoftext|>s", "don<|im_end|>'t", "  <image>  ", "\n<image>\n", "<|im_start|>assistant\n",
            "<|vision_start|><|image_pad|><|vision_end|>", "<repo_name>", "<reponame>x", "<file_sep>", "<fim_prefix>", "Ġ", "Ċ", "ĠĠa", "▁the"]
    # Text and code as users write it.
    out += ["What shape is this?", "The picture shows a red star on a white background.", "HELLO hello HeLLo hELLO",
            "snake_case camelCase kebab-case SCREAMING_CASE", "a.b.c,d;e:f!g?h", "...", "…", "--", "—–-", "“quotes” ‘single’ «guillemets»",
            "https://example.org/a?b=c&d=%20#e", "user@example.org", "C:\\Users\\x", "/usr/lib/x86_64", "if (a != b) { return c[0]; }",
            "def f(x):\n    return x ** 2\n", "\tif x:\n\t\ty()\r\n", "{\"k\": [1, null, true]}", "<div class='a'>b</div>", "SELECT * FROM t;",
            "x=1;y=2", "a+b-c*d/e", "&amp;&#39;", "\\n\\t\\u0041", "$\\frac{a}{b}$", "# Title\n\n* item\n* item\n\n> quote", "| a | b |\n|---|---|",
            "word" * 40, "supercalifragilisticexpialidocious", "qwrtpsdfghjklzxcvbnm", "aAaAaAaA", "a b  c   d    e", " leading", "trailing ",
            "two\n\nparagraphs", "dots . . . .", "!!!???", "#@$%^&*()", "¿Qué? ¡Sí!", "\u0000a\u0000", "a\u0007b", "\x1b[31mred\x1b[0m", "\x7f\x7f",
            "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ue000", "\U000f0000", "\u0378", "\U0001f9ff\u200d", "\u00ad soft\u00adhyphen"]
    # Everything stirred together.
    rng = random.Random(20)
    pieces = [s for s in out if 0 < len(s) < 12]
    for _ in range(150):
        add("".join(rng.choice(pieces) for _ in range(rng.randint(2, 9))))
    for _ in range(50):  # any assigned or unassigned code point but surrogates
        points = [rng.randrange(0x20000) for _ in range(12)]
        add("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return list(dict.fromkeys(out))


def main():
    models = {"demo": ROOT / "demo/model", "testbed": Path(sys.argv[1])}
    texts = strings()
    result = {"made_with": f"transformers {transformers.__version__}", "strings": texts, "ids": {}}
    for name, path in models.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        result["ids"][name] = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    out = ROOT / "tests/golden/nasty_strings.json"
    rows = ",\n".join(json.dumps(t) for t in texts)
    ids = ",\n".join(f'"{n}": [\n' + ",\n".join(json.dumps(i, separators=(",", ":")) for i in v) + "\n]" for n, v in result["ids"].items())
    out.write_text(f'{{"made_with": {json.dumps(result["made_with"])},\n"strings": [\n{rows}\n],\n"ids": {{\n{ids}\n}}}}\n')
    print(f"{len(texts)} strings, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""Writes tests/golden/sentencepiece/: a small SentencePiece BPE, and transformers' ids of the strings that break tokenizers.

    python tests/reference/sentencepiece_goldens.py

tokenizer.model is trained by sentencepiece on this repository's documents, tokenizer.json made of it as transformers makes
Llama's: merges in the order of the scores, `▁` put in front and for spaces. Special tokens in the text are read as special,
none is added.
"""

import json
import tempfile
from pathlib import Path

import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2
from transformers.convert_slow_tokenizer import generate_merges

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/golden/sentencepiece"
PIECES = 1200


def train():
    documents = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_text("\n".join(p.read_text(encoding="utf-8") for p in documents) + "\n1é漢字 naïve Привет мир\n" * 20, encoding="utf-8")
        # As Llama's was: digits apart, spaces kept, no normalisation.
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{folder}/m", model_type="bpe", vocab_size=PIECES, byte_fallback=True,
            character_coverage=1.0, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, add_dummy_prefix=True, minloglevel=2)
        return Path(f"{folder}/m.model").read_bytes()


def main():
    model = train()
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = generate_merges(vocab, {piece.piece: piece.score for piece in proto.pieces})
    added = lambda i, content, special: {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
                                         "normalized": False, "special": special}
    names = [("<unk>", True), ("<s>", True), ("</s>", True)]
    tokens = [added(i, t, s) for i, (t, s) in enumerate(names)]
    tokens += [added(len(vocab) + i, t, s) for i, (t, s) in enumerate([("<image>", True), ("<pad>", True), ("<tool>", False)])]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                                           {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": template, "pair": template + [
            {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": special},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                                                     {"type": "ByteFallback"}, {"type": "Fuse"},
                                                     {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocab, "merges": [" ".join(m) for m in merges]},
    }
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "legacy": False,
              "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "tokenizer.model").write_bytes(model)
    (OUT / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    (OUT / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    strings = json.loads((ROOT / "tests/golden/nasty_strings.json").read_text())["strings"]
    strings += [f"USER: <image>\nWhat is this?</s>{s}" for s in ("", " ", "  two", "\n", "<image> x", "▁▁", "<tool>", " <tool> a")]
    # What AutoTokenizer gives for model_type llava and llava_next; for llama it would rebuild the rules.
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(OUT / "tokenizer.json"))
    ids = [reference(t, add_special_tokens=False)["input_ids"] for t in strings]
    # sentencepiece itself, which reads no special tokens in text.
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    plain = [(t, i) for t, i in zip(strings, ids) if not any(token["content"] in t for token in tokens)]
    assert len(plain) > 1000 and all(processor.EncodeAsIds(t) == i for t, i in plain)
    # A piece that is cut out of text before all else, and no space in front.
    proto.pieces.add(piece="<tool>", score=0.0, type=4)
    proto.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    cut = ["<tool>", "a<tool> b", " <tool><tool>x", "▁<tool>▁", "<tool", *[t for t, _ in plain[::7]]]
    rows = lambda pairs: ",\n".join(json.dumps(pair, separators=(",", ":")) for pair in pairs)
    (OUT / "ids.json").write_text(
        f'{{"made_with": "transformers {transformers.__version__}, sentencepiece {sentencepiece.__version__}",\n'
        f'"ids": [\n{rows(zip(strings, ids))}\n],\n"user_defined": [\n{rows((t, processor.EncodeAsIds(t)) for t in cut)}\n]}}\n')
    print(len(vocab), "pieces,", len(merges), "merges,", len(strings), "strings", {p.name: p.stat().st_size for p in OUT.iterdir()})


if __name__ == "__main__":
    main()

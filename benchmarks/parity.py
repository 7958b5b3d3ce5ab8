"""The same training with stock PEFT and with ours: 300 steps of language modelling on real text, in every precision.

    python benchmarks/parity.py [--rows fp32 nf4] [--device cuda] [--picture docs/pictures/parity.png] [--json]

The text ships with Python: a small byte-level Llama is pretrained for about a minute on the language reference (kept in
--cache), then adapted to the source code of the standard library. Peers begin from the same weights and factors and see
the same batches; PEFT is `get_peft_model`. Adapters are fp32, the base is what the row says, without autocast:

    fp32, bf16, fp16           a dense base; ours splits
    nf4 merged, nf4 split      a 4-bit base that computes in bf16; ours puts the update into the unpacked weight, or,
                               told to, adds it beside
    bf16 forced                ours told to put the update into a dense bf16 weight, which it never does by itself

The second table asks of one layer how much of an update arrives in its output. W is a weight of the pretrained model,
the update so many times smaller; "arrives" is the update's own direction in what it changed, over all outputs: 1 is
right, 0 is lost. "error of y" is the whole output's, against fp32 with the same stored weight.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import pydoc_data.topics
import statistics
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from interleaved import table
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_adapters
from lora_adapters.layers import routes
from lora_adapters.weights import quantize_modules, quantizer_for, store_for
from lora_adapters.weights.marking import mark_quantized

LENGTH, BATCH = 128, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOURCES = (
    "argparse",
    "ast",
    "collections/__init__",
    "datetime",
    "email/message",
    "inspect",
    "logging/__init__",
    "pathlib",
)
#: name: (dtype of the model, 4-bit base, what ours is told instead of its rule)
ROWS = {
    "fp32": (torch.float32, False, ""),
    "bf16": (torch.bfloat16, False, ""),
    "fp16": (torch.float16, False, ""),
    "nf4 merged": (torch.bfloat16, True, ""),
    "nf4 split": (torch.bfloat16, True, "split"),
    "bf16 forced": (torch.bfloat16, False, "merged"),
}
UPDATES = (1e-4, 1e-3, 1e-2, 1e-1)


def reference() -> torch.Tensor:
    return _bytes("\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))


def sources() -> torch.Tensor:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [p for name in SOURCES for p in sorted(folder.glob(f"{name}.py"))]
    return _bytes("\n".join(p.read_text(encoding="utf-8") for p in files))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batches(text: torch.Tensor, count: int, size: int, seed: int, device: str) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(0, len(text) - LENGTH, (size,), generator=generator)
        yield torch.stack([text[s : s + LENGTH] for s in starts.tolist()]).to(device)


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 8 // 3 // 64 * 64,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            vocab_size=256,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )


def pretrained(args: argparse.Namespace) -> LlamaForCausalLM:
    """Return the base in fp32, from the cache if it has been made before."""
    model = build(args)
    key = json.dumps([args.hidden, args.layers, args.pretrain, hashlib.sha256(reference().numpy()).hexdigest()])
    kept = args.cache / f"parity-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if kept.exists():
        model.load_state_dict(torch.load(kept, map_location="cpu"))
        return model
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.pretrain + 1, pct_start=0.1)
    for ids in batches(reference(), args.pretrain, 2 * BATCH, 0, args.device):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    kept.parent.mkdir(parents=True, exist_ok=True)
    model.cpu()
    torch.save(model.state_dict(), kept)
    return model


def prepared(model: nn.Module, row: str, device: str) -> nn.Module:
    """Return a copy of a model as the row's base: its dtype, in 4 bits or not, frozen."""
    dtype, quantized, _ = ROWS[row]
    base = copy.deepcopy(model).to(device=device, dtype=dtype).requires_grad_(False)
    if quantized:
        names = [n for n, _ in base.named_modules() if n.split(".")[-1] in TARGETS]
        quantize_modules(base, dict.fromkeys(names, quantizer_for("nf4")), dtype)
        mark_quantized(base, quantizer_for("nf4"), dtype)
    return base


def adapted(base: nn.Module, who: str, rank: int) -> Any:
    """Return the base with an adapter, its factors the same for both peers."""
    if who == "PEFT":
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))  # type: ignore[arg-type]
    else:
        model = lora_adapters.attach(base, rank=rank, targets=TARGETS).model
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return model


@contextlib.contextmanager
def told(path: str) -> Iterator[None]:
    """Have every layer of ours take a path that is not its rule's: "split" on 4 bits, "merged" on a dense weight."""
    name, reads = {"split": ("_MERGED", "4bit"), "merged": ("_SPLIT", "dense"), "": ("_SPLIT", "")}[path]
    rule = getattr(routes, name)
    if path:
        setattr(routes, name, routes.Route(path, "told to", reads))
    try:
        yield
    finally:
        setattr(routes, name, rule)


def train(base: nn.Module, who: str, row: str, args: argparse.Namespace) -> list[float]:
    """Return the loss of every step."""
    dtype, _, path = ROWS[row]
    # fp16 gradients of a mean over tokens are smaller than fp16 holds; fp32 adapters take the factor back exactly.
    scale = 1024.0 if dtype == torch.float16 else 1.0
    with told(path if who == "ours" else ""):
        model = adapted(prepared(base, row, args.device), who, args.rank).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in trained)
        optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.0)
        losses = []
        for ids in batches(sources(), args.steps, BATCH, 2, args.device):
            loss = model(input_ids=ids, labels=ids).loss
            (loss * scale).backward()
            for parameter in trained:
                assert parameter.grad is not None
                parameter.grad /= scale
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return [loss.item() for loss in losses]


def curves(base: nn.Module, args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return row -> peer -> losses. Rows on the same base share PEFT's."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in args.rows:
        same = next((r for r in found if ROWS[r][:2] == ROWS[row][:2]), None)
        peft = found[same]["PEFT"] if same else train(base, "PEFT", row, args)
        found[row] = {"PEFT": peft, "ours": train(base, "ours", row, args)}
    return found


def untouched(base: nn.Module, args: argparse.Namespace) -> list[float]:
    """Return the losses of the base alone, in fp32, on the batches of the training."""
    model = prepared(base, "fp32", args.device)
    with torch.no_grad():
        return [
            model(input_ids=ids, labels=ids).loss.item()
            for ids in batches(sources(), args.steps, BATCH, 2, args.device)
        ]


def final(losses: list[float]) -> float:
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


def survival(base: LlamaForCausalLM, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return how much of an update arrives in the output of one layer, for each path and size of the update."""
    dense = nn.ModuleDict({"down_proj": base.model.layers[-1].mlp.down_proj})
    torch.manual_seed(3)
    width = dense["down_proj"].in_features
    x = torch.randn(1024, width, device=args.device)
    paths = {
        "PEFT, bf16": ("bf16", "PEFT"),
        "ours, bf16": ("bf16", "ours"),
        "ours, bf16 forced": ("bf16 forced", "ours"),
    }
    paths |= {"PEFT, nf4": ("nf4 merged", "PEFT"), "ours, nf4 merged": ("nf4 merged", "ours")}
    paths |= {"ours, nf4 split": ("nf4 split", "ours")}
    rows = []
    for name, (row, who) in paths.items():
        layer = _Caller(prepared(dense, row, args.device), ROWS[row][1])
        if who == "PEFT":
            get_peft_model(layer, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=["down_proj"]))
        else:
            lora_adapters.attach(layer, rank=args.rank, targets=["down_proj"])
        a, b = (p for p in layer.parameters() if p.requires_grad)
        inputs = x.to(ROWS[row][0])
        store = store_for(next(m.base_layer for m in layer.modules() if hasattr(m, "base_layer")))
        assert store is not None
        stored = store.read(torch.float32)
        found: dict[str, Any] = {"path": name}
        with told(ROWS[row][2] if who == "ours" else ""), torch.no_grad():
            nn.init.normal_(a)
            direction = torch.randn_like(b)
            for size in UPDATES:
                b.zero_()
                without = _forward(layer, inputs)
                b.copy_(direction * (size * stored.norm() / (direction @ a).norm()))
                update = inputs.float() @ (b @ a).t()
                y = _forward(layer, inputs)
                found[f"{size:g} arrives"] = ((y - without) * update).sum().item() / update.square().sum().item()
                exact = inputs.float() @ stored.t() + update
                found["error of y, %"] = 100 * ((y - exact).norm() / exact.norm()).item()
        rows.append(found)
    return rows


def _forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():  # as in training: without gradients a layer may take another path
        return layer(x.requires_grad_()).detach().float()


class _Caller(nn.Module):
    """A model of one layer."""

    def __init__(self, model: nn.Module, quantized: bool) -> None:
        super().__init__()
        self.model, self.is_loaded_in_4bit = model, quantized

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model["down_proj"](x)  # type: ignore[index,operator]


def draw(alone: list[float], found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Write all curves into one picture: the losses, and below them ours minus PEFT's (the goal: within 1 %)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    above.plot(range(1, len(alone) + 1), _smooth(alone), color="0.6", linewidth=1, label="base alone, fp32")
    for i, (row, both) in enumerate(found.items()):
        steps = range(1, len(both["ours"]) + 1)
        above.plot(steps, _smooth(both["PEFT"]), color=f"C{i}", linewidth=4, alpha=0.3, label=f"{row}, PEFT")
        above.plot(steps, _smooth(both["ours"]), color=f"C{i}", linewidth=1, label=f"{row}, ours")
        apart = [100 * (ours - peft) / peft for ours, peft in zip(both["ours"], both["PEFT"], strict=True)]
        below.plot(steps, _smooth(apart), color=f"C{i}", linewidth=1)
    above.set_ylabel("loss (nats per byte),\nmean of 10 steps")
    below.set_ylabel("ours - PEFT, %,\nmean of 10 steps")
    below.set_xlabel("step")
    below.axhline(0, color="0.6", linewidth=0.5)
    above.legend(loc="center left", bbox_to_anchor=(1.01, 0.3), frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _smooth(values: list[float]) -> list[float]:
    return [statistics.mean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--pretrain", type=int, default=500, help="steps of pretraining")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "lora_adapters")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    base = pretrained(args)
    alone, found = untouched(base, args), curves(base, args)
    rows = [
        {
            "row": row,
            "base alone": final(alone),
            "PEFT": final(both["PEFT"]),
            "ours": final(both["ours"]),
            "ours / PEFT": final(both["ours"]) / final(both["PEFT"]),
        }
        for row, both in found.items()
    ]
    arrives = survival(base, args)
    if args.picture:
        draw(alone, found, args.picture)
    if args.json:
        print(json.dumps({"losses": rows, "survival": arrives, "curves": found, "base alone": alone}))
        return
    print(f"Mean loss of the last {max(1, args.steps // 10)} of {args.steps} steps:\n\n{table(rows, 4)}\n")
    print(f"An update of so many times the weight's size in one layer:\n\n{table(arrives, 3)}")


if __name__ == "__main__":
    main()

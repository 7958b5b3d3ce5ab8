"""A training step of whole models on a GPU: the frozen base, stock PEFT and ours, in turn.

    python benchmarks/models.py [--models vit llama-1b llama-8b] [--weights bf16 nf4] [--rounds 7] [--json]

Random weights of the true shapes; rank 16 on every linear layer of attention and feed-forward. A step is forward,
backward and fused AdamW; the base's is forward and backward down to the first layer.
Each round runs every variant for several steps in turn, and a ratio is the median over rounds of two variants of the
same round, so that a GPU whose clocks fall slows all of them. "autocast" is what Trainer does with bf16=True: adapters
in fp32 under torch.autocast. UNets: benchmarks/unet.py.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from interleaved import median, ratio, tell
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._pytree import tree_map

import lora_adapters
from lora_adapters.weights import mark_quantized, quantize_modules, quantizer_for

RANK = 16


@dataclass(frozen=True)
class Shape:
    """A model, its input, which layers get adapters, and whether it recomputes its activations."""

    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    targets: str
    checkpointing: bool = False


def llama(layers: int, hidden: int, inner: int, heads: int, groups: int, **size: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            vocab_size=size.get("vocabulary", 128256),
            max_position_embeddings=4096,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    return make


def tokens(batch: int, length: int, vocabulary: int = 128256) -> Callable[[], dict[str, torch.Tensor]]:
    def make() -> dict[str, torch.Tensor]:
        given = torch.randint(0, vocabulary, (batch, length))
        return {"input_ids": given, "labels": given}

    return make


def vit(layers: int, hidden: int, heads: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden
        )
        return ViTForImageClassification(config)

    return make


def images(batch: int) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.zeros(batch, dtype=torch.long)}


_LM = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_VIT = r".*\.(query|key|value|q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|output\.dense|intermediate\.dense)"
SHAPES = {
    "vit": Shape("ViT-L/16, batch 64", vit(24, 1024, 16), images(64), _VIT),
    "llama-1b": Shape("1B Llama, 2 x 512", llama(16, 2048, 8192, 32, 8), tokens(2, 512), _LM),
    "llama-8b": Shape("8B Llama, 2 x 2048, checkpointing", llama(32, 4096, 14336, 32, 8), tokens(2, 2048), _LM, True),
}
TINY = {
    "vit": Shape("tiny ViT", vit(2, 32, 2), images(2), _VIT),
    "llama-1b": Shape("tiny Llama", llama(2, 32, 64, 4, 2, vocabulary=64), tokens(2, 16, 64), _LM),
}


class Step:
    """A training step of one variant, its forward and backward as a CUDA graph if `graphed`."""

    def __init__(
        self, model: nn.Module, shape: Shape, inputs: dict[str, Any], autocast: bool, graphed: bool = False
    ) -> None:
        self.model, self.device = model.train(), next(iter(inputs.values())).device.type
        self.autocast = autocast
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True) if self.trained else None
        self.inputs = tree_map(lambda v: v.to(torch.bfloat16) if v.is_floating_point() else v, inputs)
        first = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        if not self.trained and first is not None:
            first.register_forward_hook(lambda module, args, output: output.requires_grad_())
        elif not self.trained:
            self.inputs = tree_map(lambda v: v.requires_grad_() if v.is_floating_point() else v, self.inputs)
        if shape.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

        self.graph = None
        if graphed:
            # The inputs are the same every time: they need not be copied to where the graph reads them.
            self.graph = lora_adapters.GraphedLoss(lambda _: self._loss(), self.trained)

    def _loss(self) -> torch.Tensor:
        mixed = torch.autocast(self.device, dtype=torch.bfloat16) if self.autocast else nullcontext()
        with mixed:
            out = self.model(**self.inputs)
            return out.loss if hasattr(out, "loss") else out.sample.float().square().mean()

    def __call__(self, steps: int = 1) -> None:
        for _ in range(steps):
            if self.graph is None:
                self._loss().backward()
            else:
                self.graph({})
            if self.optimizer:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()


def steps(shape: Shape, weights: str, device: str) -> dict[str, Step]:
    """Return the variants of a step, all over equal bases."""
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            base = shape.make().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)
    inputs = {name: tensor.to(device) for name, tensor in shape.inputs().items()}
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and _matches(shape.targets, n)]
    if weights == "nf4":
        quantizer = quantizer_for("nf4")
        quantize_modules(base, dict.fromkeys(names, quantizer), torch.bfloat16)
        mark_quantized(base, quantizer)
        base.is_loaded_in_4bit = True

    def adapted(ours: bool, half: bool, graphed: bool = False) -> Step:
        model: Any = copy.deepcopy(base)
        if ours:
            lora_adapters.attach(model, rank=RANK, targets=names, modules_to_save=[], seed=0)
        else:
            get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
        for parameter in model.parameters():
            if parameter.requires_grad and half:
                parameter.data = parameter.data.to(torch.bfloat16)
        return Step(model, shape, inputs, autocast=not half, graphed=graphed)

    found = {
        "base": Step(copy.deepcopy(base), shape, inputs, False),
        "PEFT, autocast": adapted(False, False),
        "PEFT, bf16": adapted(False, True),
        "ours, autocast": adapted(True, False),
        "ours, bf16": adapted(True, True),
    }
    if device == "cuda" and not shape.checkpointing:  # transformers' checkpointing saves the generator's state
        found["ours, bf16, CUDA graph"] = adapted(True, True, graphed=True)
    return found


def _matches(pattern: str, name: str) -> bool:
    import re

    return re.fullmatch(pattern, name) is not None


def measure(shape: Shape, weights: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one model."""
    found = steps(shape, weights, args.device)
    for step in found.values():
        step(3)
    start = time.perf_counter()
    found["PEFT, bf16"](2)
    count = max(2, round(args.seconds / max(1e-3, (time.perf_counter() - start) / 2)))
    rounds = []
    for turn in range(args.rounds):
        times = {}
        for name in list(found) if turn % 2 else reversed(list(found)):
            start = time.perf_counter()
            found[name](count)
            times[name] = (time.perf_counter() - start) / count
        rounds.append(times)
    return [
        {
            "model": shape.title,
            "weights": weights,
            "variant": name,
            "ms/step": 1000 * median(rounds, name),
            "/ base": ratio(rounds, name, "base"),
            "/ PEFT": ratio(rounds, name, "PEFT, bf16" if "bf16" in name else "PEFT, autocast"),
            "peak GiB": peak(step, args.device),
        }
        for name, step in found.items()
    ]


def peak(step: Step, device: str) -> float | None:
    """Return what a step allocates beyond all that is held between steps, weights of all variants included."""
    if device != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    if step.graph is not None:
        step.graph.clear()  # what a graph holds is allocated when it is recorded
        torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--weights", nargs="+", choices=["bf16", "nf4"], default=["bf16", "nf4"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a variant runs in a round")
    parser.add_argument("--tiny", action="store_true", help="small models, for a smoke test")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    known = TINY if args.tiny else SHAPES
    for name in set(args.models) - known.keys():
        print(f"{name}: left out (no tiny one)")
    shapes = [known[name] for name in args.models if name in known]
    tell(
        [partial(measure, shape, weights, args) for shape in shapes for weights in args.weights], args.device, args.json
    )


if __name__ == "__main__":
    main()

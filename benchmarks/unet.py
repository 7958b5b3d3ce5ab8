"""A LoRA training step of SD1.5's and SDXL's UNets: weights, peak memory and time, stock PEFT and ours in one run.

    python benchmarks/unet.py [--models sd15 sdxl] [--variants ...] [--rounds 5] [--json]

Random weights of the true shapes, batch 2, 512 and 1024 px, rank 16, adapters in fp32 under bf16 autocast, as diffusers'
training scripts do it. A step is forward, backward and fused AdamW; a frozen base's is forward and backward down to its
inputs. PEFT's 4 bits are what diffusers can load, NF4 on linear layers; ours take convolutions too; both with nested
statistics. "compiled" compiles the UNet's repeated blocks (diffusers' compile_repeated_blocks), "CUDA graph" replays
forward and backward (lora_adapters.GraphedLoss, which takes any model).
Each round runs every variant for some steps in turn, and a ratio is the median over rounds of two variants of the same
round. Weights are those of the base; the peak is theirs and all that a step allocates. On a CPU a tiny UNet runs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings
from functools import partial
from typing import Any

import torch
from interleaved import median, ratio, tell
from models import Shape, Step, peak
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_adapters
from lora_adapters.weights import mark_quantized, quantize_modules, quantizer_for

RANK = 16
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
#: Variant -> whose layers, on which base, with adapters on convolutions, how it is run.
VARIANTS: dict[str, tuple[str, str, bool, str]] = {
    "frozen base": ("none", "bf16", False, ""),
    "PEFT": ("peft", "bf16", False, ""),
    "ours": ("ours", "bf16", False, ""),
    "PEFT, convolutions": ("peft", "bf16", True, ""),
    "ours, convolutions": ("ours", "bf16", True, ""),
    "PEFT, compiled": ("peft", "bf16", False, "compiled"),
    "ours, compiled": ("ours", "bf16", False, "compiled"),
    "PEFT, CUDA graph": ("peft", "bf16", False, "graph"),
    "ours, CUDA graph": ("ours", "bf16", False, "graph"),
    "ours, compiled, CUDA graph": ("ours", "bf16", False, "compiled graph"),
    "frozen base, NF4": ("none", "nf4", False, ""),
    "PEFT, NF4 linear": ("peft", "nf4 linear", False, ""),
    "ours, NF4 linear": ("ours", "nf4 linear", False, ""),
    "ours, NF4": ("ours", "nf4", False, ""),
    "ours, NF4, compiled": ("ours", "nf4", False, "compiled"),
    "ours, NF4, CUDA graph": ("ours", "nf4", False, "graph"),
    "ours, NF4, compiled, CUDA graph": ("ours", "nf4", False, "compiled graph"),
}
#: What a ratio is taken to: the variant's own kind of adapters.
RIVALS = {"ours, convolutions": "PEFT, convolutions", "ours, compiled": "PEFT, compiled"}
RIVALS |= dict.fromkeys((name for name in VARIANTS if ", NF4" in name), "PEFT, NF4 linear")


def sd15() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def tiny() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
    )


def latents(side: int, text: int, pooled: int = 0) -> dict[str, Any]:
    given: dict[str, Any] = {
        "sample": torch.randn(2, 4, side, side),
        "timestep": torch.tensor([10, 500]),
        "encoder_hidden_states": torch.randn(2, 77, text),
    }
    if pooled:
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(2, pooled), "time_ids": torch.zeros(2, 6)}
    return given


SHAPES = {
    "sd15": Shape("SD1.5, batch 2, 512 px", sd15, lambda: latents(64, 768), ""),
    "sdxl": Shape("SDXL, batch 2, 1024 px", sdxl, lambda: latents(128, 2048, 1280), ""),
    "tiny": Shape("tiny UNet", tiny, lambda: latents(8, 64), ""),
}


def bases(shape: Shape, device: str, wanted: set[str]) -> dict[str, tuple[nn.Module, int]]:
    """Return the frozen UNet with its weights in bf16, with linear layers in NF4, and with our backend's choice in NF4.

    With each of them comes what it holds on the GPU, in bytes.
    """
    held = _held(device)
    torch.manual_seed(0)
    with torch.device(device):
        dense = shape.make().to(torch.bfloat16).requires_grad_(False)
    found = {"bf16": (dense, _held(device) - held)}
    quantizer = quantizer_for("nf4")
    for name in wanted - {"bf16"}:
        held = _held(device)
        model: Any = copy.deepcopy(dense)
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        if name == "nf4":
            from lora_adapters_diffusers.loading import quantize

            quantize(model, "nf4")
        else:
            quantize_modules(model, dict.fromkeys(linear, quantizer), torch.bfloat16)
            mark_quantized(model, quantizer)
        model.is_loaded_in_4bit = True
        found[name] = (model, _held(device) - held)
    return found


def _held(device: str) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def step_of(name: str, base: nn.Module, shape: Shape, inputs: dict[str, Any]) -> Step:
    """Return a variant's step. It shares the base's weights, which nothing trains."""
    whose, _, convolutions, how = VARIANTS[name]
    model: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    ends = ATTENTION + CONVOLUTIONS * convolutions
    targets = [n for n, _ in model.named_modules() if n.endswith(tuple("." + end for end in ends))]
    if whose == "ours":
        lora_adapters.attach(model, rank=RANK, targets=targets, modules_to_save=[], seed=0)
    elif whose == "peft":
        get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    if "compiled" in how:
        # Blocks of one class come with several widths and sizes, each compiled for itself.
        torch._dynamo.config.recompile_limit = 64
        model.compile_repeated_blocks()
    return Step(model, shape, inputs, autocast=whose != "none", graphed="graph" in how)


def measure(shape: Shape, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one UNet."""
    wanted = [
        name
        for name in VARIANTS
        if name in args.variants and ("graph" not in VARIANTS[name][3] or args.device == "cuda")
    ]
    stored = bases(shape, args.device, {VARIANTS[name][1] for name in wanted})
    inputs = {name: _to(value, args.device) for name, value in shape.inputs().items()}
    found = {name: step_of(name, stored[VARIANTS[name][1]][0], shape, inputs) for name in wanted}
    for step in found.values():
        step(3)
    rounds = []
    for turn in range(args.rounds):
        times = {}
        for name in wanted if turn % 2 else reversed(wanted):
            found[name]()
            start = time.perf_counter()
            found[name](args.steps)
            times[name] = (time.perf_counter() - start) / args.steps
        rounds.append(times)
    return [_row(shape, name, found[name], stored[VARIANTS[name][1]][1], rounds, args.device) for name in wanted]


def _row(shape: Shape, name: str, step: Step, weights: int, rounds: Any, device: str) -> dict[str, Any]:
    beyond = peak(step, device)
    others = set(rounds[0])
    rival = RIVALS.get(name, "PEFT")
    return {
        "UNet": shape.title,
        "variant": name,
        "weights GB": weights / 1e9 if weights else None,
        "peak GB": None if beyond is None else weights / 1e9 + beyond * 2**30 / 1e9,
        "ms/step": 1000 * median(rounds, name),
        "/ frozen base": ratio(rounds, name, "frozen base") if "frozen base" in others else None,
        "/ PEFT": ratio(rounds, name, rival) if rival in others else None,
    }


def _to(value: Any, device: str) -> Any:
    return {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["sd15", "sdxl"] if cuda else ["tiny"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=5, help="steps of a variant in a round, after one that is not timed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the tables")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    tell([partial(measure, SHAPES[name], args) for name in args.models], args.device, args.json)


if __name__ == "__main__":
    main()

"""A training step on the CPU: the frozen base, stock PEFT and ours, in turn within one run.

    python benchmarks/cpu.py [--isa native avx2] [--models llm vit unet] [--bases fp32 nf4] [--ranks 8 16] [--json]

A step is forward and backward, the inputs' gradient included, without an optimizer. All three compute on the same
weights and inputs; PEFT is `get_peft_model` on the same modules with the same rank, and on the 4-bit base it has its own
4-bit layers. Where bitsandbytes has a bf16 kernel of its own (AVX512-BF16, evaluation only), stock PEFT runs with it
allowed and not, and ours is compared with the faster. Ratios are medians over rounds of (ours / theirs of the same
round). "operations" is that ratio for the arithmetic alone, x W^T + (x A^T) B^T and its gradients: rank and width decide
how much of a step the products with A and B are. Memory is the peak of the step with the weights, by
lora_adapters.memory.measure_step.

--isa avx2 runs the same in a process that hides AVX512 from torch, oneDNN, MKL and bitsandbytes' Python side.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

from interleaved import median, ratio, seconds, table

ISA = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
#: Sizes: what is measured, and what a smoke test runs.
LLM = {"full": dict(hidden=512, layers=4, tokens=512), "tiny": dict(hidden=64, layers=1, tokens=16)}
VIT = {"full": dict(hidden=384, layers=4, image=224, batch=4), "tiny": dict(hidden=64, layers=1, image=32, batch=1)}
UNET = {"full": dict(widths=(64, 128), size=32, batch=2), "tiny": dict(widths=(32, 64), size=8, batch=1)}
TARGETS = {"llm": "all-linear", "vit": "attention+mlp"}
UNET_NAMES = (".to_q", ".to_k", ".to_v", ".to_out.0", ".conv1", ".conv2", ".conv_shortcut", ".conv")


def llm(size: str) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import LlamaConfig, LlamaModel

    s = LLM[size]
    heads = s["hidden"] // 64
    config = LlamaConfig(
        hidden_size=s["hidden"],
        intermediate_size=s["hidden"] * 11 // 4,
        num_hidden_layers=s["layers"],
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        vocab_size=1000,
        use_cache=False,
    )
    return LlamaModel(config), {"inputs_embeds": torch.randn(1, s["tokens"], s["hidden"])}


def vit(size: str) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import ViTConfig, ViTModel

    s = VIT[size]
    config = ViTConfig(
        hidden_size=s["hidden"],
        intermediate_size=4 * s["hidden"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["hidden"] // 64,
        image_size=s["image"],
    )
    return ViTModel(config, add_pooling_layer=False), {
        "pixel_values": torch.randn(s["batch"], 3, s["image"], s["image"])
    }


def unet(size: str) -> tuple[Any, dict[str, Any]]:
    import torch
    from diffusers import UNet2DConditionModel

    s = UNET[size]
    model = UNet2DConditionModel(
        sample_size=s["size"],
        block_out_channels=s["widths"],
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=2,  # heads, in spite of its name
    )
    return model, {
        "sample": torch.randn(s["batch"], 4, s["size"], s["size"]),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(s["batch"], 77, 128),
    }


MODELS: dict[str, Callable[[str], tuple[Any, dict[str, Any]]]] = {"llm": llm, "vit": vit, "unet": unet}


def variants(name: str, model: Any, base: str, rank: int) -> dict[str, Any]:
    """Return the models to compare, each with weights of its own: the frozen base, PEFT's and ours."""
    import torch
    from peft import LoraConfig, get_peft_model

    import lora_adapters
    from lora_adapters.weights import quantize_modules, quantizer_for
    from lora_adapters.weights.marking import mark_quantized

    if name == "unet":
        names = [n for n, _ in model.named_modules() if n.endswith(UNET_NAMES)]
    else:
        names = [layer.name for layer in lora_adapters.plan(model, targets=TARGETS[name]).layers]

    def stored() -> Any:
        twin = copy.deepcopy(model).requires_grad_(False)
        if base != "fp32":
            # Linear only: stock PEFT can't begin on a 4-bit convolution (it would draw A as bytes).
            linear = [n for n in names if isinstance(twin.get_submodule(n), torch.nn.Linear)]
            quantize_modules(twin, dict.fromkeys(linear, quantizer_for(base)), torch.float32)
            mark_quantized(twin, quantizer_for(base))
        return twin

    def stock(kernel: bool = False) -> Any:
        made = get_peft_model(stored(), LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
        for module in made.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = kernel
        return made

    made = {"base": stored(), "PEFT": stock(), "ours": stock()}
    lora_adapters.optimize(made["ours"])
    if base != "fp32" and _has_bf16_kernel():
        made["PEFT, bf16 kernel"] = stock(True)
    return made


def _has_bf16_kernel() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def stepper(model: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """Return a function that runs forward and backward, down to the inputs."""
    model.train()
    given = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    held = [t for t in (*model.parameters(), *given.values()) if t.requires_grad]

    def step() -> None:
        for tensor in held:
            tensor.grad = None
        first(model(**given)).square().mean().backward()

    return step


def first(output: Any) -> Any:
    return next(iter(output.values())) if hasattr(output, "values") else output[0]


def same(models: dict[str, Any], inputs: dict[str, Any]) -> float:
    """Give all adapters the same values; return how far ours and PEFT's outputs are apart, relative to their size."""
    import torch

    outputs = {}
    for name, model in models.items():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        with torch.no_grad():
            outputs[name] = first(model.train()(**inputs))
    return ((outputs["ours"] - outputs["PEFT"]).norm() / outputs["PEFT"].norm()).item()


def operations(name: str, model: Any, inputs: dict[str, Any], rank: int) -> float:
    """Return how many times the base's arithmetic a step with LoRA takes, by torch's count over stock PEFT in fp32."""
    from torch.utils.flop_counter import FlopCounterMode

    models, counts = variants(name, model, "fp32", rank), {}
    for key in ("base", "PEFT"):
        with FlopCounterMode(display=False) as counter:
            stepper(models[key], inputs)()
        counts[key] = counter.get_total_flops()
    return counts["PEFT"] / counts["base"]


def memory(model: Any, inputs: dict[str, Any]) -> int:
    from lora_adapters.memory import measure_step

    given = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    return measure_step(model, given, optimizer=None, loss=lambda output: first(output).square().mean()).total


def measure(name: str, base: str, rank: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row of the table."""
    import torch

    row: dict[str, Any] = {"cpu": torch.backends.cpu.get_cpu_capability(), "model": name, "weights": base, "rank": rank}
    torch.manual_seed(0)
    try:
        model, inputs = MODELS[name](args.size)
    except ImportError as error:
        return row | {"skipped": f"{error.name} is not installed"}
    models = variants(name, model, base, rank)
    apart = same(models, inputs)
    if apart > 1e-5:
        raise SystemExit(f"{name}, {base}: our output differs from PEFT's by {apart:.1e}; timing it means nothing.")
    rounds = seconds({key: stepper(each, inputs) for key, each in models.items()}, args.rounds)
    peers = [key for key in models if key.startswith("PEFT")]
    peer = min(peers, key=lambda key: median(rounds, key))
    ours_bytes, peer_bytes = memory(models["ours"], inputs), memory(models["PEFT"], inputs)
    other = {f"{key} ms": median(rounds, key) * 1000 for key in peers[1:]}
    return row | {
        "base ms": median(rounds, "base") * 1000,
        "PEFT ms": median(rounds, "PEFT") * 1000,
        "PEFT, bf16 kernel ms": other.get("PEFT, bf16 kernel ms"),
        "ours ms": median(rounds, "ours") * 1000,
        "ours / PEFT": ratio(rounds, "ours", peer),
        "ours / base": ratio(rounds, "ours", "base"),
        "operations / base": operations(name, model, inputs, rank),
        "PEFT MiB": peer_bytes / 2**20,
        "ours MiB": ours_bytes / 2**20,
        "memory ours / PEFT": ours_bytes / peer_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", choices=list(ISA), default=["native", "avx2"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--bases", nargs="+", choices=["fp32", "nf4"], default=["fp32", "nf4"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the process that measures
    args = parser.parse_args()
    if args.here:
        warnings.simplefilter("ignore")
        rows = [measure(m, base, rank, args) for m in args.models for base in args.bases for rank in args.ranks]
        print(json.dumps(rows))
        return
    rows = []
    for isa in args.isa:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--here"],
            env=os.environ | ISA[isa],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows += json.loads(done.stdout.splitlines()[-1])
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(table([row for row in rows if "skipped" not in row]))
    for row in rows:
        if "skipped" in row:
            print(f"{row['model']}, {row['weights']}: skipped, {row['skipped']}")


if __name__ == "__main__":
    main()

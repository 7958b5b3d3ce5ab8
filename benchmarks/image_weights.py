"""Bytes of timm models' weights: in 16 bits, with linear layers in NF4, and as `quantization="nf4"` stores them.

    python benchmarks/image_weights.py [--models resnet50 ...] [--json]

Models are built on the meta device: sizes need no weights. "Linear only" is what loaders do that replace nn.Linear alone
(the classifier left dense). All statistics and code tables count, and what stays dense counts in 16 bits.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import timm
import torch
from interleaved import table
from torch import nn

from lora_adapters.quantized import quantized_layers
from lora_adapters.weights import quantizer_for

MODELS = (
    "resnet50",
    "efficientnet_b0",
    "convnext_base",
    "swin_base_patch4_window7_224",
    "vit_base_patch16_224",
)


def weight_bytes(model: Any, quantized: set[str]) -> int:
    """Return the bytes of a model's parameters and buffers, these modules' weights in NF4 and the rest in 16 bits."""
    quantizer, names = quantizer_for("nf4"), {f"{name}.weight" for name in quantized}
    return sum(
        quantizer.nbytes(tensor.shape) if name in names else 2 * tensor.numel()
        for name, tensor in model.state_dict().items()
    )


def measure(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    head = {id(module) for module in model.get_classifier().modules()}
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in head}
    ours = set(quantized_layers(model, "nf4"))
    mb = {key: weight_bytes(model, names) / 1e6 for key, names in (("16", set()), ("linear", linear), ("ours", ours))}
    return {
        "model": name,
        "values": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M",
        "16 bits, MB": mb["16"],
        "NF4, linear only, MB": mb["linear"],
        "NF4, ours, MB": mb["ours"],
        "ours / 16 bits": mb["ours"] / mb["16"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    args = parser.parse_args()
    rows = [measure(name) for name in args.models]
    print(json.dumps(rows, indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()

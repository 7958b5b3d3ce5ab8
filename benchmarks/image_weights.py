"""Bytes of image models' weights: in 16 bits, with linear layers in NF4, and as `quantization="nf4"` stores them.

    python benchmarks/image_weights.py [--models resnet50 sd1.5 ...] [--json]

Names are timm's, or those of the denoisers below, which need diffusers. Models are built on the meta device: sizes need no
weights. "Linear only" is what loaders do that replace nn.Linear alone (a classifier left dense). All statistics and code
tables count, and what stays dense counts in 16 bits.
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

#: Denoisers, as the config.json of their releases describes them where that differs from the class's defaults.
_SDXL_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
DENOISERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1.5": ("UNet2DConditionModel", dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)),
    "sd2.1": (
        "UNet2DConditionModel",
        dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    ),
    "sdxl": (
        "UNet2DConditionModel",
        dict(
            block_out_channels=(320, 640, 1280),
            down_block_types=_SDXL_BLOCKS,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
    ),
    "sd3-medium": (
        "SD3Transformer2DModel",
        dict(
            num_layers=24,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=192,
        ),
    ),
    "flux.1-dev": ("FluxTransformer2DModel", dict(guidance_embeds=True)),
}


def build(name: str) -> Any:
    """Return a model on the meta device."""
    with torch.device("meta"):
        if name not in DENOISERS:
            return timm.create_model(name)
        import diffusers

        cls, config = DENOISERS[name]
        return getattr(diffusers, cls)(**config)


def weight_bytes(model: Any, quantized: set[str]) -> int:
    """Return the bytes of a model's parameters and buffers, these modules' weights in NF4 and the rest in 16 bits."""
    quantizer, names = quantizer_for("nf4"), {f"{name}.weight" for name in quantized}
    return sum(
        quantizer.nbytes(tensor.shape) if name in names else 2 * tensor.numel()
        for name, tensor in model.state_dict().items()
    )


def measure(name: str) -> dict[str, Any]:
    model = build(name)
    head = set() if name in DENOISERS else {id(module) for module in model.get_classifier().modules()}
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
    parser.add_argument("--models", nargs="+", default=[*MODELS, *DENOISERS])
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    args = parser.parse_args()
    rows = [measure(name) for name in args.models]
    print(json.dumps(rows, indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()

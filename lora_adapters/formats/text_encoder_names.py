"""Names of the layers of CLIP's and T5's encoders that adapters are trained on."""

from __future__ import annotations

from .names import NameTable

_CLIP_LAYER = "text_model.encoder.layers.#"
CLIP_NAMES = NameTable(
    [
        *(f"{_CLIP_LAYER}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *(f"{_CLIP_LAYER}.mlp.{name}" for name in ("fc1", "fc2")),
        "text_projection",
    ]
)
_T5_BLOCK = "encoder.block.#.layer"
T5_NAMES = NameTable(
    [
        *(f"{_T5_BLOCK}.0.SelfAttention.{name}" for name in "qkvo"),
        *(f"{_T5_BLOCK}.1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")),
    ]
)


def with_text_model(component: str, name: str) -> str:
    """Put CLIP's "text_model." back, which transformers 5 leaves out in CLIPTextModel, and in no other class."""
    clip = component.startswith("text_encoder") and name.startswith(
        ("encoder.layers.", "embeddings.", "final_layer_norm")
    )
    return f"text_model.{name}" if clip else name


def without_text_model(name: str) -> str:
    """Return a CLIP layer's name as transformers 5 has it in CLIPTextModel; it ends the longer name of other classes."""
    return name.removeprefix("text_model.")

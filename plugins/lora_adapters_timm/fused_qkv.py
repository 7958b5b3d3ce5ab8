"""Which rows of a fused projection make queries, which keys, which values.

Every layout here was read in timm's source, and the sweep checks each with an oracle that knows none of it
(tests/timm/attention_oracle.py). A class that is not listed has no layout, so its q, k or v can't be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lora_adapters.targets import Rows

Parts = Mapping[str, Rows]


def parts_of(owner: nn.Module, layer: nn.Module, path: str) -> Parts:
    """Return role -> rows of the layer's weight, {} if the layout is not known.

    Args:
        owner: the attention module.
        layer: the projection, without adapters.
        path: the layer's name inside the owner.
    """
    total = layer.out_features if isinstance(layer, nn.Linear) else getattr(layer, "out_channels", 0)
    layout = _LAYOUTS.get(f"{_place(type(owner))}:{type(owner).__qualname__}")
    widths = layout(owner, path) if layout is not None else None
    if widths is None:
        return {}
    repeats, names, sizes = widths
    sizes = sizes or [total // (repeats * len(names))] * len(names)
    repeats = repeats or total // sum(sizes)
    if repeats * sum(sizes) != total:
        return {}
    return _rows(repeats, names, sizes)


def _place(cls: type) -> str:
    return cls.__module__.removeprefix("timm.")


def _rows(repeats: int, names: Sequence[str], sizes: Sequence[int]) -> Parts:
    """Return the rows of a weight that repeats [names[0] | names[1] | ...] so many times, "" being none of q, k, v."""
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in names if name}
    start = 0
    for _ in range(repeats):
        for name, size in zip(names, sizes, strict=True):
            if name:
                found[name].append((start, start + size))
            start += size
    return {name: tuple(ranges) for name, ranges in found.items()}


#: Repeats (0: as often as they fit), names, and sizes (none: equal parts of whatever size the layer has).
Widths = tuple[int, Sequence[str], Sequence[int]]
Layout = Callable[[Any, str], Widths]

_QKV, _KV, _QK = ("q", "k", "v"), ("k", "v"), ("q", "k")


def _thirds(owner: Any, path: str) -> Widths:
    """[q|k|v], [k|v] or [q|k], by the projection's name."""
    child = path.partition(".")[0]
    return 1, {"kv": _KV, "qk": _QK}.get(child, _QKV), ()


def _per_head(owner: Any, path: str) -> Widths:
    """One [q|k|v] per head, all of one width."""
    return owner.num_heads, _QKV, ()


def _head_first(owner: Any, path: str) -> Widths:
    return _per_head(owner, path) if owner.head_first else _thirds(owner, path)


def _key_and_value_dim(owner: Any, path: str) -> Widths:
    """One [q|k|v] (or [k|v]) per head, values of a width of their own."""
    sizes = (owner.key_dim, owner.key_dim, owner.val_dim)
    return (owner.num_heads, _KV, sizes[1:]) if path.startswith("kv") else (owner.num_heads, _QKV, sizes)


def _one_head_a_layer(owner: Any, path: str) -> Widths:
    return 1, _QKV, (owner.key_dim, owner.key_dim, owner.val_dim)


def _halo(owner: Any, path: str) -> Widths:
    return owner.num_heads, _KV, (owner.dim_head_qk, owner.dim_head_v)


def _bottleneck(owner: Any, path: str) -> Widths:
    return 1, _QKV, (owner.dim_out_qk, owner.dim_out_qk, owner.dim_out_v)


def _lambda(owner: Any, path: str) -> Widths:
    return 1, _QKV, (owner.num_heads * owner.dim_qk, owner.dim_qk, owner.dim_v)


def _shvit(owner: Any, path: str) -> Widths:
    return 1, _QKV, (owner.qk_dim, owner.qk_dim, owner.pdim)


def _mobilevit_v2(owner: Any, path: str) -> Widths:
    return 1, _QKV, (1, owner.embed_dim, owner.embed_dim)


def _after_mlp(owner: Any, path: str) -> Widths:
    return 1, ("", *_QKV), owner.in_split


def _global_query(owner: Any, path: str) -> Widths:
    return 1, _KV if owner.use_global else _QKV, ()


def _lite_mla(owner: Any, path: str) -> Widths:
    """One [q|k|v] per group of `dim` channels."""
    return 0, _QKV, (owner.dim,) * 3


_LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        (
            "layers.attention:Attention",
            "layers.attention:AttentionRope",
            "layers.attention_pool:AttentionPoolLatent",
            "layers.diff_attention:DiffAttention",
            "models.beit:Attention",
            "models.cait:TalkingHeadAttn",
            "models.coat:FactorAttnConvRelPosEnc",
            "models.convit:GPSA",
            "models.convit:MHSA",
            "models.csatv2:SpatialTransformerBlock",
            "models.davit:ChannelAttention",
            "models.davit:ChannelAttentionV2",
            "models.davit:WindowAttention",
            "models.edgenext:CrossCovarianceAttn",
            "models.eva:EvaAttention",
            "models.fastvit:Attention",
            "models.hiera:MaskUnitAttention",
            "models.hieradet_sam2:MultiScaleAttention",
            "models.metaformer:Attention",
            "models.mvitv2:MultiScaleAttention",
            "models.nest:Attention",
            "models.pvt_v2:Attention",
            "models.swin_transformer:WindowAttention",
            "models.swin_transformer_v2:WindowAttention",
            "models.swin_transformer_v2_cr:WindowMultiHeadAttention",
            "models.tnt:Attention",
            "models.twins:GlobalSubSampleAttn",
            "models.twins:LocallyGroupedAttn",
            "models.visformer:Attention",
            "models.vision_transformer:Attention",  # where timm before 1.0.23 had what is in layers.attention now
            "models.vision_transformer_relpos:RelPosAttention",
            "models.vision_transformer_sam:Attention",
            "models.volo:Attention",
            "models.volo:ClassAttention",
            "models.xcit:XCA",
        ),
        _thirds,
    ),
    "layers.attention2d:Attention2d": _head_first,
    "layers.bottleneck_attn:BottleneckAttn": _bottleneck,
    "layers.halo_attn:HaloAttn": _halo,
    "layers.lambda_layer:LambdaLayer": _lambda,
    "models.cpubone:ConvAttention": _per_head,
    "models.efficientformer:Attention": _key_and_value_dim,
    "models.efficientvit_mit:LiteMLA": _lite_mla,
    "models.efficientvit_msra:CascadedGroupAttention": _one_head_a_layer,
    "models.gcvit:WindowAttentionGlobal": _global_query,
    "models.levit:Attention": _key_and_value_dim,
    "models.levit:AttentionDownsample": _key_and_value_dim,
    "models.lowformer:ConvAttention": _per_head,
    "models.maxxvit:Attention2d": _head_first,
    "models.maxxvit:AttentionCl": _head_first,
    "models.mobilevit:LinearSelfAttention": _mobilevit_v2,
    "models.shvit:SHSA": _shvit,
    "models.tiny_vit:Attention": _key_and_value_dim,
    "models.vision_transformer:DiffParallelScalingBlock": _after_mlp,
    "models.vision_transformer:ParallelScalingBlock": _after_mlp,
}

"""Attention modules: found by the projections that they hold, and which projection is which."""

from __future__ import annotations

import re

from torch import nn

#: What the projections of an attention are called in timm, by role. A fused one is "qkv" whatever it holds of q, k and v,
#: except keys and values alone; `fused_qkv` says which rows are which.
_WORDS = {
    "q": ("q", "q_proj", "wq", "query", "to_query", "to_q"),
    "k": ("k", "k_proj", "wk", "key", "to_key", "to_k"),
    "v": ("v", "v_proj", "wv", "value", "to_value", "to_v", "v_gate"),
    "kv": ("kv", "kv_proj", "to_kv"),
    "qkv": ("qkv", "qkvs", "qkv_proj", "qk"),
    "o": ("proj", "o_proj", "out_proj", "to_out", "output", "final"),
}
_ROLE_OF = {word: role for role, words in _WORDS.items() for word in words}


def projections(module: nn.Module) -> dict[str, str]:
    """Return name of a child -> role of the projection in it, or {} if the module is no attention.

    A module is one if it holds q, k and v, in one projection or in several. Some classes name theirs differently and are
    known by what else they say of it.
    """
    names = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    roles = {name: _ROLE_OF[name] for name in names if name in _ROLE_OF}
    if "in_proj" in names and hasattr(module, "in_split"):  # [mlp|q|k|v] in one layer: parallel blocks of ViTs
        parallel = {"in_proj": "qkv", "attn_out_proj": "o", "mlp_out_proj": "mlp", "out_proj": "o"}
        return {name: role for name, role in parallel.items() if name in names}
    if "pwise" in names and hasattr(module, "num_keys"):  # LowFormer, CPUBone
        return {"pwise": "qkv"} | {name: "o" for name in ("o_proj", "upsampling") if name in names}
    held = set(roles.values())
    if "qkv" in held or ("q" in held and ("k" in held or "kv" in held)):
        if _is_global_query(module):
            roles |= {name: "kv" for name, role in roles.items() if role == "qkv"}
        return roles | ({"mlp": "mlp"} if "mlp" in names else {})
    if "v" in held and "attn" in names:  # VOLO's outlook attention: weights of the attention come straight from x
        return roles | {"attn": "other"}
    return {}


def _is_global_query(module: nn.Module) -> bool:
    """Return True for GCViT's attention whose `qkv` holds [k|v] only: its queries come from elsewhere."""
    return getattr(module, "use_global", False) is True and type(module).__name__ == "WindowAttentionGlobal"


def projection_of(path: str) -> str:
    """Return the child that a path inside an attention begins with; "qkvs" for "qkvs.0.conv"."""
    return re.match(r"[^.]*", path)[0]  # type: ignore[index]

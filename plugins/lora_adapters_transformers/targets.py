"""Roles of transformers' modules: a few structural rules, and what they can't know as data.

A module's place (attention, mixer, mlp, ...) is said by the class of its nearest telling ancestor; inside a place the
last parts of its name say its role. Model types for which that is not true have a TargetMap of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lora_adapters.hooks.specs import TargetMap

#: Place -> class names of the modules that make it. The nearest ancestor with an entry decides; first match wins.
PLACES: tuple[tuple[str, str], ...] = (
    ("indexer", r"Indexer|HyperConnection"),
    ("router", r"Router|Gating$|TopKGate|MoE\w*Gate$"),
    ("pooler", r"Pooler|SequenceSummary"),
    ("mixer", r"Mamba|Mixer|ShortConv|RecurrentBlock|RgLru|ForgetGate"),
    (
        "linear attention",
        r"DeltaNet|Delta(Rule)?Attention|LinearAttention|Lightning|xLSTMLayer$|mLSTM|RwkvSelfAttention",
    ),
    (
        "attention",
        r"(Attention|Attn)(?!.*(Layer|Model|Stack)$)|MLA$|SelfOutput$|CCAProjection|KV?Compressor$|HCACompressor|"
        r"CSACompressor|(Query|KeyValue|GatedOutput)Projection$",
    ),
    ("projector", r"Projector|Projection|Connector|Resampler|PatchMerger|Aligner"),
    ("mlp", r"MLP|Mlp|FeedForward|FFN|PositionWise|DenseActDense|DenseGatedAct|Expert|Intermediate$|^FF$"),
    ("mlp", r"Output$"),
    ("embeddings", r"Embeddings?$|PatchEmbed"),
    ("norm", r"Norm$"),
)

#: Names of projections inside attention and mixers, searched from the last part of the name; first match wins.
ATTENTION_LEAVES: tuple[tuple[str, str], ...] = (
    ("qkv", r"(^|\.)(qkv|query_key_value|c_attn|Wqkv|wqkv|qkvz|to_qkv|in_proj_qkvz?|qkv_proj|attn_qkv|in_proj)$"),
    ("kv", r"(^|\.)(kv|to_kv|kv_proj|key_value|kv_[ab]_proj|kv_a_proj_with_mqa)$"),
    (
        "q",
        r"(^|\.)(q|query|queries|to_q|wq|Wq|q_[ab]|project_q|receptance)(_(proj|lin|head|global|linear|gate_proj))?$",
    ),
    ("q", r"(^|\.)((layout|w2e|e2w|e2e)_query|query_key|q_[ab]_proj)$"),
    ("k", r"(^|\.)(k|key|keys|to_k|wk|Wk|project_k|layout_key)(_(proj|lin|head|global|linear|protein))?$"),
    ("v", r"(^|\.)(v|value|values|to_v|wv|Wv|project_v|layout_value)(_(proj|lin|head|global|linear|protein))?$"),
    ("v", r"v_proj_(current|delayed)$"),
    ("o", r"(^|\.)(o|out|output|attention_out|wo|Wo|o_[ab]|to_out(\.0)?)(_(proj|lin|linear))?$"),
    ("o", r"(^|\.)(dense|c_proj|proj|post_proj|projection|projection_layer|post)$"),
)

#: Names that say "feed-forward" where the owner's class says nothing (a layer that holds its own fc1 and fc2).
MLP_NAMES = (
    r"(^|\.)(fc_?[12]|fc_(in|out)|lin[12]|linear_?[12]|w[123]|wi(_[01])?|c_fc|ffn(_output)?|gate_proj|up_proj|down_proj)$"
    r"|(^|\.)(mlp|ffn|feed_forward|ff)\.\d+(\.\d+)?$|(^|\.)(\w+_)?(intermediate|output)(_query)?\.dense$"
)
#: Modules of a mixture of experts that choose or weigh experts.
ROUTER_NAMES = r"(^|\.)(router|gate|shared_expert_gate|router\.(classifier|layer|gate))$"

#: Places whose modules belong to no better-known role.
OTHER_PLACES = ("mixer", "indexer", "pooler", "projector", "embeddings", "norm")

MAMBA_REASON = "PEFT refuses it for this model type: fused Mamba kernels read its weight without calling it"
PATCHER_REASON = "its result only decides where patches begin, so no gradient would reach an adapter"

#: Owner's class -> children whose weight its source reads on a path that no model takes (they are called otherwise).
CALLED = {
    "DisentangledSelfAttention": ("in_proj",),  # read for queries of another sequence, which no DeBERTa model gives
    "BloomAttention": ("dense",),  # read with config.slow_but_exact, an aid for checking Megatron checkpoints
    "BloomMLP": ("dense_4h_to_h",),
    "LSHSelfAttention": ("query_key", "value"),  # read when generating from a cache
    "LocalSelfAttention": ("query", "key", "value"),
}
#: Subclasses of torch.nn.Linear with a forward of their own that is the plain product all the same.
PLAIN_LINEARS = ("FalconLinear",)
NOT_PLAIN_REASON = "its class {cls} computes something else than a linear product, so a LoRA layer would not fit it"

#: Class name -> module that makes the task's output inside the base model, where the task class adds none of its own.
INNER_HEADS = {"PerceiverForSequenceClassification": ("perceiver.decoder.decoder.final_layer",)}

#: Attention whose projections are no modules: family -> the note the plan shows.
UNREACHABLE = {
    "xlnet": "XLNet's attention projections (rel_attn.q, k, v, o, r) are bare parameters that enter einsum, which no "
    "LoRA layer reaches: the default adapts the feed-forward layers only.",
}

#: Families whose roles the sweep can't check -> why. targets="auto" and role expressions raise an error for them, until
#: the user names the modules or gives the family a TargetMap with roles.
UNVERIFIED = {
    "layoutlmv2": "LayoutLMv2 needs detectron2, which has to be built from source, so no forward pass has confirmed what "
    "its layers are for.",
}

TARGET_MAPS: tuple[TargetMap, ...] = (
    TargetMap("transformers", ("*",), default="attention+mlp"),
    TargetMap("transformers", ("xlnet",), default="mlp"),
    # Most of these show in the source; all are named, so that what is saved here loads in PEFT.
    TargetMap(
        "transformers",
        ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"),
        never={r"(^|\.)(out_proj|conv1d)$": MAMBA_REASON},
    ),
    TargetMap("transformers", ("blt",), never={r"(^|\.)patcher\.": PATCHER_REASON}),
    TargetMap("transformers", ("esm",), roles={"head": (r"(^|\.)contact_head\.",)}),
    TargetMap("transformers", ("fsmt",), roles={"head": (r"(^|\.)decoder\.output_projection$",)}),
    # Its projections are convolutions of width 1, and the one after attention stands outside the attention module.
    TargetMap(
        "transformers",
        ("squeezebert",),
        roles={"o": (r"\.post_attention\.conv1d$",), "mlp": (r"\.(intermediate|output)\.conv1d$",)},
    ),
)


def place_of(class_names: Iterator[str] | list[str]) -> tuple[str, str]:
    """Return the place and the class that says it, from the classes of a module's ancestors, the nearest first."""
    for class_name in class_names:
        for place, pattern in PLACES:
            if re.search(pattern, class_name):
                return place, class_name
    return "", ""


def leaf_role(name: str, leaves: tuple[tuple[str, str], ...] = ATTENTION_LEAVES) -> str:
    """Return the role that the end of a name says inside attention, or ""."""
    return next((role for role, pattern in leaves if re.search(pattern, name)), "")

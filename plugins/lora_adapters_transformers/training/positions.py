"""How many tokens a model has positions for. A row that is longer fails in the middle of a run, as an index error."""

from __future__ import annotations

import re

from torch import nn

#: Names of tables with one learnt (or stored) vector per position. Relative ones and those of rotations have no such end.
_TABLE = re.compile(r"wpe|embed_positions?|positions?_embed|pos(ition)?_embeddings?|pos_emb")
#: Parts of a model that take no text.
_NOT_TEXT = re.compile(r"vision|visual|image|audio")


def limits(model: nn.Module) -> tuple[int | None, int | None]:
    """Return the most tokens in a row, and in a target of an encoder-decoder; None where nothing limits them.

    Args:
        model: of transformers, adapted or not, on any device.
    """
    rows: list[int] = []
    targets: list[int] = []
    has_targets = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for name, module in model.named_modules():
        parts = name.split(".")
        if not isinstance(module, nn.Embedding) or _NOT_TEXT.search(name):
            continue
        if any(_TABLE.fullmatch(part) for part in parts):
            # Some count positions from an offset (OPT, BART), some from behind the pad token's (RoBERTa).
            first = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            (targets if has_targets and "decoder" in parts else rows).append(module.num_embeddings - first)
    return min(rows, default=None), min(targets, default=None)

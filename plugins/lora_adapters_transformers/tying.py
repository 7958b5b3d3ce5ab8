"""Ties between weights after merging: layers that shared one weight may now hold weights of their own.

transformers ties by name: `tie_weights`, `resize_token_embeddings` and loading would set one end to the other, and what
was merged into it would be gone. (Loading leaves weights alone that the file holds with two different values.)
"""

from __future__ import annotations

import warnings
from operator import attrgetter

from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_adapters.errors import LoraAdaptersWarning

#: Names of transformers that are no public interface: tests/test_canaries.py looks after them.
_NAMES = ("get_expanded_tied_weights_keys", "all_tied_weights_keys", "_tied_weights_keys")


def forget_broken_ties(model: nn.Module) -> None:
    """Make the ties that a plain (unloaded) model knows those that hold, so that it stays as it is, saved or not.

    `config.tie_word_embeddings` becomes False where no tie is left. While one holds it stays True: some models read it
    when they compute, and a file drops one end of each tie that holds.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if missing := [name for name in _NAMES for part in parts if not hasattr(part, name)]:
        warnings.warn(
            f"This version of transformers lacks {missing[0]}. If the merged layers share weights with others (an output "
            "layer with the embedding), saving or resizing the model may tie them again: check its output afterwards.",
            LoraAdaptersWarning,
            stacklevel=2,
        )
        return
    changed, tied = set(), set()
    for part in parts:
        ties = part.get_expanded_tied_weights_keys(all_submodels=False)
        holding = _holding(part, ties)
        if holding:
            tied.add(id(part.config))
        if holding != ties:
            changed.add(id(part.config))
            _separate(part, ties.keys() - holding.keys())
            part._tied_weights_keys = holding
    for part in parts if changed else ():
        part.all_tied_weights_keys = _holding(part, part.all_tied_weights_keys)
        if id(part.config) in changed - tied:
            part.config.tie_word_embeddings = False


def _holding(part: nn.Module, ties: dict[str, str]) -> dict[str, str]:
    return {a: b for a, b in ties.items() if _tensor(part, a) is _tensor(part, b)}


def _tensor(part: nn.Module, name: str) -> Tensor | None:
    try:
        return attrgetter(name)(part)
    except AttributeError:  # a name of the class that this model does without
        return None


def _separate(part: nn.Module, names: set[str]) -> None:
    """Give each of these a weight of its own: a file would hold one of them, and loading would tie the others wrongly."""
    seen: set[int] = set()
    for name in sorted(names):
        owner, _, leaf = name.rpartition(".")
        module = part.get_submodule(owner)
        weight = module._parameters.get(leaf)
        if weight is None:
            continue
        if id(weight) in seen:
            module._parameters[leaf] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        seen.add(id(weight))

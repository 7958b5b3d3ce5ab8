"""Several rows in one of `max_length` tokens, none of which sees another.

Which rows go together is best-fit-decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling",
arXiv:2404.10830): the longest first, each into the fullest row that still has room, so that none is cut. transformers
makes the block-diagonal mask from position ids that begin again with each document, if it is given neither an attention
mask nor a cache. Whether a model honours that is checked on the model.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_adapters.errors import RequestError, UnsupportedError
from lora_adapters_transformers.data.encoded import IGNORED

if TYPE_CHECKING:
    import datasets
    import torch

#: check_packing looks at this many tokens of each document at most.
_GLANCE = 48


def pack(rows: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Return packed rows of at most `max_length` tokens, each row of `rows` whole in one of them.

    Columns: `input_ids`, `labels` and `position_ids` (lists of int, equally long). Positions begin at 0 with each document;
    a document's first token has label -100, since what comes before it is of another. Same rows, same result.

    Raises:
        RequestError: a row is longer than `max_length`.
    """
    import datasets
    import numpy as np
    import pyarrow as pa

    table = rows.select_columns(["input_ids", "labels"]).with_format("arrow")[:]
    ids, labels = (table.column(name).combine_chunks() for name in ("input_ids", "labels"))
    starts = ids.offsets.to_numpy()
    if not starts.tolist() == labels.offsets.to_numpy().tolist():
        raise RequestError("input_ids and labels of a row differ in length")
    lengths = np.diff(starts)
    groups = best_fit(lengths.tolist(), max_length)
    order = np.array([document for group in groups for document in group], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(lengths[order])])
    positions = np.arange(first[-1]) - np.repeat(first[:-1], lengths[order])
    taken = positions + np.repeat(starts[order], lengths[order])
    ends = np.cumsum([lengths[group].sum() for group in groups])

    def column(values: Any) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), pa.array(values, pa.int32()))

    new_labels = np.where(positions == 0, IGNORED, labels.values.to_numpy()[taken])
    columns = [ids.values.to_numpy()[taken], new_labels, positions]
    made = pa.table(dict(zip(["input_ids", "labels", "position_ids"], map(column, columns), strict=True)))
    return datasets.Dataset(made)


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return indices of `lengths` in groups that sum to at most `room`, by best fit, the longest first.

    Groups come in the order of their first index, and their indices in ascending order.

    Raises:
        RequestError: a length is above `room`.
    """
    longest = max(lengths, default=0)
    if longest > room:
        raise RequestError(f"a row has {longest} tokens, more than {room}: it can't be packed")
    groups: list[list[int]] = []
    left: dict[int, list[int]] = {}  # free room -> groups that have it
    rooms: list[int] = []  # the keys of `left`, ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(rooms, lengths[index])
        if at == len(rooms):
            free = room
            groups.append([])
            group = len(groups) - 1
        else:
            free = rooms[at]
            group = left[free].pop()
            if not left[free]:
                del left[free], rooms[at]
        groups[group].append(index)
        free -= lengths[index]
        if free not in left:
            insort(rooms, free)
        left.setdefault(free, []).append(group)
    return sorted(sorted(group) for group in groups)


def packing_facts(packed: datasets.Dataset, max_length: int) -> dict[str, Any]:
    """Return what a report says of packed rows: how many, documents in each on average, and how full they are."""
    import numpy as np

    positions = packed.select_columns(["position_ids"]).with_format("arrow")[:].column(0).combine_chunks()
    documents = int(np.count_nonzero(positions.values.to_numpy() == 0))
    return {
        "packed rows": len(packed),
        "documents per row": round(documents / len(packed), 2),
        "fill %": round(100 * len(positions.values) / (len(packed) * max_length), 1),
    }


def collate_packed(rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0) -> dict[str, Any]:
    """Return a batch of packed rows: int64 tensors (rows, longest) named as the columns, and `use_cache` False.

    Shorter rows are filled with one more document, of pads without a loss. There is no attention mask, and a cache must not
    be made: with either, transformers would not tell the documents apart.
    """
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, fill: Any) -> torch.Tensor:
        lists = [list(row[name]) for row in rows]
        return torch.tensor([values + fill(longest - len(values)) for values in lists], dtype=torch.long)

    return {
        "input_ids": column("input_ids", lambda count: [pad_token_id] * count),
        "labels": column("labels", lambda count: [IGNORED] * count),
        "position_ids": column("position_ids", lambda count: list(range(count))),
        "use_cache": False,
    }


def row_to_check(packed: datasets.Dataset) -> dict[str, Any] | None:
    """Return a packed row of two documents or more for `check_packing`, None if there is none."""
    for row in packed.select_columns(["input_ids", "position_ids", "labels"]):
        if len(_documents(row)) > 1:
            return row
    return None


def check_packing(model: torch.nn.Module, packed_row: Mapping[str, Any]) -> None:
    """Run the model on the beginnings of a packed row's documents, and see that each gives what it gives alone.

    Twice packed, the second time with another first document, on which the others may not depend; then each alone. The
    model runs in eval mode without gradients, on a few short documents, and is left as it was.

    Raises:
        RequestError: the row has one document only.
        UnsupportedError: documents see each other, positions don't begin again, or the model takes no position ids.
    """
    import torch

    from lora_adapters.modes import modes_kept

    documents = [document[:_GLANCE] for document in _documents(packed_row) if len(document) > 1][:3]
    if len(documents) < 2:
        raise RequestError("a row of at least two documents is needed to check packing")
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            packed = _logits(model, documents)
            changed = _logits(model, [_others(documents), *documents[1:]])
            alone = [_logits(model, [document])[0] for document in documents]
    except TypeError as e:
        raise UnsupportedError(f"training.packing: {_name(model)} takes no position_ids ({e}): set it to false") from e
    exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    scale = torch.cat(packed).float().std().item()
    seen = max(_distance(a, b).max().item() for a, b in zip(packed[1:], changed[1:], strict=True)) / scale
    apart = max(_distance(a, b).mean().item() for a, b in zip(packed, alone, strict=True)) / scale
    # What is masked has a weight of exactly 0, so that a change there changes nothing, save the rounding of layers that
    # handle tokens in groups. Alone, the shapes differ, and with them the rounding.
    leaks = not seen <= (1e-4 if exact else 5e-3)
    if leaks or not apart <= (1e-3 if exact else 0.05):
        why = (
            "sees the other documents of a packed row"
            if leaks
            else "reads a document in a packed row otherwise than alone"
        )
        raise UnsupportedError(
            f"training.packing: {_name(model)} {why} (logits change by {max(seen, apart):.2g} of their spread): "
            "set it to false"
        )


def _documents(row: Mapping[str, Any]) -> list[list[int]]:
    starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
    ids = list(row["input_ids"])
    return [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def _others(documents: list[list[int]]) -> list[int]:
    """Return the first document with other tokens, all of which the data has."""
    known = sorted({token for document in documents for token in document})
    following = dict(zip(known, [*known[1:], known[0]], strict=True))
    return [following[token] for token in documents[0]]


def _logits(model: torch.nn.Module, documents: list[list[int]]) -> list[torch.Tensor]:
    """Return the logits of each document, (tokens, vocabulary), from one packed row of them."""
    row = {
        "input_ids": [token for document in documents for token in document],
        "labels": [IGNORED for document in documents for _ in document],
        "position_ids": [position for document in documents for position in range(len(document))],
    }
    device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    batch = collate_packed([row])
    del batch["labels"]
    batch = {key: value if isinstance(value, bool) else value.to(device) for key, value in batch.items()}
    return list(model(**batch).logits[0].split([len(document) for document in documents]))


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() - b.float()).abs()


def _name(model: Any) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__

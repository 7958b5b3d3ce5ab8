"""Where in the tokens of a text a part of it begins, such that training and generating see the same tokens before it.

Generating starts from the tokens of the prompt alone. In the whole text a token may reach over the end of the prompt, or
the prompt's last tokens may differ, since tokenizers look ahead. Then the text is tokenized in parts.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORT = 200


class Boundaries:
    """Tokenizes rendered texts, which hold their special tokens already."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.fast = tokenizer.is_fast
        self.added = frozenset(tokenizer.added_tokens_decoder)
        self._short: dict[str, list[int]] = {}

    def of(self, texts: list[str]) -> list[TokenizedText]:
        """Return each text's tokens."""
        if not texts:
            return []
        out: Any = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=self.fast, verbose=False)
        offsets = out["offset_mapping"] if self.fast else [None] * len(texts)
        return [TokenizedText(self, *parts) for parts in zip(texts, out["input_ids"], offsets, strict=True)]

    def ids_of(self, text: str) -> list[int]:
        """Return the tokens of one text; short ones, such as the header of an answer, are remembered."""
        known = self._short.get(text)
        if known is None:
            known = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            if len(text) <= _SHORT and len(self._short) < 10_000:
                self._short[text] = known
        return known


class TokenizedText:
    """A text's tokens in `ids`; `places` may tokenize it again in parts, and `parted` says whether it did."""

    def __init__(self, boundaries: Boundaries, text: str, ids: list[int], offsets: list[Any] | None) -> None:
        self.boundaries, self.text, self.ids = boundaries, text, ids
        self.parted = False
        self._ends = None if offsets is None else [end for _, end in offsets]

    def places(self, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return for spans of characters, in ascending order, those of tokens in `ids`.

        The tokens before a span are those of the text before it by itself, in the part that it is in.
        """
        if self._ends is None:
            return self._places_by_prefixes(spans)
        bad = [start for start, _ in spans if self._place(start) is None]
        if bad:
            self.parted = True
            edges = [0, *bad, len(self.text)]
            parts = self.boundaries.of([self.text[a:b] for a, b in itertools.pairwise(edges)])
            self.ids = [token for part in parts for token in part.ids]
            self._ends = [edge + end for edge, part in zip(edges, parts, strict=False) for end in part._ends or []]
        return [(bisect_right(self._ends, start), bisect_right(self._ends, end)) for start, end in spans]

    def _place(self, cut: int) -> int | None:
        """Return how many tokens come before the cut, None if the text before it has other tokens by itself."""
        assert self._ends is not None
        place = bisect_right(self._ends, cut)
        last = place - 1
        while last >= 0 and self.ids[last] not in self.boundaries.added:
            last -= 1
        # Added tokens part a text before anything else looks at it, so what follows the last of them is all there is to
        # compare. A tokenizer that marks the beginning of a text differs there, hence the second look.
        if last >= 0 and self.boundaries.ids_of(self.text[self._ends[last] : cut]) == self.ids[last + 1 : place]:
            return place
        return place if self.boundaries.ids_of(self.text[:cut]) == self.ids[:place] else None

    def _places_by_prefixes(self, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Do without offsets, which slow tokenizers don't have."""
        cuts = [cut for span in spans for cut in span]
        before = [self.boundaries.ids_of(self.text[:cut]) for cut in cuts]
        places = [len(ids) for ids in before]
        if any(self.ids[: len(ids)] != ids for ids in before):
            self.parted = True
            edges = [0, *cuts, len(self.text)]
            parts = [self.boundaries.ids_of(self.text[a:b]) for a, b in itertools.pairwise(edges)]
            self.ids = [token for part in parts for token in part]
            places = list(itertools.accumulate(len(part) for part in parts[:-1]))
        return list(zip(places[::2], places[1::2], strict=True))

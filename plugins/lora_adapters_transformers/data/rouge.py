"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

Words are runs of a-z and 0-9 in the lower-cased text, not stemmed, as in the rouge_score package: other scripts have none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORDS = re.compile("[a-z0-9]+")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the mean F-measures of predictions against their references: rouge1, rouge2 and rougeL, from 0 to 1.

    Raises:
        ValueError: their numbers differ, or there is none.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references: as many of each, and some")
    scores = [rouge_of(*pair) for pair in zip(predictions, references, strict=True)]
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def rouge_of(prediction: str, reference: str) -> dict[str, float]:
    """Return the F-measures of one prediction."""
    a, b = _WORDS.findall(prediction.lower()), _WORDS.findall(reference.lower())
    ngrams = {f"rouge{n}": _f(_shared(a, b, n), max(len(a) - n + 1, 0), max(len(b) - n + 1, 0)) for n in (1, 2)}
    return {**ngrams, "rougeL": _f(longest_common(a, b), len(a), len(b))}


def _f(shared: int, predicted: int, referred: int) -> float:
    """Return the harmonic mean of precision and recall."""
    if not shared:
        return 0.0
    precision, recall = shared / predicted, shared / referred
    return 2 * precision * recall / (precision + recall)


def _shared(a: list[str], b: list[str], n: int) -> int:
    grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (a, b)]
    return sum((grams[0] & grams[1]).values())


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    A row of the usual table is kept as one integer, a bit for each word of `a` where the length does not grow
    (Hyyrö 2004, "Bit-parallel LCS-length computation revisited").
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    flat = every
    for word in b:
        hits = flat & places.get(word, 0)
        flat = ((flat + hits) | (flat - hits)) & every
    return len(a) - bin(flat).count("1")

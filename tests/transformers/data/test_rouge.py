"""ROUGE against the rouge_score package."""

import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_adapters_transformers.data.rouge import rouge, rouge_of
from rouge_score.rouge_scorer import RougeScorer

SCORER = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def reference(prediction, target):
    return {name: score.fmeasure for name, score in SCORER.score(target, prediction).items()}


few_words = st.lists(st.sampled_from(["a", "b", "the", "cat", "sat", "A", "cat's", "3.5", "é", "\n"]), max_size=30).map(
    " ".join
)


@settings(max_examples=300, deadline=None)
@given(few_words, few_words)
def test_few_words(prediction, target):
    assert rouge_of(prediction, target) == pytest.approx(reference(prediction, target), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text(prediction, target):
    assert rouge_of(prediction, target) == pytest.approx(reference(prediction, target), abs=1e-12)


def test_real_texts():
    import argparse
    import optparse

    texts = [inspect.getdoc(member) or "" for module in (argparse, optparse) for member in vars(module).values()][:80]
    pairs = list(zip(texts, texts[1:] + texts[:1], strict=True))
    scores = [reference(*pair) for pair in pairs]
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    assert 0 < means["rouge2"] < means["rougeL"] < means["rouge1"] < 1
    assert rouge(*zip(*pairs, strict=True)) == pytest.approx(means, abs=1e-12)


def test_ends_of_the_scale():
    assert rouge(["Same text!"], ["same TEXT"]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert rouge([""], ["x"]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        rouge(["a"], ["a", "b"])

"""Metrics of a run, compared with the obvious way: one row at a time, without padding, in float64."""

import math

import datasets
import pytest
import sklearn.metrics
import torch
from bases import bert_base, llama_base, t5_base
from lora_adapters_transformers.training.measures import classification, language_model, preference
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

LABELS = ["rain", "sun", "snow", "fog"]
LENGTHS = [3, 17, 1, 8, 2, 5, 11]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: make(folder / name) for name, make in [("llama", llama_base), ("t5", t5_base), ("bert", bert_base)]}


def ids(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 500, (length,), generator=generator).tolist()


def pad(rows, value, side):
    longest = max(map(len, rows))
    return torch.tensor(
        [
            [value] * (longest - len(r)) + list(r) if side == "left" else [*r, *[value] * (longest - len(r))]
            for r in rows
        ]
    )


def spread(model):
    """Widen the weights: outputs of a fresh tiny model are nearly the same for all inputs."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


# ---- language models -------------------------------------------------------------------------------------------------


def decoder_rows():
    """Odd lengths; prompts without a label, one row of which nothing is learnt, one that is learnt from its start."""
    rows = []
    for seed, length in enumerate(LENGTHS):
        row = ids(length, seed)
        learnt = {0: length, 3: 0, 4: length}.get(seed, length // 2)
        rows.append({"input_ids": row, "labels": [-100] * (length - learnt) + row[length - learnt :]})
    return datasets.Dataset.from_list(rows)


def seq2seq_rows():
    made = [{"input_ids": ids(n, n), "labels": ids(1 + n % 4, 100 + n)} for n in LENGTHS]
    return datasets.Dataset.from_list(made)


def collate_decoder(side):
    def collate(rows):
        given, labels = [r["input_ids"] for r in rows], [r["labels"] for r in rows]
        mask = [[1] * len(r) for r in given]
        return {
            "input_ids": pad(given, 0, side), "attention_mask": pad(mask, 0, side), "labels": pad(labels, -100, side)
        }  # fmt: skip

    return collate


def by_hand(logits, labels):
    """Return each labelled token's loss and whether it is right; logits (tokens, words), labels (tokens,)."""
    found = []
    for row, label in zip(logits, labels, strict=True):
        if label != -100:
            found.append((float(row.exp().sum().log() - row[label]), int(row.argmax()) == label))
    return found


def expected(found):
    loss = math.fsum(loss for loss, _ in found) / len(found)
    right = sum(right for _, right in found) / len(found)
    return {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": right}


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder(bases, side, size):
    model = spread(AutoModelForCausalLM.from_pretrained(bases["llama"])).double()
    rows, found = decoder_rows(), []
    with torch.no_grad():
        rows = rows.map(lambda row: some_right(row, model))
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            found += by_hand(logits[:-1], row["labels"][1:])
    measured = language_model(model, rows, size, collate_decoder(side), None)
    assert 0.2 < measured.metrics["token_accuracy"] < 0.8
    assert measured.metrics == pytest.approx(expected(found), rel=1e-6)
    assert len(found) == sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)


def some_right(row, model):
    """Put what the model expects in every other place that is learnt."""
    answers = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
    labels = [-100 if old == -100 else old if i % 2 else answers[i - 1] for i, old in enumerate(row["labels"])]
    return {"labels": labels}


@pytest.mark.parametrize("size", [1, 3, 50])
def test_an_encoder_decoder(bases, size):
    model = spread(AutoModelForSeq2SeqLM.from_pretrained(bases["t5"])).double()
    rows, found = seq2seq_rows(), []
    with torch.no_grad():
        for row in rows:
            start = torch.tensor([[0, *row["labels"][:-1]]])
            logits = model(input_ids=torch.tensor([row["input_ids"]]), decoder_input_ids=start).logits[0]
            found += by_hand(logits, row["labels"])
    measured = language_model(model, rows, size, collate_decoder("right"), None)
    assert measured.metrics == pytest.approx(expected(found), rel=1e-5)


def test_rows_of_which_nothing_is_learnt(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100] * 3}])
    measured = language_model(model, rows, 4, collate_decoder("right"), None)
    assert measured.metrics == {"loss": 0.0, "perplexity": 1.0, "token_accuracy": 0.0}


def test_a_model_that_broke_down_measures_nan(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    measured = language_model(model, decoder_rows(), 4, collate_decoder("right"), None)
    assert math.isnan(measured.metrics["loss"])
    assert math.isnan(measured.metrics["perplexity"])


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_measured_without_dropout_and_left_as_it_was(bases, training):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"], attention_dropout=0.5)
    model.train(training)
    collate = collate_decoder("right")
    one = language_model(model, decoder_rows(), 2, collate, None)
    two = language_model(model, decoder_rows(), 2, collate, None)
    assert one.metrics == two.metrics
    assert {module.training for module in model.modules()} == {training}
    assert torch.is_grad_enabled()

    def broken(rows):
        assert not model.training
        raise RuntimeError("a collator that fails")

    with pytest.raises(RuntimeError, match="a collator that fails"):
        language_model(model, decoder_rows(), 2, broken, None)
    assert model.training is training


# ---- classifiers -----------------------------------------------------------------------------------------------------


def collate_texts(side):
    def collate(rows):
        given = [r["input_ids"] for r in rows]
        mask = pad([[1] * len(r) for r in given], 0, side)
        batch = {"input_ids": pad(given, 0, side), "attention_mask": mask}
        return batch | ({"labels": torch.tensor([r["labels"] for r in rows])} if "labels" in rows[0] else {})

    return collate


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [0, 2], [1]], ids=["all", "two of four", "one of four"])
def test_a_classifier_against_scikit_learn(bases, classes, size):
    """Classes of which there is no row count in no mean, as with sklearn's `labels` of the true ones."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bases["bert"], num_labels=len(LABELS))
    model = spread(model).double().train()
    texts = [ids(1 + n % 13, n) for n in range(37)]
    rows = datasets.Dataset.from_list(
        [{"input_ids": text, "labels": classes[n % len(classes)]} for n, text in enumerate(texts)]
    )
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([text])).logits for text in texts])
    model.train()
    truth, chosen = list(rows["labels"]), logits.argmax(-1).tolist()
    assert len(set(chosen)) > 1  # or the test compares nothing
    measured = classification(model, rows, LABELS, size, collate_texts("right"), None)
    with torch.no_grad():
        loss = sum(float(-row.log_softmax(-1)[label]) for row, label in zip(logits, truth, strict=True)) / len(truth)
    f1 = sklearn.metrics.f1_score(truth, chosen, labels=sorted(set(truth)), average="macro", zero_division=0)
    accuracy = sklearn.metrics.accuracy_score(truth, chosen)
    assert measured.metrics == pytest.approx({"loss": loss, "accuracy": accuracy, "macro_f1": f1}, rel=1e-5)
    assert measured.outputs == [LABELS[answer] for answer in chosen]
    per_class, confusion = measured.tables
    matrix = sklearn.metrics.confusion_matrix(truth, chosen, labels=range(len(LABELS)))
    assert [row[1:] for row in confusion.rows] == matrix.tolist()
    scores = sklearn.metrics.precision_recall_fscore_support(truth, chosen, labels=range(len(LABELS)), zero_division=0)
    assert [row[0] for row in per_class.rows] == LABELS
    assert torch.tensor([row[1:] for row in per_class.rows]).T.tolist() == [pytest.approx(list(s)) for s in scores]
    assert model.training


def test_a_matrix_that_nobody_could_read_is_left_out(bases):
    names = [f"class {n}" for n in range(31)]
    model = AutoModelForSequenceClassification.from_pretrained(bases["bert"], num_labels=31)
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6], "labels": 30}])
    measured = classification(model, rows, names, 4, collate_texts("right"), None)
    assert [table.title for table in measured.tables] == ["Per class", "Most confused"]


# ---- reward models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 50])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_model(bases, side, size):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1)
    model = spread(model).double().train()
    rows = datasets.Dataset.from_list(
        [{"chosen_ids": ids(n, n), "rejected_ids": ids(1 + (5 * n) % 12, 50 + n)} for n in LENGTHS]
    )
    model.eval()
    with torch.no_grad():
        rewards = [
            [float(model(input_ids=torch.tensor([row[f"{name}_ids"]])).logits) for name in ("chosen", "rejected")]
            for row in rows
        ]
    model.train()
    margins = [a - b for a, b in rewards]
    assert len({margin > 0 for margin in margins}) == 2  # or the accuracy compares nothing
    plain = collate_texts(side)

    def collate(batch):
        made = plain([{"input_ids": r[name]} for name in ("chosen_ids", "rejected_ids") for r in batch])
        return made

    measured = preference(model, rows, size, collate, None)
    expected = {
        "loss": sum(math.log1p(math.exp(-m)) for m in margins) / len(margins),
        "accuracy": sum(m > 0 for m in margins) / len(margins),
        "margin": sum(margins) / len(margins),
    }
    # Left padding moves a row's positions, and rotations see differences of positions only.
    assert measured.metrics == pytest.approx(expected, rel=1e-5)
    assert measured.outputs == [f"{a:.3f} against {b:.3f}" for a, b in rewards]
    assert model.training

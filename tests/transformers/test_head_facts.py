"""What a run knows of its head (names of labels, problem type, padding token) reaches the merged checkpoint's config."""

import json

import pytest
import torch
import transformers as tf
from helpers import llama, perturb
from lora_adapters_transformers import LoraCallback
from lora_adapters_transformers.head_facts import ENTRY
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_adapters as la
from lora_adapters.errors import CheckpointError

NAMES = {0: "sad", 1: "glad", 2: "ein „Zitat“\n漢"}
CLASSIFIER = tf.AutoModelForSequenceClassification
IDS = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(9))


def bert(cls=tf.BertModel, **options):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=32)
    return cls(tf.BertConfig(**sizes, initializer_range=0.3, **options))


def outputs(model, **inputs):
    with torch.no_grad():
        return model.eval()(**({"input_ids": IDS} | inputs)).logits


def trained(folder, *, base=None, auto=CLASSIFIER, attach=None, **head):
    """Write folder/base and folder/adapter; return the adapted model."""
    (base or bert()).save_pretrained(folder / "base")
    model = auto.from_pretrained(folder / "base", **head)
    adapter = la.attach(model, **({"rank": 2} | (attach or {})))
    perturb(model)
    adapter.save(folder / "adapter")
    return model


def entry(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata().get(ENTRY)


def set_entry(folder, text):
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata | {ENTRY: text})


def merge(folder, name="out", **options):
    la.merge_checkpoint(folder / "base", folder / "adapter", folder / name, progress=False, **options)
    return CLASSIFIER.from_pretrained(folder / name)


def test_names_and_problem_type_reach_the_merged_config(tmp_path):
    model = trained(tmp_path, id2label=NAMES, problem_type="multi_label_classification")
    merged = merge(tmp_path)
    assert merged.config.id2label == NAMES
    assert merged.config.label2id == {name: number for number, name in NAMES.items()}
    assert merged.config.problem_type == "multi_label_classification"
    torch.testing.assert_close(outputs(merged), outputs(model), rtol=1e-4, atol=1e-5)
    raw = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert raw["id2label"] == {str(number): name for number, name in NAMES.items()}
    theirs = PeftModel.from_pretrained(
        CLASSIFIER.from_pretrained(tmp_path / "base", num_labels=3), tmp_path / "adapter"
    )
    torch.testing.assert_close(outputs(theirs), outputs(model))


@pytest.mark.parametrize("old", [3, 5])
def test_the_names_of_the_bases_own_head_are_not_kept(tmp_path, old):
    base = bert(tf.BertForSequenceClassification, id2label={n: f"old {n}" for n in range(old)})
    model = trained(tmp_path, base=base, id2label=NAMES, ignore_mismatched_sizes=True)
    merged = merge(tmp_path)
    assert merged.config.id2label == NAMES
    assert set(merged.config.label2id) == set(NAMES.values())
    torch.testing.assert_close(outputs(merged), outputs(model), rtol=1e-4, atol=1e-5)


def test_a_padding_token_that_only_the_run_knew(tmp_path):
    """Without it the merged model refuses a batch, or reads the class off a padding token."""
    model = trained(tmp_path, base=llama(pad_token_id=None), num_labels=3, pad_token_id=31)
    assert CLASSIFIER.from_pretrained(tmp_path / "base").config.pad_token_id is None
    merged = merge(tmp_path)
    assert merged.config.pad_token_id == 31
    ids = torch.cat([IDS, torch.full((2, 2), 31)], 1)
    ids[1, 4:] = 31
    inputs = {"input_ids": ids, "attention_mask": (ids != 31).long()}
    torch.testing.assert_close(outputs(merged, **inputs), outputs(model, **inputs), rtol=1e-4, atol=1e-5)


def test_what_trainer_finds_out_is_saved(tmp_path):
    """transformers sets the problem type when it first computes a loss."""
    bert().save_pretrained(tmp_path / "base")
    lora = LoraCallback(CLASSIFIER.from_pretrained(tmp_path / "base", id2label=NAMES), rank=2)
    rows = [{"input_ids": row, "labels": torch.tensor(n)} for n, row in enumerate(IDS)]
    args = tf.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    tf.Trainer(model=lora.model, args=args, train_dataset=rows, callbacks=[lora]).train()
    (tmp_path / "run/checkpoint-1").rename(tmp_path / "adapter")
    config = merge(tmp_path).config
    assert (config.id2label, config.problem_type) == (NAMES, "single_label_classification")


def test_token_classifiers_too(tmp_path):
    trained(tmp_path, auto=tf.AutoModelForTokenClassification, id2label=NAMES)
    la.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert tf.AutoModelForTokenClassification.from_pretrained(tmp_path / "out").config.id2label == NAMES


def test_what_is_asked_for_wins(tmp_path):
    trained(tmp_path, id2label=NAMES, problem_type="regression")
    mine = {0: "a", 1: "b", 2: "c"}
    config = merge(tmp_path, id2label=mine, problem_type="multi_label_classification").config
    assert (config.id2label, config.problem_type) == (mine, "multi_label_classification")
    assert merge(tmp_path, "other", num_labels=3, pad_token_id=7).config.pad_token_id == 7


def test_restore_leaves_the_models_config_alone(tmp_path):
    trained(tmp_path, id2label=NAMES, problem_type="regression")
    model = CLASSIFIER.from_pretrained(tmp_path / "base", num_labels=3)
    before = model.config.to_dict()
    la.restore(model, tmp_path / "adapter")
    assert model.config.to_dict() == before


def test_a_restored_head_is_saved_with_the_names_of_its_model(tmp_path):
    trained(tmp_path, id2label=NAMES)
    model = CLASSIFIER.from_pretrained(tmp_path / "base", id2label=NAMES)
    la.restore(model, tmp_path / "adapter").save(tmp_path / "again")
    assert entry(tmp_path / "again") == entry(tmp_path / "adapter")


def test_there_is_nothing_to_say_without_a_trained_head(tmp_path):
    trained(tmp_path / "a", id2label=NAMES, attach={"modules_to_save": []})
    assert entry(tmp_path / "a/adapter") is None
    trained(tmp_path / "b", base=llama(), auto=tf.AutoModelForCausalLM, attach={"modules_to_save": ["lm_head"]})
    assert entry(tmp_path / "b/adapter") is None


def test_names_that_would_take_too_much_are_left_out(tmp_path):
    trained(tmp_path, id2label={n: f"{n}" + "x" * 900 for n in range(400)}, problem_type="regression")
    assert json.loads(entry(tmp_path / "adapter")) == {"problem_type": "regression", "pad_token_id": 0}
    merged = merge(tmp_path)
    assert (merged.config.num_labels, merged.config.id2label[399]) == (400, "LABEL_399")


def test_names_of_another_number_of_classes_are_not_used(tmp_path):
    trained(tmp_path, id2label=NAMES)
    set_entry(tmp_path / "adapter", json.dumps({"labels": ["a", "b"], "of a later version": {"x": 1}}))
    assert merge(tmp_path).config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("[1]", "must hold a JSON object"),
        ("[" * 100_000, "is damaged"),
        ('{"labels": ["a"], "labels": ["b"]}', "occurs twice"),
        ('{"labels": {"0": "a"}}', "labels has no such values"),
        ('{"labels": []}', "labels has no such values"),
        ('{"labels": ["a", "b", 3]}', "labels has no such values"),
        ('{"labels": ["a", "b", "\\ud800"]}', "labels has no such values"),
        (json.dumps({"labels": ["a", "b", "x" * 1001]}), "labels has no such values"),
        (json.dumps({"labels": ["x" * 900] * 400}), "too long"),
        ('{"problem_type": "anything"}', "problem_type has no such values"),
        ('{"problem_type": ["regression"]}', "problem_type has no such values"),
        ('{"pad_token_id": -1}', "pad_token_id has no such values"),
        ('{"pad_token_id": true}', "pad_token_id has no such values"),
        ('{"pad_token_id": 1.0}', "pad_token_id has no such values"),
        ('{"pad_token_id": 32}', "padding token 32, and this base knows 32 tokens"),
    ],
    ids=lambda value: value[:40],
)
def test_a_damaged_or_forged_entry_is_refused_before_a_weight_is_read(tmp_path, monkeypatch, text, message):
    trained(tmp_path, id2label=NAMES)
    set_entry(tmp_path / "adapter", text)

    def read(*_, **__):
        raise AssertionError("the base's weights were read")

    monkeypatch.setattr(tf.PreTrainedModel, "from_pretrained", read)
    with pytest.raises(CheckpointError, match=message):
        la.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()

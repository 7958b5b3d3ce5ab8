"""The model card: a header the Hub takes, code that runs, no path and no sample, whatever texts it is made from."""

import re

import pytest
import torch
import yaml
from helpers import llama, perturb
from huggingface_hub import ModelCard

import lora_adapters as la
from lora_adapters.report.card import PIPELINES, model_card
from lora_adapters.report.facts import AdaptedGroup, DataFacts, RunFacts

EVIL = "\ud83d a|b`c\n---\n# head\n```\n<script>alert(1)</script>: [x](http://y) *z* \u2028{{q}}"


def code_of(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


def test_header_is_as_the_hub_wants_it(make_facts, tmp_path):
    card = ModelCard(model_card(make_facts(), tmp_path))
    assert card.data.base_model == "org/model-1b"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["lora", "lora_adapters", "causal-lm"]
    assert card.data.datasets is None
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"loss": 1.1021, "rougeL": 0.1471, "accuracy": 0.75}
    assert {result.dataset_name for result in card.data.eval_results} == {"tickets.jsonl"}
    assert {result.task_type for result in card.data.eval_results} == {"text-generation"}


def test_body_says_what_was_trained(make_facts, tmp_path):
    text = model_card(make_facts(), tmp_path)
    for expected in (
        "[org/model-1b](https://huggingface.co/org/model-1b) (revision main), trained for causal-lm",
        "9,437,184 trained values, 0.76 % of the model's",
        "stored quantized (nf4)",
        "| loss | 2.414 | 1.102 | -1.312 (-54.3 %) | better |",
        "| rougeL | 0.2134 | 0.1471 | -0.0663 (-31.1 %) | worse |",
        "| train | tickets.jsonl | 10,666 |",
        "| targets | attention: 16, mlp: 8 |",
        "| learning rate | 0.0002 |",
        "| steps done | 2,000 |",
        r"| q | model.layers.\*.self\_attn.q\_proj | 24 | 16 | 1 | nf4 |",
        "Trained and saved whole: model.norm.",
        "| torch | 2.15.0 |",
    ):
        assert expected in text
    for private in ("Ticket 4711", "print(i)", "{question}", "data/", "runs/", "log every", "report to"):
        assert private not in text


@pytest.mark.parametrize(
    ("status", "said"),
    [("interrupted", "interrupted"), ("diverged", "diverged"), ("failed", "failed"), ("running", "had not finished")],
)
def test_an_unfinished_run_is_called_so(make_facts, status, said):
    text = model_card(make_facts(status=status, steps=10, reason="/private/reason"))
    assert re.search(rf"^> \*\*Training .*{said}.*\*\* 10 of 2,000 steps were done\.$", text, flags=re.MULTILINE)
    assert "reason" not in text
    assert "> **" not in model_card(make_facts())


@pytest.mark.parametrize(
    "base", ["/home/me/models/my-model", "models/a/my-model", "C:\\me\\my-model", "~/my-model", "./my-model"]
)
def test_a_local_base_is_named_without_its_path(make_facts, base):
    facts = make_facts(base=base, recipe={"model": {"name": base}, "training": {"teacher": "/home/me/models/teacher"}})
    text = model_card(facts)
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "a local folder named my-model" in text
    assert 'base = "path/to/my-model"' in text
    assert "| teacher | teacher |" in text
    for part in ("/home", "models/", "me\\", "~", "./"):
        assert part not in text


def test_a_folder_that_looks_like_a_hub_name_is_local(make_facts, tmp_path):
    assert ModelCard(model_card(make_facts(), tmp_path)).data.base_model == "org/model-1b"
    (tmp_path / "org" / "model-1b").mkdir(parents=True)
    assert ModelCard(model_card(make_facts(), tmp_path)).data.base_model is None


def test_data_from_the_hub_is_linked_in_the_header(make_facts, tmp_path):
    facts = make_facts(data=[DataFacts("train", "someone/imdb", 10), DataFacts("eval", "someone/imdb", 3)])
    card = ModelCard(model_card(facts, tmp_path))
    assert card.data.datasets == ["someone/imdb"]
    assert {result.dataset_type for result in card.data.eval_results} == {"someone/imdb"}


@pytest.mark.parametrize("source", ["/a/b/c.jsonl", "b/c.jsonl", "C:\\a\\c.jsonl", "c.jsonl", "~/a/c.jsonl"])
def test_a_file_is_named_without_its_path(make_facts, source):
    text = model_card(make_facts(data=[DataFacts("train", source, 10)]))
    assert "| train | c.jsonl | 10 |" in text
    assert "datasets" not in ModelCard(text).data.to_dict()
    assert source == "c.jsonl" or source not in text


def test_no_text_breaks_the_card(make_facts):
    facts = RunFacts(
        task=EVIL,
        base=EVIL,
        revision=EVIL,
        status="failed",
        reason=EVIL,
        recipe={
            "model": {"quantization": {EVIL: EVIL}, "trust_remote_code": True},
            "adapter": {EVIL: EVIL, "targets": [EVIL]},
        },
        environment={EVIL: EVIL},
        data=[DataFacts(EVIL, EVIL, 1)],
        adapted=[AdaptedGroup(EVIL, EVIL, 1, [1], 1, 1.0, EVIL, 1, EVIL)],
        trained=[EVIL],
        labels=[EVIL],
        before={EVIL: 1.0},
        after={EVIL: 2.0, "broken": "nan"},
    )
    for task in (EVIL, *PIPELINES):
        facts.task = task
        text = model_card(facts)
        text.encode("utf-8")
        header, body = re.fullmatch(r"---\n(.*?)\n---\n\n(.*)", text, flags=re.DOTALL).groups()
        assert yaml.safe_load(header)["tags"][:2] == ["lora", "lora_adapters"]
        assert [result.metric_value for result in ModelCard(text).data.eval_results] == [2.0]
        outside = re.sub(r"^```python\n.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
        # A headline, a rule, a fence or a tag only where the card put it.
        assert not re.search(r"(?<!\\)[`<>]", re.sub(r"^> ", "", outside, flags=re.MULTILINE))
        assert not re.search(r"^(---|# head)", outside, flags=re.MULTILINE)
        for line in outside.splitlines():
            if line.startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 6, 7)
        assert code_of(text) or task == EVIL
        for code in code_of(text):
            compile(code, "card", "exec")


@pytest.mark.parametrize("task", PIPELINES)
def test_code_of_each_task_names_its_classes(make_facts, task):
    labels = ["good", "bad"] if task.endswith("classification") else []
    text = model_card(make_facts(task=task, labels=labels))
    for code in code_of(text):
        compile(code, "card", "exec")
    auto = {
        "causal-lm": "AutoModelForCausalLM",
        "seq2seq": "AutoModelForSeq2SeqLM",
        "text-classification": "AutoModelForSequenceClassification",
        "reward": "AutoModelForSequenceClassification",
        "dreambooth": "DiffusionPipeline",
    }
    made = "timm.create_model(base" if task == "image-classification" else f"{auto[task]}.from_pretrained(base"
    assert made in code_of(text)[0]
    assert ModelCard(text).data.pipeline_tag == PIPELINES[task]


def test_a_task_of_a_plugin_gets_a_card_too(make_facts):
    text = model_card(make_facts(task="speech"))
    assert "pipeline_tag" not in ModelCard(text).data.to_dict()
    assert len(code_of(text)) == 1


@pytest.mark.parametrize("task", ["causal-lm", "text-classification", "reward"])
def test_the_code_in_the_card_loads_the_adapter(make_facts, task, tmp_path):
    """Both ways of loading, run as they stand, give the outputs of the model that was saved."""
    base, saved = tmp_path / "my-base", tmp_path / "saved"
    labels = ["good", "bad", "ugly"] if task == "text-classification" else []
    llama().save_pretrained(base)
    _tokenizer().save_pretrained(base)
    options = {"num_labels": len(labels) or 1} if task != "causal-lm" else {}
    model = la.load(str(base), task=task, **options)
    adapter = la.attach(model, rank=2)
    perturb(adapter.model)
    adapter.save(saved)
    rows = torch.randint(3, 32, (2, 5))
    with torch.no_grad():
        expected = adapter.model.eval()(rows.to(model.device)).logits.cpu()
    text = model_card(make_facts(task=task, base=str(base), revision=None, recipe={}, labels=labels))
    blocks = code_of(text)
    assert len(blocks) == 2
    for code in blocks:
        code = code.replace("path/to/my-base", str(base)).replace("path/or/name/of/this/adapter", str(saved))
        names: dict = {}
        exec(compile(code, "card", "exec"), names)
        with torch.no_grad():
            loaded = names["model"].eval()
            logits = loaded(rows.to(loaded.device)).logits.cpu()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        if "tokenizer" in names:
            assert names["tokenizer"]("a b")["input_ids"] == [3, 4]
            if labels:
                assert names["model"].config.id2label == dict(enumerate(labels))
                assert names["model"].config.label2id == {label: i for i, label in enumerate(labels)}


@pytest.mark.parametrize("start", ["checkpoint", "folder"])
def test_the_code_in_the_card_of_an_image_model_loads_the_adapter(make_facts, start, tmp_path):
    """Also where the base's weights are a file, and where base and data are of another size than timm's."""
    timm = pytest.importorskip("timm")
    options = {"img_size": 16, "depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
    base = timm.create_model("vit_tiny_patch16_224", num_classes=2, **options)
    if start == "folder":
        timm.models.save_for_hf(base, tmp_path / "my-base", model_args=options)
        name, model = str(tmp_path / "my-base"), {}
    else:
        torch.save(base.state_dict(), tmp_path / "my.pth")
        name, model = "vit_tiny_patch16_224", {"checkpoint": str(tmp_path / "my.pth"), "timm_kwargs": options}
    base.reset_classifier(3)
    adapter = la.attach(base, rank=2, targets="re:fc1", modules_to_save=["head"])
    perturb(adapter.model)
    adapter.save(tmp_path / "saved")
    images = torch.randn(2, 3, 16, 16)
    expected = adapter.model.eval()(images)
    labels = ["good", "bad", "ugly"]
    facts = make_facts(task="image-classification", base=name, revision=None, labels=labels, recipe={"model": model})
    blocks = code_of(model_card(facts))
    assert len(blocks) == 2
    for code in blocks:
        code = code.replace("path/to", str(tmp_path)).replace("path/or/name/of/this/adapter", str(tmp_path / "saved"))
        names: dict = {}
        exec(compile(code, "card", "exec"), names)
        torch.testing.assert_close(names["model"].eval()(images), expected, rtol=1e-4, atol=1e-4)
        assert names["labels"] == labels


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("vit_base_patch16_224.augreg_in21k", "timm/vit_base_patch16_224.augreg_in21k"),
        ("hf-hub:org/mine", "org/mine"),
        ("resnet50", None),
        ("/somewhere/mine", None),
    ],
)
def test_image_models_are_linked_where_they_are_on_the_hub(make_facts, name, hub):
    text = model_card(make_facts(task="image-classification", base=name, revision=None))
    assert ModelCard(text).data.to_dict().get("base_model") == hub
    assert ("huggingface.co" in text) == (hub is not None)
    assert "/somewhere" not in text


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "a", "b"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")

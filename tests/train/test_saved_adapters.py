"""`eval` and `generate` on saved adapters: of runs, of PEFT alone, side by side, and what can't be compared."""

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from bases import bert_base, llama_base, seasons, sums, write_recipe, write_rows
from click.testing import CliRunner
from helpers import perturb, run_cli
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lora_adapters as la
from lora_adapters import cli
from lora_adapters.errors import CheckpointError, LoraAdaptersError, RequestError
from lora_adapters.runs.saved import named, recipe_for


def here(*arguments):
    """Run a command in this process, which needs no second import of torch."""
    return CliRunner().invoke(cli.cli, [str(argument) for argument in arguments])


def facts(*arguments):
    done = here(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def by_peft(model, folder, seed=3, **config):
    """Adapt a model by PEFT alone, and save it by PEFT alone."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **config))
    perturb(adapted, seed)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base for each kind, data, and adapters that PEFT alone made."""
    folder = tmp_path_factory.mktemp("saved")
    llama, bert = llama_base(folder / "llama", chat_template=None), bert_base(folder / "bert")
    write_rows(folder / "qa.jsonl", sums(12))
    write_rows(folder / "seasons.jsonl", seasons(12))
    causal = dict(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    by_peft(AutoModelForCausalLM.from_pretrained(llama), folder / "one", **causal)
    by_peft(AutoModelForCausalLM.from_pretrained(llama), folder / "two", seed=4, **causal)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    by_peft(classifier, folder / "sorter", task_type="SEQ_CLS", target_modules=["query", "value"])
    return folder


PAIRS = ("data.prompt=question", "data.completion=answer")


def obvious(model, tokenizer, rows):
    """The loss over the answers' tokens, row by row."""
    total, count = 0.0, 0
    for row in rows:
        before, answer = tokenizer(row["question"])["input_ids"], tokenizer(row["answer"])["input_ids"]
        ids = torch.tensor([[*before, *answer, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        for at in range(len(before), ids.shape[1]):
            total -= float(logits[at - 1].log_softmax(-1)[ids[0, at]])
            count += 1
    return total / count


def test_adapters_that_peft_alone_made_side_by_side(place):
    """No recipe lies beside them: the command says what the data holds, their configs say the rest."""
    data = place / "qa.jsonl"
    done = run_cli("eval", str(place / "one"), str(place / "two"), *PAIRS, "--data", str(data), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    measured = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    assert list(measured) == ["base", "one", "two"]
    for name in ("one", "two"):
        base = AutoModelForCausalLM.from_pretrained(place / "llama")
        model = peft.PeftModel.from_pretrained(base, place / name).eval()
        assert measured[name]["loss"] == pytest.approx(obvious(model, tokenizer, sums(12)), rel=1e-5)
        with model.disable_adapter():
            assert measured["base"]["loss"] == pytest.approx(obvious(model, tokenizer, sums(12)), rel=1e-5)
    assert len({values["loss"] for values in measured.values()}) == 3


def test_generate_with_adapters_that_peft_alone_made(place):
    prompt = "What is 1 plus 1?"
    options = ("--max-new-tokens", 6, "--prompt", prompt)
    (sample,) = facts("generate", place / "one", place / "two", *options)
    base = AutoModelForCausalLM.from_pretrained(place / "llama")
    model = peft.PeftModel.from_pretrained(base, place / "two").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    answered = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert [label for label, _ in sample["parts"]] == ["base", "one", "two"]
    assert sample["parts"][2][1] == tokenizer.decode(answered, skip_special_tokens=True).strip()


def test_a_classifiers_labels_come_from_the_command(place):
    data = ("--data", place / "seasons.jsonl")
    done = here("eval", place / "sorter", *data)
    assert isinstance(done.exception, RequestError)
    assert "data.labels: the adapter does not say its labels" in str(done.exception)
    measured = facts("eval", place / "sorter", "data.labels=[winter, summer]", *data)
    turned = facts("eval", place / "sorter", "data.labels=[summer, winter]", *data)
    assert measured["sorter"]["accuracy"] == pytest.approx(1 - turned["sorter"]["accuracy"])
    (sample,) = facts("generate", place / "sorter", "data.labels=[winter, summer]", "--prompt", "snow")
    assert {part.split()[0] for part in sample["parts"][1][1].split(", ")} == {"winter", "summer"}


@pytest.fixture(scope="module")
def labelled(place):
    """A classifier's adapter that this package saved outside of a run: its file names the labels."""
    names = {0: "winter", 1: "summer"}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(place / "bert", id2label=names)
    adapter = la.attach(model, rank=2)
    perturb(model)
    adapter.save(place / "labelled")
    return place / "labelled"


def test_a_classifiers_labels_come_from_its_file(place, labelled):
    data = ("--data", place / "seasons.jsonl")
    told = facts("eval", labelled, "data.labels=[winter, summer]", *data)
    assert facts("eval", labelled, *data) == told
    done = here("eval", labelled, "data.labels=[summer, winter]", *data)
    assert isinstance(done.exception, RequestError)
    assert "labelled was trained for winter, summer" in str(done.exception)


def test_adapters_on_different_bases_are_refused(place, labelled):
    done = run_cli("eval", str(place / "one"), str(labelled), *PAIRS, "--data", str(place / "qa.jsonl"))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: labelled was trained on {place / 'bert'}, and one on {place / 'llama'}: ")
    done = here("generate", place / "one", labelled, "--prompt", "a")
    assert "adapters on different bases can't be compared" in str(done.exception)


def test_who_names_the_base_knows_better(place, tmp_path, monkeypatch):
    """The same base under another path, as on another machine."""
    (tmp_path / "models").symlink_to(place)
    moved = tmp_path / "models" / "llama"
    recipe = recipe_for(named([str(place / "one")]), {}, [f"model.name={moved}"])
    assert recipe.model.name == str(moved)
    copied = tmp_path / "two"
    copied.mkdir()
    for file in (place / "two").iterdir():
        text = file.read_bytes()
        (copied / file.name).write_bytes(text.replace(str(place / "llama").encode(), b"/somewhere/llama"))
    adapters = named([str(place / "one"), str(copied)])
    with pytest.raises(RequestError, match="trained on /somewhere/llama"):
        recipe_for(adapters, {}, [])
    assert recipe_for(adapters, {}, [f"model.name={place / 'llama'}"]).task == "causal-lm"


# ---- named, recipe_for -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(place):
    """A run of two steps without eval data."""
    path = write_recipe(
        place / "recipe.yaml",
        task="causal-lm",
        model={"name": str(place / "llama")},
        adapter={"rank": 2},
        data={"train": str(place / "qa.jsonl"), "prompt": "question", "completion": "answer", "eval_limit": 3},
        training={"max_steps": 2, "save_every": 1, "keep_checkpoints": 2, "max_length": 64},
        output=str(place / "first"),
    )
    done = here("train", path, "--quiet")
    assert done.exit_code == 0, (done.output, done.exception)
    return place / "first"


def test_names(place, run, monkeypatch):
    assert named([str(run)]) == named([f"{run}/"]) == {"first": run / "adapter"}
    assert named([str(run / "adapter")]) == {"first": run / "adapter"}
    assert list(named([str(run), str(run / "adapter"), str(run / "adapter")])) == [
        "first", f"{run}/adapter", f"{run}/adapter'"
    ]  # fmt: skip
    assert list(named([str(run / "checkpoints" / "checkpoint-1"), str(place / "one")])) == ["checkpoint-1", "one"]
    monkeypatch.chdir(run)
    assert list(named(["."])) == list(named(["adapter"])) == ["first"]
    (place / "base").symlink_to(place / "one")
    monkeypatch.chdir(place)
    assert "base" not in named([str(place / "base"), str(place / "two")])  # that is what the base is called


def test_what_is_no_adapter_is_told_before_anything_is_loaded(place, run, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        named([str(place / "nothing" / "there" / "at all")])
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        named([str(place / "llama")])
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(RequestError, match="ended before it saved one"):
        named([str(tmp_path / "failed")])
    with pytest.raises(CheckpointError, match="the Hub gave no such adapter"):
        named(["nobody/nothing"])


def test_the_recipe_is_that_of_the_first_ones_run(place, run):
    recipe = recipe_for(named([str(run), str(place / "one")]), {}, ["training.batch_size=3"])
    assert (recipe.task, recipe.adapter.rank, recipe.training.batch_size) == ("causal-lm", 2, 3)
    assert (recipe.resume, recipe.overwrite) == (False, False)
    of_a_checkpoint = recipe_for(named([str(run / "checkpoints" / "checkpoint-1")]), {}, [])
    assert of_a_checkpoint.adapter.rank == 2
    alone = recipe_for(named([str(place / "one"), str(run)]), {"data": {"eval": "x.jsonl"}}, list(PAIRS))
    assert (alone.task, alone.model.name, alone.data.eval) == ("causal-lm", str(place / "llama"), "x.jsonl")


def test_an_adapter_that_does_not_say_enough(place, tmp_path):
    folder = tmp_path / "mute"
    folder.mkdir()
    for file in (place / "one").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"task_type": None, "base_model_name_or_path": None})
    )
    adapters = named([str(folder)])
    with pytest.raises(RequestError, match="task: missing"):
        recipe_for(adapters, {}, [])
    with pytest.raises(RequestError, match=r"model\.name: missing"):
        recipe_for(adapters, {}, ["task=causal-lm"])
    assert recipe_for(adapters, {}, ["task=causal-lm", "model.name=a/b"]).model.name == "a/b"


def test_the_data_of_the_command_takes_the_place_of_the_runs(place, run):
    """All of it: the run's own limits are not for it."""
    done = here("eval", run)
    assert isinstance(done.exception, RequestError)
    assert "There is no eval data: give --data FILE" in str(done.exception)
    done = here("eval", run, "--data", place / "qa.jsonl")
    assert "measuring base on 12 rows" in done.stderr
    done = here("eval", run, "--data", place / "qa.jsonl", "data.eval_limit=5")
    assert "measuring base on 5 rows" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{run}", "--data", "{place}/qa.json"], "qa.jsonl"),
        (["eval", "{run}", "--data", "{place}/seasons.jsonl"], "question"),
        (["eval", "task=causal-lm"], "Name an adapter"),
        (["eval", "{place}/nothing/at/all"], "is not a folder"),
        (["generate", "{run}"], "Give a prompt"),
        (["generate", "{run}", "--prompt", "  "], "Give a prompt"),
        (["generate", "{run}", "--prompt", "a", "model.name={place}/lama"], "did you mean"),
    ],
)
def test_bad_input_says_what_to_do(place, run, arguments, message):
    done = here(*[argument.format(run=run, place=place) for argument in arguments])
    assert isinstance(done.exception, LoraAdaptersError)
    assert message in str(done.exception)
    assert done.stdout == ""


def test_metrics_that_are_not_finite_are_still_json(place, tmp_path):
    """An adapter can't hold such values, a base can."""
    base = tmp_path / "broken"
    llama_base(base, chat_template=None)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(base)
    done = here("eval", place / "one", f"model.name={base}", *PAIRS, "--data", place / "qa.jsonl", "--json")
    assert done.exit_code == 0, done.exception
    measured = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert measured["base"]["loss"] == "nan"
    assert Path(base).is_dir()

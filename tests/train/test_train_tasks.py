"""`lora-adapters train` as a person runs it: a process of its own for each task, then the run's folder."""

import json
from pathlib import Path

import pytest
import torch
from bases import bert_base, llama_base, preferences, seasons, sums, t5_base, write_recipe, write_rows
from helpers import run_cli
from safetensors.torch import load_file

from lora_adapters.recipes.reading import read_recipe
from lora_adapters.report.facts import RunFacts

TRAINING = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "max_length": 64, "log_every": 2}


def recipes(folder: Path) -> dict[str, str]:
    """A recipe for each task, with its base and data."""
    common = {"training": TRAINING, "adapter": {"rank": 4}}
    qa = write_rows(folder / "qa.jsonl", sums())
    return {
        "causal-lm": write_recipe(
            folder / "causal-lm.yaml",
            task="causal-lm",
            model={"name": llama_base(folder / "llama"), "device": "cpu"},
            data={"train": qa, "prompt": "question", "completion": "answer", "eval_fraction": 0.125},
            output=str(folder / "causal-lm"),
            **common,
        ),
        "seq2seq": write_recipe(
            folder / "seq2seq.yaml",
            task="seq2seq",
            model={"name": t5_base(folder / "t5"), "device": "cpu"},
            data={"train": qa, "source": "question", "target": "{answer}", "eval_fraction": 0.125},
            output=str(folder / "seq2seq"),
            **common | {"training": TRAINING | {"max_target_length": 6}},
        ),
        "text-classification": write_recipe(
            folder / "text-classification.yaml",
            task="text-classification",
            model={"name": bert_base(folder / "bert"), "device": "cpu"},
            data={"train": write_rows(folder / "seasons.jsonl", seasons()), "eval_fraction": 0.125},
            output=str(folder / "text-classification"),
            **common | {"training": TRAINING | {"epochs": 8}},
        ),
        "reward": write_recipe(
            folder / "reward.yaml",
            task="reward",
            model={"name": str(folder / "llama"), "device": "cpu"},
            data={
                "train": write_rows(folder / "pairs.jsonl", preferences()),
                "prompt": "prompt",
                "eval_fraction": 0.125,
            },
            output=str(folder / "reward"),
            **common,
        ),
    }


#: Task -> metrics that are measured, the one that must have become better, and the parts of a sample.
EXPECTED = {
    "causal-lm": (
        ["loss", "perplexity", "token_accuracy"],
        "loss",
        ["prompt", "expected", "answer, base", "answer, adapter"],
    ),
    "seq2seq": (
        ["loss", "perplexity", "token_accuracy", "rouge1", "rouge2", "rougeL"],
        "loss",
        ["source", "expected", "answer, base", "answer, adapter"],
    ),
    "text-classification": (
        ["loss", "accuracy", "macro_f1"],
        "loss",
        ["text", "label", "predicted, base", "predicted, adapter"],
    ),
    "reward": (["loss", "accuracy", "margin"], "loss", ["chosen", "rejected", "rewards, base", "rewards, adapter"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Each task's run: (recipe, folder, what the command printed)."""
    folder = tmp_path_factory.mktemp("runs")
    return {task: (path, folder / task, run_cli("train", path)) for task, path in recipes(folder).items()}


@pytest.mark.parametrize("task", list(EXPECTED))
def test_a_task_end_to_end(ran, task):
    _, folder, done = ran[task]
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    metrics, better, parts = EXPECTED[task]
    facts = RunFacts.read(folder / "facts.json")
    assert (facts.task, facts.status, facts.reason) == (task, "finished", "")
    steps = 7 * int(facts.recipe["training"]["epochs"])  # 56 rows, 8 in a batch
    assert facts.steps == facts.total_steps == steps
    assert list(facts.before) == list(facts.after) == metrics
    assert facts.after[better] < facts.before[better]
    assert [label for label, _ in facts.samples[0].parts] == parts
    assert facts.adapted
    assert facts.memory_planned["total"] > 0
    assert facts.memory_measured["peak"] > 0
    assert {part.name: part.rows for part in facts.data} == {"train": 56, "eval": 8}
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [1, *range(2, steps + 1, 2)]
    assert all({"loss", "learning_rate", "grad_norm", "adapter_norm", "epoch"} <= row.keys() for row in history)
    assert facts.recipe == read_recipe(folder / "recipe.yaml").model_dump(by_alias=True)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__.partition("+")[0]
    assert "<svg" in (folder / "report.html").read_text()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"checkpoint-{steps}"]
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert str(folder / "adapter") in done.stdout


@pytest.mark.parametrize("task", list(EXPECTED))
def test_the_adapter_measures_the_same_later(ran, task):
    """`eval` finds what the run found: its recipe, its held-out rows, its labels."""
    _, folder, _ = ran[task]
    done = run_cli("eval", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    measured, facts = json.loads(done.stdout), RunFacts.read(folder / "facts.json")
    assert measured[task] == pytest.approx(facts.after, rel=1e-5, abs=1e-6)
    if task != "text-classification":  # a classifier's head is new, and its random start is not saved
        assert measured["base"] == pytest.approx(facts.before, rel=1e-5, abs=1e-6)


def test_stock_peft_gives_the_same_loss(ran):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe, folder, _ = ran["causal-lm"]
    base = AutoModelForCausalLM.from_pretrained(read_recipe(recipe).model.name)
    model = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    row = sums()[0]
    chat = [{"role": "user", "content": row["question"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    answered = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    done = run_cli("generate", str(folder), "--prompt", row["question"], "--max-new-tokens", "8", "--json")
    (sample,) = json.loads(done.stdout)
    assert dict(sample["parts"])["causal-lm"] == tokenizer.decode(answered, skip_special_tokens=True).strip()


@pytest.mark.parametrize("task", list(EXPECTED))
def test_generate_shows_the_base_and_each_adapter(ran, task):
    _, folder, _ = ran[task]
    done = run_cli(
        "generate", str(folder), str(folder / "adapter"), "--prompt", "the sun", "--prompt", "snow", "--json"
    )
    assert done.returncode == 0, done.stderr
    samples = json.loads(done.stdout)
    assert [sample["title"] for sample in samples] == ["the sun", "snow"]
    for sample in samples:
        base, one, other = sample["parts"]
        assert (base[0], one[0]) == ("base", task)
        assert one[1] == other[1]


def test_the_row_that_is_shown_has_its_mask(ran):
    _, _, done = ran["causal-lm"]
    assert "<|im_start|>assistant⏎\n[loss]" in done.stderr
    assert "What is" in done.stderr.split("[loss]")[0]


def test_json_and_quiet(ran, tmp_path):
    recipe, folder, _ = ran["text-classification"]
    done = run_cli("train", recipe, f"output={tmp_path / 'again'}", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["status"] == "finished"
    assert facts["after"] == RunFacts.read(folder / "facts.json").after
    quiet = run_cli("train", recipe, f"output={tmp_path / 'quiet'}", "--quiet", "training.max_steps=1")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")

"""Recipes that are wrong, each in one way: one line, the nearest right name, nothing loaded and nothing written."""

import pytest
from bases import llama_base, sums, write_recipe, write_rows
from helpers import run_cli

#: What is wrong -> (overrides, what the message must say).
BROKEN = {
    "unknown key": (["training.learning_rat=1e-4"], ["training.learning_rat", "did you mean 'learning_rate'?"]),
    "unknown section": (["trainning.epochs=1"], ["trainning", "did you mean 'training'?"]),
    "key of another section": (["training.rank=8"], ["training.rank", "adapter"]),
    "another tool's name": (["training.lr=1e-4"], ["training.lr", "learning_rate"]),
    "wrong type": (["training.epochs=three"], ["training.epochs", "'three'"]),
    "number as text": (["adapter.rank='16'"], ["adapter.rank", "'16'"]),
    "out of range": (["adapter.rank=0"], ["adapter.rank", "1"]),
    "not finite": (["training.learning_rate=.inf"], ["training.learning_rate"]),
    "wrong choice": (["training.schedule=cosin"], ["training.schedule", "'cosine'"]),
    "unknown task": (["task=causal-ml"], ["did you mean 'causal-lm'?"]),
    "a plugin's task": (["task=rl"], ["'rl'", "plugin 'transformers'"]),
    "missing key": (["model={}"], ["model.name", "missing"]),
    "newer schema": (["schema=2"], ["schema", "pip install -U"]),
    "two that exclude each other": (["resume=true", "overwrite=true"], ["resume and overwrite contradict"]),
    "two forms of data": (["data.text=question"], ["text and prompt are different forms"]),
    "half a form": (["data.completion=null"], ["prompt and completion go together"]),
    "two ways to evaluate": (["data.eval=qa.jsonl"], ["eval_fraction"]),
    "no key=value": (["resume"], ["'resume' is no key=value"]),
    # From here on the task's packages are imported, and no weight is read.
    "missing file": (["data.train={folder}/qa.json"], ["data.train", "qa.jsonl"]),
    "unknown column": (["data.prompt=quesion"], ["data.prompt", "did you mean 'question'?", "answer, question"]),
    "unknown column in a template": (["data.prompt='Q: {quest}'"], ["data.prompt", "did you mean 'question'?"]),
    "broken line": (["data.train={folder}/broken.jsonl"], ["broken.jsonl", "line 2"]),
    "unknown model": (["model.name={folder}/lama"], ["model.name", "did you mean", "llama"]),
    "unknown role": (["adapter.targets=atention"], ["atention", "attention"]),
    "unknown quantizer": (["model.quantization=nf44"], ["nf44", "nf4"]),
    "device that is not there": (["model.device=cuda:7"], ["cuda:7"]),
    "precision that can't be": (["training.precision=float16", "model.device=cpu"], ["training.precision"]),
    "missing package": (["training.report_to=[wandb]"], ["wandb", "pip install"]),
    "output in use": (["output={folder}"], ["holds other files"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    write_rows(folder / "qa.jsonl", sums(16))
    (folder / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    write_recipe(
        folder / "recipe.yaml",
        task="causal-lm",
        model={"name": llama_base(folder / "llama"), "device": "cpu"},
        data={"train": str(folder / "qa.jsonl"), "prompt": "question", "completion": "answer", "eval_fraction": 0.25},
        output=str(folder / "run"),
    )
    return folder


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_recipe(folder, name):
    overrides, said = BROKEN[name]
    done = run_cli("train", str(folder / "recipe.yaml"), *(o.replace("{folder}", str(folder)) for o in overrides))
    assert (done.returncode, done.stdout) == (1, "")
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in done.stderr
    for part in said:
        assert part in errors[0]
    assert not (folder / "run").exists()


def test_the_recipe_itself_is_right(folder):
    done = run_cli("plan", str(folder / "recipe.yaml"), "--json")
    assert done.returncode == 0, done.stderr

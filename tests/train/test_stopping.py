"""Runs that are killed, run out of memory or are damaged. TrainerContract has those that are stopped or diverge."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bases import llama_base, sums, write_recipe, write_rows
from helpers import run_cli
from safetensors.torch import load_file

from lora_adapters.report.facts import RunFacts
from lora_adapters.runs.checkpoints import is_complete

#: Of a line of metrics.jsonl, what depends on the machine and not on the run.
MACHINE = ("tokens_per_second", "rows_per_second", "memory")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A run of 96 steps with dropout, shuffled rows, accumulation and a checkpoint every 5 steps."""
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(
        folder / "recipe.yaml",
        task="causal-lm",
        model={"name": llama_base(folder / "llama"), "device": "cpu"},
        adapter={"rank": 4, "dropout": 0.1},
        data={
            "train": write_rows(folder / "qa.jsonl", sums()),
            "prompt": "question",
            "completion": "answer",
            "eval_fraction": 0.25,
        },
        training={
            "epochs": 16,
            "batch_size": 4,
            "gradient_accumulation": 2,
            "learning_rate": 1e-3,
            "max_length": 64,
            "log_every": 1,
            "save_every": 5,
        },
        samples=1,
        output=str(folder / "whole"),
    )


@pytest.fixture(scope="module")
def whole(recipe):
    """The same run, left alone."""
    done = run_cli("train", recipe, "--quiet")
    assert done.returncode == 0, done.stderr
    return Path(recipe).parent / "whole"


def start(recipe: str, folder: Path, *overrides: str) -> subprocess.Popen:
    """Start a run in a process of its own, and return once it is past step 12."""
    arguments = ["lora-adapters", "train", recipe, f"output={folder}", *overrides]
    code = f"import sys; sys.argv = {arguments!r}; from lora_adapters.cli import main; main()"
    # A log file would be written in blocks; metrics.jsonl is flushed line by line.
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 12:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return process


def tensors(folder: Path) -> dict:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def history(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MACHINE} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert history(one) == history(other)
    left, right = RunFacts.read(one / "facts.json"), RunFacts.read(other / "facts.json")
    assert (left.before, left.after, left.samples) == (right.before, right.after, right.samples)


def test_a_killed_run_goes_on_from_the_newest_whole_checkpoint(recipe, whole, tmp_path):
    folder = tmp_path / "run"
    process = start(recipe, folder, "training.keep_checkpoints=2")
    process.kill()
    process.communicate(timeout=60)
    assert RunFacts.read(folder / "facts.json").status == "running"
    checkpoints = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    kept = [path for path in checkpoints if is_complete(path)]
    assert kept
    # The newest one, whole or not, loses half of its optimizer, as a full disk would leave it.
    file = kept[-1] / "optimizer.pt"
    os.truncate(file, file.stat().st_size // 2)
    assert not is_complete(kept[-1])
    again = run_cli("train", recipe, f"output={folder}", "resume=true", "--quiet")
    assert again.returncode == 0, again.stderr
    expected = int(kept[-2].name.split("-")[1]) if len(kept) > 1 else 0
    assert RunFacts.read(folder / "facts.json").resumed_from == [expected]
    assert_same_run(folder, whole)


def test_a_resumed_run_must_go_on_as_it_began(recipe, whole):
    done = run_cli("train", recipe, "resume=true")
    assert done.returncode == 1
    assert "is finished: there is nothing to resume" in done.stderr
    facts_file = whole / "facts.json"
    before = facts_file.read_text()
    try:
        facts_file.write_text(before.replace('"status": "finished"', '"status": "interrupted"'))
        done = run_cli("train", recipe, "resume=true", "training.learning_rate=5e-4")
        assert done.returncode == 1
        assert "training.learning_rate was 0.001" in done.stderr
        assert "is 0.0005 now" in done.stderr
    finally:
        facts_file.write_text(before)


def test_an_earlier_run_is_not_lost(recipe, whole):
    before = tensors(whole)
    done = run_cli("train", recipe)
    assert done.returncode == 1
    assert "holds a run already: set resume=true" in done.stderr
    assert tensors(whole).keys() == before.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA maps more address space than this test allows")
def test_out_of_memory_says_what_would_fit(recipe, tmp_path):
    """The process may use so much address space and no more; the batch of the recipe needs more than that."""
    folder = tmp_path / "run"
    limit = (
        "import resource, torch, transformers, peft, psutil; "
        "size = psutil.Process().memory_info().vms + 1200 * 2**20; "
        "resource.setrlimit(resource.RLIMIT_AS, (size, size)); "
    )
    long = write_rows(tmp_path / "long.jsonl", [{"question": "word " * 50, "answer": "yes"} for _ in range(512)])
    done = run_cli(
        "train",
        recipe,
        f"output={folder}",
        f"data.train={long}",
        "data.eval_fraction=0",
        "training.batch_size=512",
        "training.gradient_accumulation=1",
        "training.max_length=240",
        before=limit,
    )
    assert done.returncode == 1, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: Out of memory on cpu: a step of 512 x "), done.stderr
    assert "Would fit: " in error
    assert len(re.findall(r"=\S+ \(\d+\.\d MiB\)", error)) == 3
    assert "Traceback" not in done.stderr
    first = error.split("Would fit: ")[1].split(";")[0].rpartition(" (")[0].split()
    again = run_cli("train", recipe, f"output={folder}", f"data.train={long}", "data.eval_fraction=0",
                    "training.max_length=240", "training.max_steps=1", *first, before=limit)  # fmt: skip
    assert again.returncode == 0, again.stderr

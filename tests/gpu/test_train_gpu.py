"""`lora-adapters train` on a GPU: mixed precision, 4 bits, packing, and running out of memory."""

import re

import pytest
from bases import llama_base, sums, write_recipe, write_rows
from helpers import run_cli

from lora_adapters.report.facts import RunFacts

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return write_recipe(
        folder / "recipe.yaml",
        task="causal-lm",
        model={"name": llama_base(folder / "llama"), "device": "cuda"},
        adapter={"rank": 4},
        data={
            "train": write_rows(folder / "qa.jsonl", sums()),
            "prompt": "question",
            "completion": "answer",
            "eval_fraction": 0.125,
        },
        training={"epochs": 6, "batch_size": 8, "learning_rate": 1e-2, "max_length": 64, "log_every": 2},
        output=str(folder / "run"),
    )


WAYS = {
    "bfloat16": [],
    "float16": ["training.precision=float16"],
    "float32": ["training.precision=float32"],
    "nf4, packed, checkpointed": [
        "model.quantization=nf4",
        "training.packing=true",
        "training.gradient_checkpointing=true",
        "training.optimizer=adamw_8bit",
        "training.batch_size=2",
    ],
    "bfloat16 weights": ["model.dtype=bfloat16"],
    "compiled": ["training.compile=true"],
}


@pytest.mark.parametrize("way", list(WAYS))
def test_it_trains(recipe, tmp_path, way):
    done = run_cli("train", recipe, f"output={tmp_path / 'run'}", *WAYS[way])
    assert done.returncode == 0, done.stderr
    facts = RunFacts.read(tmp_path / "run" / "facts.json")
    assert facts.status == "finished"
    assert facts.after["loss"] < facts.before["loss"]
    assert "cuda:0" in facts.environment
    assert facts.memory_measured["peak"] > facts.memory_measured["before"] > 0
    if way == "compiled":
        return  # the compiler's own buffers
    # Next to tiny tensors cuBLAS's workspace, 64 MiB on newer GPUs, weighs much.
    assert facts.memory_measured["peak"] < 1.5 * facts.memory_planned["total"] + 80 * 2**20


def test_a_stopped_run_goes_on(recipe, tmp_path):
    """As on a CPU (tests/train/test_stopping.py), up to kernels whose sums have no fixed order."""
    whole = run_cli("train", recipe, f"output={tmp_path / 'whole'}", "--quiet")
    assert whole.returncode == 0, whole.stderr
    stop = (
        "import os, signal, threading, time; from pathlib import Path; "
        f"metrics = Path({str(tmp_path / 'run' / 'metrics.jsonl')!r}); "
        "wait = lambda: [time.sleep(0.01) for _ in iter(lambda: metrics.exists() and metrics.stat().st_size > 2000, True)]; "
        "threading.Thread(target=lambda: (wait(), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start(); "
    )
    stopped = run_cli("train", recipe, f"output={tmp_path / 'run'}", before=stop)
    assert stopped.returncode == 143, stopped.stderr
    again = run_cli("train", recipe, f"output={tmp_path / 'run'}", "resume=true")
    assert again.returncode == 0, again.stderr
    left, right = (RunFacts.read(tmp_path / name / "facts.json") for name in ("whole", "run"))
    assert right.after == pytest.approx(left.after, rel=1e-2)


def test_out_of_memory_says_what_would_fit(recipe, tmp_path):
    limit = (
        "import torch; torch.cuda.set_per_process_memory_fraction("
        "1.5 * 2**30 / torch.cuda.get_device_properties(0).total_memory); "
    )
    rows = write_rows(tmp_path / "long.jsonl", [{"question": "word " * 50, "answer": "yes"} for _ in range(2048)])
    asked = [f"data.train={rows}", "data.eval_fraction=0", "training.max_length=240", f"output={tmp_path / 'run'}"]
    done = run_cli("train", recipe, *asked, "training.batch_size=2048", before=limit)
    assert done.returncode == 1, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: Out of memory on cuda"), done.stderr
    assert len(re.findall(r"=\S+ \(\d+\.\d [MG]iB\)", error)) == 3
    first = error.split("Would fit: ")[1].split(";")[0].rpartition(" (")[0].split()
    again = run_cli("train", recipe, *asked, "training.batch_size=2048", "training.max_steps=2", *first, before=limit)
    assert again.returncode == 0, again.stderr

"""LoraCallback under torchrun: two processes, each with its own half of every batch, gradient checkpointing on."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import llama
from peft import PeftModel
from safetensors.torch import load_file

import lora_adapters as la

WORKER = Path(__file__).with_name("two_processes_worker.py")
CASES = ["dense", "nf4", "reentrant"]
STEPS = 4

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes left behind. They train every case, since starting them takes longer."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # Processes that inherit another launcher's variables would wait for its other members.
    left = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    log = folder / "output.txt"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, str(WORKER), str(folder)],
            env=left | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            # The launcher passes this on to the processes it started.
            process.terminate()
            process.wait()
    assert process.returncode == 0, log.read_text()
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Trains a case in this process, the whole batch at once. Returns the adapter and what the model was given."""
    train = runpy.run_path(str(WORKER))["train"]
    done = {}

    def run(case):
        if case not in done:
            lora, _, _, seen = train(case, tmp_path_factory.mktemp("one"))
            done[case] = {n: p.detach().clone() for n, p in lora.model.named_parameters() if p.requires_grad}, seen
        return done[case]

    return run


def reports(folder):
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def adapters(folder, suffix=""):
    return [load_file(folder / f"rank-{rank}{suffix}.safetensors") for rank in (0, 1)]


def logits(model):
    ids = torch.randint(3, 32, (3, 6), generator=torch.Generator().manual_seed(9))
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def base(case):
    return la.attach(llama(), rank=2, quantization="nf4").detach() if case == "nf4" else llama()


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} if folder.exists() else set()


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_one_adapter(two, case):
    seen = reports(two / case)
    assert [report["rank"] for report in seen] == [0, 1]
    for report in seen:
        assert report["world_size"] == 2
        assert report["backend"] == "gloo"
        assert report["wrapper"] == "DistributedDataParallel"
        assert report["threads"] == 1
        assert len(report["batches"]) == STEPS
        # Each step runs the attention once forward, and once more where its activations are recomputed.
        assert report["attention_calls"] == 2 * STEPS

    (first, second), (initial, initial_second) = adapters(two / case), adapters(two / case, "-initial")
    assert first.keys() == second.keys() == initial.keys()
    assert len(first) > 0
    assert any(not torch.equal(initial[name], initial_second[name]) for name in initial)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert not torch.equal(value, initial[name]), name


@pytest.mark.parametrize("case", CASES)
def test_each_process_gets_its_own_data_and_the_result_is_that_of_one_process(two, one, case):
    halves = [report["batches"] for report in reports(two / case)]
    rows = [[tuple(row) for batch in half for row in batch] for half in halves]
    assert not set(rows[0]) & set(rows[1])
    alone, seen = one(case)
    assert [first + second for first, second in zip(*halves, strict=True)] == seen["batches"]
    assert reports(two / case)[0]["losses"] == pytest.approx(seen["losses"], rel=1e-5)
    together, _ = adapters(two / case)
    assert together.keys() == alone.keys()
    for name, value in together.items():
        # Adam divides by the gradient's own size, so rounding in a gradient near zero shows in full.
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("saved", ["run/checkpoint-4", "final", "saved by every process"])
@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_is_the_trained_adapter(two, case, saved):
    trained, _ = adapters(two / case)
    folder = two / case / saved
    assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & files(folder)
    assert not [name for name in files(two / case) if "-saving-" in name]
    ours = base(case)
    adapter = la.restore(ours, folder)
    restored = {n: p for n, p in adapter.model.named_parameters() if p.requires_grad}
    assert restored.keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in restored.items())
    theirs = PeftModel.from_pretrained(base(case), folder)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)


def test_only_the_first_process_writes(two):
    first, second = files(two / "written by 0"), files(two / "written by 1")
    assert {"run/checkpoint-2/adapter_model.safetensors", "run/checkpoint-2/adapter_config.json"} <= first
    assert {"final/adapter_model.safetensors", "final/adapter_config.json"} <= first
    # The random state is each process's own; Trainer writes it.
    assert second == {"run/checkpoint-2/rng_state_1.pth"}


def test_reentrant_checkpointing_that_can_not_work_is_refused_at_once(two):
    for rank in (0, 1):
        assert "ddp_find_unused_parameters=False" in (two / f"refused-{rank}.txt").read_text()
    assert not files(two / "refused")

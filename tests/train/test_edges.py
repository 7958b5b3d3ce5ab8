"""Recipes at the edges of what makes sense: they train, or are refused with one line before anything is loaded."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from bases import bert_base, llama_base, seasons, sums, write_recipe, write_rows
from click.testing import CliRunner
from helpers import run_cli
from safetensors.torch import load_file
from small_tokenizers import make_tokenizer

from lora_adapters import cli
from lora_adapters.errors import LoraAdaptersError, RequestError
from lora_adapters.report.facts import RunFacts


def train(*arguments):
    """Run the command in this process, which needs no second import of torch."""
    return CliRunner().invoke(cli.cli, ["train", *map(str, arguments)])


def finished(folder, *arguments):
    done = train(*arguments, f"output={folder}")
    assert done.exit_code == 0, (done.output, done.exception)
    return RunFacts.read(folder / "facts.json")


def tensors(folder):
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    write_rows(folder / "one.jsonl", sums(1))
    llama = llama_base(folder / "llama")
    write_recipe(
        folder / "causal.yaml",
        task="causal-lm",
        model={"name": llama},
        adapter={"rank": 4},
        data={
            "train": write_rows(folder / "qa.jsonl", sums(32)),
            "prompt": "question",
            "completion": "answer",
            "eval_fraction": 0.125,
        },
        training={"batch_size": 4, "learning_rate": 1e-2, "max_length": 64, "max_steps": 2, "log_every": 1},
        samples=1,
        output=str(folder / "run"),
    )
    write_recipe(
        folder / "classes.yaml",
        task="text-classification",
        model={"name": bert_base(folder / "bert")},
        data={"train": write_rows(folder / "seasons.jsonl", seasons(16))},
        training={"max_steps": 1},
        output=str(folder / "run"),
    )
    return folder


@pytest.fixture(scope="module")
def gpt2(place):
    """A base with 64 learnt positions, and with an end token but no pad token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer(place / "gpt2")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(place / "gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=len(tokenizer), n_positions=64, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(place / "gpt2")
    return place / "gpt2"


TRAINS = {
    "no eval data": (["data.eval_fraction=0"], 2),
    "no samples": (["samples=0"], 2),
    "one row, a batch larger than the data": (
        ["data.train={place}/one.jsonl", "data.eval_fraction=0", "training.batch_size=100", "training.max_steps=null"], 1
    ),
    "part of an epoch": (["training.max_steps=null", "training.epochs=0.3"], 3),
    "an epoch and a half, accumulated": (
        ["training.max_steps=null", "training.epochs=1.5", "training.gradient_accumulation=3"], 5
    ),
    "accumulation beyond the data": (["training.gradient_accumulation=50"], 2),
    "a base in bfloat16": (["model.dtype=bfloat16"], 2),
    "computing in bfloat16": (["training.precision=bfloat16"], 2),
    "nf4": (["model.quantization=nf4"], 2),
    "nf4 by role": (["model.quantization={mlp: nf4}"], 2),
    "DoRA": (["adapter.dora=true"], 2),
    "modules to save": (["adapter.modules_to_save=[lm_head]"], 2),
    "ranks and alphas by role": (["adapter.targets={q: 2, v: 4, mlp: {rank: 8, alpha: 4}}"], 2),
    "orthogonal": (["adapter.init=orthogonal"], 2),
    "a warm-up longer than the run": (["training.warmup=100"], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TRAINS))
def test_it_trains(place, tmp_path, name):
    overrides, steps = TRAINS[name]
    overrides = [override.replace("{place}", str(place)) for override in overrides]
    made = finished(tmp_path / "run", place / "causal.yaml", *overrides)
    assert (made.status, made.steps, made.total_steps) == ("finished", steps, steps)
    assert any(bool(value.any()) for key, value in tensors(tmp_path / "run").items() if "lora_B" in key)
    assert bool(made.after) == (name != "no eval data" and "one row" not in name)
    assert len(made.samples) == (1 if made.after and name != "no samples" else 0)
    ranks = {value.shape[0] for key, value in tensors(tmp_path / "run").items() if "lora_A" in key}
    assert ranks == ({2, 4, 8} if "ranks" in name else {4})
    assert any("lm_head" in key for key in tensors(tmp_path / "run")) == (name == "modules to save")


REFUSED = {
    "rows too long": (["training.max_length=16", "training.too_long=error"], "more than training.max_length 16"),
    "a start that is none": (["adapter.init=pisa"], "Did you mean 'pissa'?"),
    "a start from data": (["adapter.init=eva"], "needs data or settings that a recipe can't give"),
    "a start from dense weights": (["adapter.init=olora", "model.quantization=nf4"], "not for quantized bases"),
    "blocks that are not there": (["adapter.layers=[9]"], "there are blocks 0 to 1"),
    "nothing left to train on": (["data.limit=1"], "leaves none to train on"),
    "an output in a file": (["output={place}/one.jsonl/run"], "can't be written: Not a directory"),
    "an output that is a file": (["output={place}/one.jsonl"], "is a file: give another folder"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_it_is_refused(place, tmp_path, name):
    overrides, message = REFUSED[name]
    overrides = [f"output={tmp_path}/run", *(o.replace("{place}", str(place)) for o in overrides)]
    done = train(place / "causal.yaml", "--json", *overrides)
    assert isinstance(done.exception, LoraAdaptersError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
    assert (done.stdout, done.stderr) == ("", "")
    assert not (tmp_path / "run").exists()


# ---- learnt positions ------------------------------------------------------------------------------------------------


def test_rows_beyond_the_models_positions(place, gpt2, tmp_path):
    asked = (place / "causal.yaml", f"model.name={gpt2}")
    done = train(*asked, "training.max_length=65", f"output={tmp_path / 'run'}")
    assert isinstance(done.exception, RequestError)
    assert f"training.max_length is 65, and {gpt2} has positions for 64 tokens only" in str(done.exception)
    assert "set training.max_length=64" in str(done.exception)
    assert not (tmp_path / "run").exists()
    # Answers end where the positions do: a sample here would be 96 tokens long.
    assert finished(tmp_path / "run", *asked, "training.max_length=64").samples
    run = str(tmp_path / "run")
    done = CliRunner().invoke(cli.cli, ["generate", run, "--prompt", "a", "--max-new-tokens", "500"])
    assert done.exit_code == 0, done.exception
    done = CliRunner().invoke(cli.cli, ["generate", run, "--prompt", "x " * 100])
    assert isinstance(done.exception, RequestError)
    assert "leaves the model no room to answer: shorten it" in str(done.exception)


def test_a_length_that_nobody_gave_is_lowered(place, tmp_path):
    """The default is 1024 tokens, and BERT here has 128 positions; the recipe as it ran says so, and repeats the run."""
    made = finished(tmp_path / "run", place / "classes.yaml")
    assert made.recipe["training"]["max_length"] == 128
    again = finished(tmp_path / "again", tmp_path / "run" / "recipe.yaml")
    assert again.recipe["training"] == made.recipe["training"]


def test_a_tokenizer_without_any_end(place, tmp_path):
    base = tmp_path / "base"
    llama_base(base)
    file = base / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in ("pad_token", "eos_token")}))
    done = train(place / "causal.yaml", f"model.name={base}", f"output={tmp_path / 'run'}")
    assert isinstance(done.exception, LoraAdaptersError)
    assert 'Name one of its tokens as "eos_token"' in str(done.exception)


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_metrics(place, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = finished(
        tmp_path / "run", place / "causal.yaml", "training.report_to=[tensorboard]", "training.eval_every=1"
    )
    events = EventAccumulator(str(tmp_path / "run" / "logs"))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert events.Scalars("eval/loss")[-1].value == pytest.approx(made.after["loss"], rel=1e-5)


# ---- stopping, in every stage ----------------------------------------------------------------------------------------


def once(happened, number=signal.SIGINT):
    """Send this process a signal as soon as something happened. Runs handle it in the main thread, as in a terminal."""

    def wait():
        while not happened():
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


def logged(folder, step):
    file = folder / "metrics.jsonl"
    return lambda: file.exists() and f'"step": {step},' in file.read_text()


def test_a_run_that_is_resumed_twice_is_the_same_run(place, tmp_path):
    """With dropout, and a start that must be repeated exactly: PiSSA takes it from the base's weights."""
    overrides = ["adapter.init=pissa", "adapter.dropout=0.1", "training.max_steps=30", "training.save_every=4"]
    recipe = (place / "causal.yaml", *overrides)
    whole = finished(tmp_path / "whole", *recipe)
    run = tmp_path / "run"
    for step, resume in ((5, []), (12, ["resume=true"])):
        once(logged(run, step))
        done = train(*recipe, f"output={run}", *resume)
        assert done.exit_code == 130, (done.output, done.exception)
        assert step <= RunFacts.read(run / "facts.json").steps < 30
    made = finished(run, *recipe, "resume=true")
    assert len(made.resumed_from) == 2
    assert (made.before, made.after, made.samples) == (whole.before, whole.after, whole.samples)
    one, other = tensors(run), tensors(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_stopped_while_it_measures_the_trained_adapter(place, tmp_path):
    run = tmp_path / "run"
    recipe = (place / "causal.yaml", f"data.eval={place / 'qa.jsonl'}", "data.eval_fraction=0", "samples=6")
    once((run / "adapter" / "adapter_config.json").exists)
    done = train(*recipe, f"output={run}", "--json")
    assert done.exit_code == 130, (done.output, done.exception)
    assert "resume=true" in done.stderr
    facts = json.loads(done.stdout)
    assert (facts["status"], facts["steps"], facts["after"]) == ("interrupted", 2, {})
    assert facts["reason"] in done.stderr
    made = finished(run, *recipe, "resume=true")
    assert made.resumed_from == [2]
    assert made.after


def test_other_data_is_no_resumed_run(place, tmp_path):
    data = tmp_path / "qa.jsonl"
    write_rows(data, sums(32))
    recipe = (place / "causal.yaml", f"data.train={data}", "training.max_steps=60", f"output={tmp_path / 'run'}")
    once(logged(tmp_path / "run", 3))
    assert train(*recipe).exit_code == 130
    write_rows(data, sums(40))
    done = train(*recipe, "resume=true")
    assert isinstance(done.exception, RequestError)
    assert "the data is not what the run began with" in str(done.exception)
    write_rows(data, sums(32))
    assert train(*recipe, "resume=true").exit_code == 0


def test_resuming_before_the_first_checkpoint_begins_anew(place, tmp_path):
    wild = ["training.optimizer=sgd", "training.learning_rate=1e30", "training.max_grad_norm=0", "training.max_steps=20",
            "training.nan=raise", "training.save_every=19", "training.warmup=0"]  # fmt: skip
    recipe = (place / "causal.yaml", *wild, f"output={tmp_path / 'run'}")
    done = train(*recipe, "--json")
    assert done.exit_code == 1
    facts = json.loads(done.stdout)
    assert facts["status"] == "diverged"
    assert facts["reason"] == str(done.exception)
    again = train(*recipe, "resume=true")
    assert "no complete checkpoint yet: starting at step 0" in again.stderr
    assert RunFacts.read(tmp_path / "run" / "facts.json").resumed_from == [0]


def test_stopped_while_it_measures_the_base(place, tmp_path):
    """In a process of its own, whose stdout must hold one document; then the folder is free for another run."""
    run, many = tmp_path / "run", write_rows(tmp_path / "many.jsonl", sums(100) * 40)
    command = [sys.executable, "-c", "from lora_adapters.cli import main; main()", "train", str(place / "causal.yaml"),
               f"output={run}", f"data.eval={many}", "data.eval_fraction=0", "training.batch_size=1", "--json"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (run / "facts.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err == "Error: Stopped by SIGTERM. Nothing was trained yet.\n"
    facts = json.loads(out)
    assert (facts["status"], facts["steps"], facts["before"]) == ("interrupted", 0, {})
    assert finished(run, place / "causal.yaml").resumed_from == []


def test_a_full_disk_is_one_line(place, tmp_path):
    """Files may grow to 12 KiB: an adapter is larger."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12288, 12288)); "
    done = run_cli(
        "train", str(place / "causal.yaml"), "data.eval_fraction=0", f"output={tmp_path / 'run'}", before=limit
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.match(r"Error: .*(failed|can't be written).*", done.stderr.splitlines()[-1])
    assert not (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()

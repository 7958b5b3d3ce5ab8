"""`lora-adapters merge` as a shell sees it: what it writes and says, and what a signal leaves behind."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from helpers import llama, perturb, run_cli, tokens
from transformers import AutoModelForCausalLM

import lora_adapters as la
from lora_adapters import cli
from lora_adapters.errors import LoraAdaptersError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, an adapter whose config names it, and what the two compute together."""
    folder = tmp_path_factory.mktemp("saved")
    model = llama()
    model.save_pretrained(folder / "base")
    adapter = la.attach(model, rank=4, alpha=8, targets="attention+mlp")
    perturb(model)
    adapter.save(folder / "adapter")
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    return folder, logits(adapter.model)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens() % 32).logits


def here(*arguments):
    """Run the command in this process, which needs no second import of torch."""
    # Named here, these come back as they were; the command sets them.
    names = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY")
    return CliRunner(env=dict.fromkeys(names)).invoke(cli.cli, ["merge", *map(str, arguments)])


def test_the_base_that_the_adapter_names(saved, tmp_path):
    folder, expected = saved
    done = run_cli("merge", str(folder / "adapter"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    facts = " ".join(done.stdout.split())
    assert f"{folder / 'base'} (named by the adapter's config)" in facts
    assert "LlamaForCausalLM, float32" in facts
    assert "14 layers" in facts
    assert "tokenizer" in facts  # that there was none to copy
    for word in ("loading", "merging 14 layers", "writing"):
        assert word in done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_json_and_quiet(saved, tmp_path):
    folder, _ = saved
    base = ("--base", str(folder / "base"))
    done = run_cli("merge", str(folder / "adapter"), str(tmp_path / "a"), *base, "--dtype", "bfloat16", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["folder"] == str(tmp_path / "a")
    assert (facts["base"], facts["base_from"]) == (str(folder / "base"), "argument")
    assert (facts["model"], facts["dtype"], facts["layers"]) == ("LlamaForCausalLM", "bfloat16", 14)
    assert facts["nbytes"] == sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    done = here(folder / "adapter", tmp_path / "b", "--quiet")
    assert (done.exit_code, done.stdout) == (0, "")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").dtype == torch.float32


def test_a_place_that_is_taken_and_overwrite(saved, tmp_path):
    folder, expected = saved
    llama(1).save_pretrained(tmp_path / "out")
    arguments = (folder / "adapter", tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    done = here(*arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "holds files already" in str(done.exception)
    assert "--overwrite" in str(done.exception)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert here(*arguments, "--overwrite").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--base", "nowhere/at-all"), 1, "No backend can load 'nowhere/at-all'"),
        (("--dtype", "int4"), 2, "'int4' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        (("--task", "text-clasification"), 1, "Did you mean 'text-classification'?"),
        (("--trust-remote-code",), 1, "--base"),
    ],
)
def test_wrong_options_are_one_line(saved, tmp_path, options, code, message):
    done = here(saved[0] / "adapter", tmp_path / "out", *options)
    assert (done.exit_code, done.stdout) == (code, "")
    error = done.stderr if code == 2 else str(done.exception)
    assert message in error
    assert code == 2 or (isinstance(done.exception, LoraAdaptersError) and "\n" not in error)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_adapter(saved, tmp_path):
    shutil.copytree(saved[0] / "adapter", tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    done = here(tmp_path / "adapter", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (1, "")
    assert isinstance(done.exception, LoraAdaptersError)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing_leaves_nothing(saved, tmp_path, number):
    (tmp_path / "out").mkdir()
    arguments = ["merge", str(saved[0] / "adapter"), str(tmp_path / "out")]
    # The real command, held where it has written the weights and the folder is not in place yet.
    code = f"""
import sys, time
from lora_adapters import staging
staging._settle = lambda folder: (print("written", *folder.glob("*.safetensors"), flush=True), time.sleep(60))
sys.argv = ["lora-adapters", *{arguments!r}]
from lora_adapters.cli import main
main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert "model.safetensors" in run.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 2
        run.send_signal(number)
        _, said = run.communicate()
    assert run.returncode == 1
    assert "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []

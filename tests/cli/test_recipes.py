"""`recipes`, `new` and `schema` as a shell sees them."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from helpers import run_cli as run

from lora_adapters import cli
from lora_adapters.errors import RequestError
from lora_adapters.hooks.manager import plugins
from lora_adapters.recipes.json_schema import json_schema
from lora_adapters.recipes.reading import read_recipe
from lora_adapters.recipes.starters import starters


def here(*arguments):
    """Run the command in this process."""
    return CliRunner().invoke(cli.cli, arguments)


def test_recipes_lists_tasks_and_starters():
    done = run("recipes")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    for task in plugins().trainers():
        assert any(row[:1] == [task] and row[-1] == "ready" for row in rows)
    for name, one in starters().items():
        assert any(row and row[0] == name and " ".join(row[1:]) == one.summary for row in rows)


def test_recipes_as_facts():
    facts = json.loads(here("recipes", "--json").stdout)
    assert {task["task"]: task["state"] for task in facts["tasks"]} == dict.fromkeys(plugins().trainers(), "ready")
    assert [one["name"] for one in facts["recipes"]] == list(starters())
    one = json.loads(here("recipes", "reward", "--json").stdout)
    assert one["text"] == starters()["reward"].text
    assert here("recipes", "--quiet").stdout == ""


def test_a_task_without_its_package_says_how_to_install_it():
    hidden = "import lora_adapters.hooks.manager as m; real = m.find_spec; "
    hidden += "m.find_spec = lambda name: None if name == 'trl' else real(name); "
    (row,) = [row for row in run("recipes", before=hidden).stdout.splitlines() if " (TRL)" in row]
    assert "needs trl: pip install 'lora-adapters[train]'" in row
    tasks = json.loads(run("recipes", "--json", before=hidden).stdout)["tasks"]
    assert {task["task"]: task["missing"] for task in tasks if task["missing"]} == {"reward": ["trl"]}


def test_a_recipe_is_printed_as_it_is():
    assert here("recipes", "seq2seq").stdout == starters()["seq2seq"].text
    with pytest.raises(RequestError, match=r"Did you mean 'seq2seq'\?"):
        CliRunner().invoke(cli.cli, ["recipes", "seq2sqe"], catch_exceptions=False)


def test_new_writes_a_recipe_that_train_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("new", "causal-lm-chat", "--model", "my/model: x", "--data", "a.jsonl", "--output", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "lora-adapters train causal-lm-chat.yaml" in done.stdout
    recipe = read_recipe("causal-lm-chat.yaml")
    assert (recipe.model.name, recipe.data.train, recipe.output) == ("my/model: x", "a.jsonl", "out")
    text = (tmp_path / "causal-lm-chat.yaml").read_text()
    assert text.count("#") == starters()["causal-lm-chat"].text.count("#")
    assert "THIS_FILE" not in text
    facts = json.loads(here("new", "reward", "sub.yaml", "--json").stdout)
    assert facts == {"file": "sub.yaml", "recipe": "reward", "task": "reward"}


def test_new_leaves_a_file_alone_unless_forced(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    done = here("new", "reward", str(path))
    assert isinstance(done.exception, RequestError)
    assert "--force" in str(done.exception)
    assert path.read_text() == "mine"
    assert here("new", "reward", str(path), "--force").exit_code == 0
    assert read_recipe(path).task == "reward"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rewrd",), "Did you mean 'reward'?"),
        (("reward", "no/such/x.yaml"), "no folder"),
        (("../x",), "No recipe is called"),
    ],
)
def test_new_says_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = here("new", *arguments)
    assert isinstance(done.exception, RequestError)
    assert message in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_schema_prints_what_an_editor_takes():
    done = run("schema", "reward")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json_schema("reward")
    assert json.loads(here("schema", "--json").stdout) == json_schema()
    assert "# yaml-language-server: $schema=recipe.schema.json" in here("schema", "--help").stdout
    with pytest.raises(RequestError, match="did you mean 'reward'"):
        CliRunner().invoke(cli.cli, ["schema", "rewrd"], catch_exceptions=False)


@pytest.mark.parametrize("arguments", [("recipes",), ("schema",), ("new", "reward", os.devnull, "--force")])
def test_nothing_heavy_is_imported(arguments):
    code = (
        f"import sys; sys.argv = ['lora-adapters', *{arguments!r}]; from lora_adapters.cli import cli\n"
        "cli.main(standalone_mode=False)\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


# ---- completion ------------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    environment = os.environ | {
        "_LORA_ADAPTERS_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["lora-adapters", *words]),
        "COMP_CWORD": str(len(words)),
    }
    code = "import sys; sys.argv = ['lora-adapters']; from lora_adapters.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_commands_options_and_names_complete():
    assert set(completed("")) == set(cli._COMMANDS)
    assert completed("rec") == ["recipes"]
    assert {"--model", "--data", "--output", "--force", "--json", "--quiet"} <= set(completed("new", "--"))
    assert completed("new", "") == list(starters())
    assert completed("new", "causal-lm-c") == ["causal-lm-chat"]
    assert completed("recipes", "rew") == ["reward"]
    assert set(completed("schema", "")) == set(plugins().trainers())
    assert completed("schema", "xyz") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell):
    environment = os.environ | {"_LORA_ADAPTERS_COMPLETE": f"{shell}_source"}
    code = "import sys; sys.argv = ['lora-adapters']; from lora_adapters.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert "_LORA_ADAPTERS_COMPLETE" in done.stdout

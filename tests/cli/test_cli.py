"""The command line as a shell sees it: what it prints, where, and its exit status."""

import json
from importlib.metadata import entry_points

import click
import pytest
from helpers import run_cli as run

import lora_adapters
from lora_adapters import cli

MISSING = "import sys; sys.modules['sklearn'] = None; "


def test_the_console_script_is_this_function():
    (script,) = entry_points(group="console_scripts", name="lora-adapters")
    assert script.load() is cli.main


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command(flag):
    done = run(flag)
    assert (done.returncode, done.stderr) == (0, "")
    for command, (_, line) in cli._COMMANDS.items():
        assert any(row.split()[:1] == [command] and line.split()[0] in row for row in done.stdout.splitlines())
    assert "--traceback" in done.stdout


def test_version():
    assert run("--version").stdout.split()[-1] == lora_adapters.__version__


def test_help_of_a_command():
    done = run("demo", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--seed" in done.stdout
    assert "--quiet" in done.stdout


def test_plugins_are_listed():
    done = run("plugins")
    assert done.returncode == 0
    rows = {row.split()[0]: row for row in done.stdout.splitlines()}
    assert "ready" in rows["transformers"]
    assert "lora_adapters_backends" in rows["transformers"]
    listed = json.loads(run("plugins", "--json").stdout)
    assert {plugin["name"] for plugin in listed} == set(rows)
    assert "causal-lm" in {plugin["name"]: plugin["tasks"] for plugin in listed}["transformers"]
    assert run("plugins", "--quiet").stdout == ""


def test_a_blocked_plugin_is_listed_as_blocked():
    done = run("plugins", before="import os; os.environ['LORA_ADAPTERS_DISABLE'] = 'transformers'; ")
    (row,) = [row for row in done.stdout.splitlines() if row.startswith("transformers")]
    assert "blocked" in row


@pytest.mark.parametrize(("word", "hint"), [("dmeo", "Did you mean 'demo'?"), ("plugin", "'plugins'"), ("xyzzy", "")])
def test_an_unknown_command(word, hint):
    done = run(word)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"No such command {word!r}." in done.stderr
    assert hint in done.stderr
    assert ("Did you mean" in done.stderr) == bool(hint)
    assert "Traceback" not in done.stderr


def test_a_wrong_option_of_a_command():
    done = run("demo", "--sede", "1")
    assert done.returncode == 2
    assert "--seed" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_raised_on_purpose_is_one_line():
    done = run("demo", before=MISSING)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "Error: The demo needs sklearn: pip install 'lora-adapters[demo]'\n"


def test_its_traceback_is_shown_when_asked_for():
    done = run("--traceback", "demo", before=MISSING)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "MissingDependencyError: The demo needs sklearn" in done.stderr


def test_any_other_error_keeps_its_traceback():
    """A bug must not be dressed up as a message to the user."""
    done = run("plugins", before="import lora_adapters.hooks.manager as m; m.plugins = None; ")
    assert done.returncode == 1
    assert "TypeError: 'NoneType' object is not callable" in done.stderr
    assert done.stderr.startswith("Traceback")


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_every_command_takes_json_and_quiet(name):
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--json", "--quiet"} <= options

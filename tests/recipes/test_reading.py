"""Recipes are read and checked without loading anything; what is wrong is told in one line each."""

import json
import subprocess
import sys

import pytest

from lora_adapters.errors import LoraAdaptersError, MissingDependencyError, RequestError
from lora_adapters.recipes.reading import dump, read_recipe, validate
from lora_adapters.recipes.yaml_text import emit, parse

MINIMAL = """\
task: causal-lm
model: {name: org/model}
data:
  train: a.jsonl
output: runs/a
"""


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_recipe(path, overrides)

    return read


@pytest.fixture
def wrong(read, tmp_path):
    """Read what is wrong and return the message, the folder left out."""

    def wrong(text, *overrides):
        with pytest.raises(RequestError) as caught:
            read(text, *overrides)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return wrong


# ---- what is right ---------------------------------------------------------------------------------------------------


def test_defaults_and_values(read):
    recipe = read(MINIMAL + "training: {learning_rate: 1e-3, max_steps: 5, precision: float32}\n")
    assert type(recipe).__name__ == "CausalLMRecipe"
    assert recipe.training.learning_rate == 1e-3
    assert recipe.training.max_steps == 5
    assert recipe.adapter.rank == 16
    assert recipe.schema_version == 1


def test_overrides_replace_add_and_reach_deep(read):
    recipe = read(
        MINIMAL,
        "training.epochs=3",
        "model.quantization=null",
        "data.train=[a.jsonl,b.jsonl]",
        "adapter.targets={q: 4, v: 8}",
        "adapter.targets.k=2",
        'data.text="{question}\\n{answer}"',
        "training.epochs=0.5",
        "data.system=a = b",
    )
    assert recipe.training.epochs == 0.5
    assert recipe.model.quantization is None
    assert recipe.data.train == ["a.jsonl", "b.jsonl"]
    assert recipe.adapter.targets == {"q": 4, "v": 8, "k": 2}
    assert recipe.data.text == "{question}\n{answer}"
    assert recipe.data.system == "a = b"


def test_a_section_left_empty_takes_an_override(read):
    assert read(MINIMAL + "adapter:\n", "adapter.rank=4").adapter.rank == 4


def test_a_byte_order_mark_and_windows_lines(read):
    assert read(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()).output == "runs/a"


def test_dump_writes_every_default_and_reads_back(read):
    recipe = read(MINIMAL, "adapter.targets={attention: 8}", 'data.text="yes: {a}\\n"', "model.revision='1e3'")
    text = dump(recipe)
    lines = text.splitlines()
    assert lines[:3] == ["schema: 1", "task: causal-lm", "model:"]
    assert "  weight_decay: 0.0" in lines
    assert read(text) == recipe
    assert dump(read(text)) == text


def test_nothing_heavy_is_imported(tmp_path):
    (tmp_path / "r.yaml").write_text(MINIMAL)
    code = (
        "import sys, json; from lora_adapters.recipes.reading import read_recipe; read_recipe(sys.argv[1]);"
        "print(json.dumps([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r.yaml")], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == []


# ---- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2E4", 2e4),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("+3", 3),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("True", True),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"),
        ("~", None),
        ("", None),
        ("<<", "<<"),
        ("'1'", "1"),
        ("!!str 1", "1"),
    ],
)
def test_values_are_those_of_yaml_1_2(text, value):
    found = parse(f"a: {text}", "r").value["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is given twice, first in line 1"),
        ("a:\n\tb: 1", "line 2: a tab"),
        ("a: b: c", "line 1: a colon where none can be"),
        ("a: 1\n---\nb: 2", "line 2: a second document"),
        ("a:\n  - 1\n  b: 2", "line 3: the indentation"),
        ("a: &x [1]\nb: [*x, *x]", "line 1: anchors"),
        ("a: [1, 2", "line 1: no YAML"),
        ("\na: 'x", "no YAML"),
        ("a: @x", "line 1: no YAML"),
        ("a: !!python/object/apply:os.system [x]", "line 1: the tag '!!python/object/apply:os.system'"),
        ("a: !!int x", "line 1: the tag '!!int'"),
        ("a: !!set {x}", "line 1: the tag '!!set'"),
        ("? [a]\n: b", "line 1: a key must be a word"),
        ("a: " + "[" * 100, "line 1: more than 32 levels"),
        ("a: " + "9" * 5000, "line 1: the number"),
        ("a: 0x" + "f" * 5000, "line 1: the number"),
        ("a: 1\nb: \x07", "line 2: the character U+0007"),
        ('a: "\\ud800"', "line 1: half a character"),
        ('a: "\\UFFFFFFFF"', "stands for no character"),
        ("%YAML 3.0\n---\na: 1", "line 1: no YAML"),
    ],
)
def test_what_a_recipe_may_not_hold(text, message):
    with pytest.raises(RequestError) as caught:
        parse(text, "r.yaml")
    assert str(caught.value).startswith("r.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["yes", "1e3", "1_0", "0o7", "2024-01-01", "", " a", "a: b", "#", "x\ny", "\x85", "{q}"]
)
def test_texts_survive_readers_of_both_versions(text):
    import yaml

    written = emit({"a": text})
    assert parse(written, "r").value == {"a": text}
    assert yaml.safe_load(written) == {"a": text}


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml: task: missing. Tasks are causal-lm"),
        ("- a", "recipe.yaml: a recipe is a mapping of keys, this is a list"),
        (b"task: \xff", "recipe.yaml, line 1: not UTF-8"),
        (b" " * (2**20 + 1), "larger than 1 MiB"),
        (
            MINIMAL + "schema: 2",
            "recipe.yaml, line 6: schema: a recipe of schema 2; this version of lora-adapters reads 1: pip",
        ),
        (MINIMAL + "schema: '1'", "schema: must be 1, got '1'"),
        (MINIMAL + "schema: true", "schema: must be 1, got true"),
        (
            MINIMAL + "training:\n  learning_rat: 1",
            "line 7: training.learning_rat: unknown key; did you mean 'learning_rate'?",
        ),
        (MINIMAL + "training: {epochs: three}", "line 6: training.epochs: expected a number, got 'three'."),
        (MINIMAL + "training: {batch_size: 1.5}", "training.batch_size: expected a whole number, got 1.5"),
        (MINIMAL + "training: {batch_size: true}", "training.batch_size: expected a whole number, got true"),
        (MINIMAL + "training: {learning_rate: .inf}", "training.learning_rate: expected a finite number, got inf"),
        (MINIMAL + "training: {learning_rate: .nan}", "training.learning_rate: "),
        (MINIMAL + "training: {packing: yes}", "expected true or false, got 'yes'; write true"),
        (
            MINIMAL + "training: {optimizer: adam}",
            "'adam' is none of adamw, adamw_8bit, sgd, adafactor; did you mean 'adamw'?",
        ),
        (
            MINIMAL + "training: {report_to: [tensorbord]}",
            "training.report_to[0]: 'tensorbord' is none of tensorboard, wandb",
        ),
        (MINIMAL + "training: {rank: 3}", "training.rank: unknown key here; 'rank' belongs under 'adapter'"),
        (MINIMAL + "rank: 3", "line 6: rank: unknown key here; 'rank' belongs under 'adapter'"),
        (MINIMAL + "adapter: {output: x}", "'output' belongs at the top"),
        (MINIMAL + "adapter: {lr: 1}", "it is called 'learning_rate' here and belongs under 'training'"),
        (MINIMAL + "adapter: {lora_alpha: 1}", "it is called 'alpha' here."),
        (MINIMAL + "adapter: {rank: 0}", "adapter.rank: must be at least 1, got 0"),
        (MINIMAL + "adapter: {dropout: 1.0}", "adapter.dropout: must be less than 1, got 1.0"),
        (MINIMAL + "adapter: {targets: 3}", "adapter.targets: expected a text, a list or a mapping, got 3"),
        (MINIMAL + "adapter: {targets: [q, 3]}", "adapter.targets[1]: expected a text, got 3"),
        (MINIMAL + "adapter: {targets: {q: x}}", "adapter.targets.q: expected a whole number or a mapping, got 'x'"),
        (MINIMAL + "adapter: {init: 3}", "adapter.init: expected true or false or a text, got 3"),
        (MINIMAL + "adapter:", "line 6: adapter: expected a mapping of keys, got nothing; leave the key out"),
        (MINIMAL + "resume: true\noverwrite: true", "recipe.yaml: resume and overwrite contradict each other"),
        (MINIMAL.replace("output: runs/a\n", ""), "recipe.yaml: output: missing. Folder of the run."),
        (MINIMAL.replace("train: a.jsonl", "limit: 3"), "line 3: data.train: missing. A file (.jsonl"),
        (MINIMAL.replace("runs/a", ""), "line 5: output: expected a text, got nothing.\n"),
        (MINIMAL.replace("model: {name: org/model}\n", ""), "model: missing. It is a section with at least name."),
        (
            MINIMAL.replace("a.jsonl", "a.jsonl\n  text: {a}"),
            "line 5: data.text: expected a text, got a mapping; put a text with br",
        ),
        (
            MINIMAL.replace("a.jsonl", "a.jsonl\n  text: a\n  messages: b"),
            "line 3: data: text and messages are different forms",
        ),
        (MINIMAL.replace("causal-lm", "causal-ml"), "line 1: no task is called 'causal-ml'; did you mean 'causal-lm'?"),
        (MINIMAL.replace("causal-lm", "3"), "line 1: task: expected a text, got 3."),
        (MINIMAL.replace("causal-lm", "xyzzy"), "no task is called 'xyzzy'. There are: causal-lm"),
    ],
)
def test_one_line_says_what_is_wrong(wrong, text, message):
    found = wrong(text)
    assert message in found + "\n"
    assert "\n" not in found


def test_every_problem_is_told_in_the_order_of_the_file(wrong):
    found = wrong(MINIMAL + "traning: {}\nadapter:\n  alpha: big\n  rank: -1\n", "output=3", "model.nme=x").splitlines()
    assert [line.partition(":")[0] for line in found] == [
        "recipe.yaml, line 6",
        "recipe.yaml, line 8",
        "recipe.yaml, line 9",
        "on the command line",
        "on the command line",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training", "'training' is no key=value"),
        ("=3", "is no key=value"),
        ("a..b=3", "is no key=value"),
        ("model.name.x=3", "on the command line: model.name.x: model.name is 'org/model', it has no keys."),
        ("data.train.x=3", "data.train is 'a.jsonl', it has no keys"),
        ("data.train=[a", "on the command line: data.train, line 1: no YAML"),
        ("training.epochs=x", "on the command line: training.epochs: expected a number, got 'x'."),
        ("training.epoch=1", "on the command line: training.epoch: unknown key; did you mean 'epochs'?"),
        ("training={epochs: x}", "on the command line: training.epochs: expected a number"),
    ],
)
def test_an_override_is_blamed_by_name(wrong, override, message):
    assert message in wrong(MINIMAL, override)


def test_a_value_cannot_steer_the_terminal(wrong):
    found = wrong(MINIMAL + '"\\e[31m": 1\noutput2: 1\ntraining: {epochs: "\\e[2J"}')
    assert "\x1b" not in found


def test_a_file_that_is_not_there_names_the_nearest(tmp_path):
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    with pytest.raises(RequestError, match=r"no such file. Did you mean .*recipe.yaml\?"):
        read_recipe(tmp_path / "recpie.yaml")
    with pytest.raises(RequestError, match="is a folder"):
        read_recipe(tmp_path)
    with pytest.raises(RequestError, match="'lora-adapters new'"):
        read_recipe(tmp_path / "none" / "x.yaml")


def test_a_mapping_is_checked_like_a_file():
    good = parse(MINIMAL, "r").value
    assert validate(good).output == "runs/a"
    with pytest.raises(RequestError, match=r"recipe: data\.trian: unknown key; did you mean 'train'\?"):
        validate(good | {"data": {"train": "x", "trian": "y"}})
    with pytest.raises(RequestError, match="a key must be a text"):
        validate(good | {3: 4})
    with pytest.raises(RequestError, match="mapping of keys"):
        validate([1])  # type: ignore[arg-type]


# ---- tasks and plugins -----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_plugins(monkeypatch):
    from lora_adapters.hooks.manager import plugins

    plugins.cache_clear()
    yield monkeypatch
    plugins.cache_clear()


def test_a_task_of_a_plugin_that_is_not_there(wrong):
    found = wrong(MINIMAL.replace("causal-lm", "rl"))
    assert "comes with the plugin 'transformers'" in found
    assert "Ready: causal-lm" in found


def test_a_task_of_a_blocked_plugin(wrong, fresh_plugins):
    fresh_plugins.setenv("LORA_ADAPTERS_DISABLE", "transformers")
    found = wrong(MINIMAL)
    assert "comes with the plugin 'transformers', which is blocked (by LORA_ADAPTERS_DISABLE)" in found


def test_a_task_that_needs_a_package(read, fresh_plugins):
    fresh_plugins.setitem(sys.modules, "datasets", None)
    fresh_plugins.setattr("lora_adapters.hooks.manager.find_spec", lambda name: None if name == "datasets" else name)
    with pytest.raises(MissingDependencyError) as caught:
        read(MINIMAL)
    assert str(caught.value).endswith("line 1: Task 'causal-lm' needs datasets: pip install 'lora-adapters[train]'")


def test_a_plugin_brings_a_task_of_its_own(read, wrong, fresh_plugins):
    from lora_adapters.hooks import hookimpl
    from lora_adapters.hooks.manager import plugins
    from lora_adapters.hooks.specs import TrainerSpec

    class Plugin:
        LORA_ADAPTERS_HOOK_API = 1

        def __init__(self, config):
            self.config = config

        @hookimpl
        def lora_adapters_trainers(self):
            return [TrainerSpec("my-task", "Mine.", self.config, "nowhere:Runner")]

    plugins().register(Plugin("lora_adapters.recipes.sections:Recipe"), "mine")
    assert read(MINIMAL.replace("causal-lm", "my-task")).task == "my-task"
    plugins().unregister("mine")
    for config, message in [("nowhere:Recipe", "No module named"), ("json:JSONDecoder", "is no lora_adapters")]:
        plugins().register(Plugin(config), "mine")
        with pytest.raises(LoraAdaptersError, match=message):
            read(MINIMAL.replace("causal-lm", "my-task"))
        plugins().unregister("mine")

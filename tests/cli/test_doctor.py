"""`lora-adapters doctor` as a shell sees it, here and on machines that lack something."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

PACKAGES = (
    "torch transformers peft accelerate bitsandbytes diffusers timm trl datasets triton liger_kernel safetensors "
    "huggingface_hub"
)
FEATURES = (
    "dense adapters",
    "NF4 on CPU",
    "NF4 on CUDA",
    "INT8 on CPU",
    "INT8 on CUDA",
    "16-bit compute on CPU",
    "16-bit compute on CUDA",
    "transformers' Trainer",
    "TRL",
    "two or more processes",
)


def doctor(*arguments, first="", path="", **environment):
    """Run the command in a process of its own.

    Args:
        first: a folder to put before everything else on the path.
        path: the whole path instead: no other package is found.
    """
    flags = ["-S"] if path else []
    command = [sys.executable, *flags, "-c", "from lora_adapters.cli import main; main()", "doctor", *arguments]
    kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and not k.startswith("LORA_ADAPTERS_")}
    path = path or os.pathsep.join([str(first)] * bool(first) + [entry for entry in sys.path if entry])
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200", **environment},
    )


def facts_of(done):
    facts = json.loads(done.stdout)
    return (
        facts,
        {package["name"]: package for package in facts["versions"]},
        {feature["name"]: feature for feature in facts["features"]},
    )


def lay_out(folder, name, version, *, entry_points="", **modules):
    """Lay out a distribution as an installer does: its metadata, and modules by name."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if entry_points:
        (info / "entry_points.txt").write_text(entry_points)
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)


def without(folder, *names):
    """Return a path of this interpreter's packages, all but some: links to each, with nothing of those named."""
    folders = []
    for number, entry in enumerate(e for e in sys.path if e):
        if not any((Path(entry) / name).exists() for name in names):
            folders.append(entry)
            continue
        (folder / str(number)).mkdir(parents=True)
        for item in Path(entry).iterdir():
            if item.name.partition("-")[0] not in names:
                (folder / str(number) / item.name).symlink_to(item)
        folders.append(str(folder / str(number)))
    return os.pathsep.join(folders)


@pytest.fixture(scope="module")
def here():
    """What the command says of this machine, tried."""
    done = doctor("--json")
    assert done.stderr == ""
    return done, *facts_of(done)


def test_every_fact_is_there(here):
    done, facts, versions, features = here
    assert done.returncode == 0
    assert facts["core_works"] is True
    assert list(versions) == ["python", "platform", "lora_adapters", *PACKAGES.split()]
    assert tuple(features) == FEATURES
    assert facts["environment"] == {"HF_HUB_OFFLINE": "not set"}
    cpu = facts["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["name"]
    assert 0 < cpu["free"] <= cpu["memory"]
    assert cpu["cores"] >= 1
    states = {plugin["name"]: plugin["state"] for plugin in facts["plugins"]}
    assert states["transformers"] == "ready"


def test_versions_are_those_installed_and_ranges_those_we_state(here):
    _, _, versions, _ = here
    stated = {line.partition(">")[0]: line for line in metadata.requires("lora-adapters") or () if ";" not in line}
    for name in PACKAGES.split():
        try:
            expected = metadata.version(name)
        except metadata.PackageNotFoundError:
            expected = "not installed"
        assert versions[name]["version"] == expected
    assert set(versions["torch"]["supported"].split(",")) == {stated["torch"].removeprefix("torch")}
    assert set(versions["transformers"]["supported"].split(",")) == {">=5.17", "<6"}
    extras = {
        name: versions[name]["extra"] for name in ("torch", "transformers", "accelerate", "diffusers", "datasets")
    }
    assert extras == {
        "torch": "",
        "transformers": "transformers",
        "accelerate": "transformers",
        "diffusers": "diffusers",
        "datasets": "train",
    }


def test_what_is_quick_to_try_was_tried_and_works(here):
    _, _, _, features = here
    for name in ("dense adapters", "NF4 on CPU", "INT8 on CPU", "16-bit compute on CPU", "transformers' Trainer"):
        assert features[name]["works"], features[name]
        assert features[name]["tried"]


def test_no_cuda_has_a_reason(here):
    _, facts, _, features = here
    there = any(device["device"].startswith("cuda") for device in facts["devices"])
    for name in ("NF4 on CUDA", "INT8 on CUDA", "16-bit compute on CUDA"):
        assert features[name]["works"] == there, features[name]
        assert there or (features[name]["reason"] and features[name]["what_to_do"])


def test_the_table_for_people_and_no_trials():
    done = doctor("--no-try", HF_HUB_OFFLINE="1", LORA_ADAPTERS_DISABLE="transformers", LORA_ADAPTERS_OTHER="abc123")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row.strip().split("  ")[0]: row for row in done.stdout.splitlines() if row.strip()}
    assert metadata.version("torch") in rows["torch"]
    assert "yes" in rows["dense adapters"].split()
    assert "tried" not in done.stdout
    assert "blocked" in rows["transformers' Trainer"]
    assert rows["HF_HUB_OFFLINE"].split()[-1] == "set"
    assert rows["LORA_ADAPTERS_DISABLE"].split()[-1] == "transformers"
    assert "abc123" not in done.stdout


def test_quiet_says_nothing():
    done = doctor("--quiet", "--no-try")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_package_is_named_with_its_extra(tmp_path):
    done = doctor("--no-try", "--json", path=without(tmp_path, "bitsandbytes"))
    _, versions, features = facts_of(done)
    assert done.returncode == 0
    assert versions["bitsandbytes"]["version"] == "not installed"
    assert versions["bitsandbytes"]["what_to_do"] == "pip install 'lora-adapters[bnb]'"
    assert not features["NF4 on CPU"]["works"]
    assert features["NF4 on CPU"]["what_to_do"] == "pip install 'lora-adapters[bnb]'"
    assert features["dense adapters"]["works"]


def test_without_torch_it_still_reports(tmp_path):
    done = doctor("--json", path=without(tmp_path, "torch"))
    facts, versions, features = facts_of(done)
    assert done.returncode == 1
    assert facts["core_works"] is False
    assert versions["torch"]["version"] == "not installed"
    assert versions["torch"]["what_to_do"].startswith("pip install 'torch>=")
    assert not any(feature["works"] for feature in features.values())
    assert [device["device"] for device in facts["devices"]] == ["cpu"]


def test_versions_out_of_range_are_named(tmp_path):
    """Versions of what the core does not need are no reason to fail."""
    wrong = {"transformers": "4.57.1", "trl": "nightly"}
    for name, version in wrong.items():
        lay_out(tmp_path, name, version)
    done = doctor("--no-try", "--json", first=tmp_path)
    facts, versions, features = facts_of(done)
    assert (done.returncode, facts["core_works"]) == (0, True)
    for name, version in wrong.items():
        assert version in versions[name]["problem"]
    assert versions["transformers"]["what_to_do"] == "pip install 'transformers>=5.17,<6'"
    assert versions["trl"]["what_to_do"] == "pip install 'trl>=1.15'"
    assert not features["transformers' Trainer"]["works"]
    assert "4.57.1 is outside the supported >=5.17,<6" in features["transformers' Trainer"]["reason"]
    assert features["transformers' Trainer"]["what_to_do"] == "pip install 'transformers>=5.17,<6'"


def test_peft_out_of_range_fails_the_check(tmp_path):
    lay_out(tmp_path, "peft", "99.0")
    done = doctor("--no-try", "--json", first=tmp_path)
    facts, versions, features = facts_of(done)
    assert (done.returncode, facts["core_works"]) == (1, False)
    assert versions["peft"]["what_to_do"] == "pip install 'peft>=0.21,<0.23'"
    assert "99.0" in features["dense adapters"]["reason"]


def test_a_package_that_fails_when_tried_is_told_by_its_error(tmp_path):
    lay_out(tmp_path, "bitsandbytes", "0.50.9", bitsandbytes="raise OSError('libcudart is broken\\nsecond line')")
    done = doctor("--json", first=tmp_path)
    _, versions, features = facts_of(done)
    assert versions["bitsandbytes"]["problem"] == ""
    assert not features["NF4 on CPU"]["works"]
    assert features["NF4 on CPU"]["tried"]
    assert "libcudart is broken" in features["NF4 on CPU"]["reason"]
    assert "second line" not in done.stdout


def test_nothing_private_is_printed(tmp_path):
    """A plugin that fails puts everything private into its message; none of it may come out."""
    home = tmp_path / "home" / "jane doe"
    home.mkdir(parents=True)
    leak = (
        "import os, pathlib, platform\n"
        'raise RuntimeError(f\'{os.environ["HF_TOKEN"]} {pathlib.Path.home()}/data/x.json {os.environ["USER"]} \'\n'
        "    f'hf_abcdefghij https://me:pw123@models.example/private?sig=42 /srv/patients/list.csv {platform.node()}.')\n"
    )
    lay_out(
        tmp_path / "site", "leaky", "1.0", entry_points="[lora_adapters]\nleaky = leaky_plugin\n", leaky_plugin=leak
    )
    secrets = {"HF_TOKEN": "hf_secret", "WANDB_API_KEY": "k3y-of-mine", "HOME": str(home)}
    secrets |= {"USER": "janedoe", "LOGNAME": "janedoe"}
    done = doctor("--no-try", first=tmp_path / "site", HF_HOME=str(home / "cache"), **secrets)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "leaky" in said
    assert "broken" in said
    for private in ("hf_secret", "k3y", "jane", "hf_abc", "pw123", "sig=42", "patients", str(tmp_path), "/site"):
        assert private not in said, private
    assert "models.example" in said, "the message itself should be told"
    assert not platform.node() or len(platform.node()) < 4 or platform.node() not in said


def test_a_failing_plugin_under_strict_is_a_fact_not_a_crash(tmp_path):
    lay_out(
        tmp_path, "bad", "1.0", entry_points="[lora_adapters]\nbad = bad_plugin\n", bad_plugin="raise ValueError('no')"
    )
    done = doctor("--json", first=tmp_path, LORA_ADAPTERS_STRICT="1")
    facts, _, features = facts_of(done)
    assert done.returncode == 1
    assert "bad" in facts["plugins"][0]["detail"]
    assert not features["dense adapters"]["works"]
    assert "PluginError" in features["dense adapters"]["reason"]


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom lora_adapters.cli import cli\n"
        "try:\n    cli.main(['doctor', '--help'])\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "assert 'torch' not in sys.modules and 'lora_adapters.doctor.trials' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--no-try" in done.stdout

"""`lora-adapters push` as a shell sees it, against a small Hub on this machine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import llama
from helpers import run_cli as run
from hub_server import running

import lora_adapters as la
from lora_adapters.errors import CheckpointError, RequestError
from lora_adapters.hub import plan_upload


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter whose base is on the Hub, with a card and a tokenizer."""
    model = llama()
    model.name_or_path = "org/base"
    folder = la.attach(model, rank=2).save(tmp_path_factory.mktemp("saved") / "adapter")
    (folder / "README.md").write_text("---\nbase_model: org/base\nlibrary_name: peft\n---\n# An adapter: é\n")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """The same with things beside it that are nobody's business."""
    path = tmp_path / "adapter"
    shutil.copytree(saved, path)
    for name in ("training_args.bin", "optimizer.pt", "notes.txt", ".env"):
        (path / name).write_bytes(b"secret")
    (path / "checkpoint-3").mkdir()
    (path / "checkpoint-3" / "adapter_model.safetensors").write_bytes(b"secret")
    (path / "vocab.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").write_text("secret")
    return path


GOES_UP = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]


@pytest.fixture
def hub():
    with running() as started:
        yield started


def to(hub_or_url, **more):
    """Code that points a process at a Hub."""
    url = hub_or_url if isinstance(hub_or_url, str) else hub_or_url.url
    settings = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_dummy", "HF_HUB_DISABLE_XET": "1"} | more
    return f"import os; os.environ.pop('HF_HUB_OFFLINE', None); os.environ.update({settings!r}); "


def test_what_arrives_is_the_adapter_and_nothing_else(folder, hub, tmp_path):
    done = run("push", str(folder), "me/mine", "--private", "--message", "First", before=to(hub))
    assert done.returncode == 0, done.stderr
    arrived = hub.files["me/mine@main"]
    assert sorted(arrived) == GOES_UP
    assert all(content == (folder / name).read_bytes() for name, content in arrived.items())
    assert f"{hub.url}/me/mine/commit/c0ffee" in done.stdout
    assert "training_args.bin" in done.stdout
    assert hub.summaries == ["First"]
    assert hub.tokens == {"Bearer hf_dummy"}
    (created,) = hub.created
    assert created.get("private") is True or created.get("visibility") == "private"
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in arrived.items():
        (copy / name).write_bytes(content)
    la.restore(llama(), copy)


def test_a_branch_of_a_run_folder_as_facts(saved, hub, tmp_path):
    shutil.copytree(saved, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "facts.json").write_text("{}")
    done = run("push", str(tmp_path / "run"), "me/mine", "--revision", "v1", "--json", before=to(hub))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["commit"] == f"{hub.url}/me/mine/commit/c0ffee"
    assert [one["name"] for one in facts["files"]] == GOES_UP
    assert facts["warnings"] == facts["left_out"] == []
    assert "POST /api/models/me/mine/branch/v1" in hub.requests
    assert sorted(hub.files["me/mine@v1"]) == GOES_UP
    assert "private" not in hub.created[0]


def test_a_dry_run_contacts_nobody_and_imports_no_torch(folder, hub):
    code = to(hub, HF_HUB_OFFLINE="1", HF_TOKEN="") + "import sys; sys.modules['torch'] = None; "
    done = run("push", str(folder), "me/mine", "--dry-run", before=code)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.requests == []
    rows = [line.split() for line in done.stdout.splitlines() if line.split()]
    assert [row[0] for row in rows if row[0] in GOES_UP] == GOES_UP
    reasons = {row[0]: " ".join(row[1:]) for row in rows}
    assert "pickle" in reasons["optimizer.pt"]
    assert "pickle" in reasons["training_args.bin"]
    assert reasons["checkpoint-3"] == "a folder"
    assert reasons["vocab.json"] == "a link out of the folder"
    assert reasons[".env"] == reasons["notes.txt"] == "no part of an adapter"
    assert "Nothing was uploaded" in done.stdout
    facts = json.loads(run("push", str(folder), "me/mine", "--dry-run", "--json", before=code).stdout)
    assert facts["commit"] is None
    assert {one["name"]: one["bytes"] for one in facts["files"]} == {n: (folder / n).stat().st_size for n in GOES_UP}


def test_what_keeps_others_from_using_it_is_said(folder):
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, words in [
        (str(folder), "path of this machine"),
        ("./models/x", "path of this machine"),
        (None, "names no base"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        warnings = plan_upload(folder).warnings
        assert words in warnings[0]
        assert "no model card" in warnings[1]
    done = run("push", str(folder), "me/mine", "--dry-run", "--quiet")
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.count("Warning: ") == 2


def test_a_damaged_adapter_is_refused_before_anything_is_sent(folder, hub):
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = run("push", str(folder), "me/mine", before=to(hub))
    assert done.returncode == 1
    assert "digest mismatch" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr
    weights.write_bytes(content[:-5])
    done = run("push", str(folder), "me/mine", "--dry-run", before=to(hub))
    assert done.returncode == 1
    assert "is damaged" in done.stderr
    assert hub.requests == []


def test_an_interrupted_save_and_a_folder_without_an_adapter(folder):
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        plan_upload(folder.parent.parent)
    stage = folder / ".lora_adapters-saving-1"
    stage.mkdir()
    shutil.copy(folder / "adapter_config.json", stage)
    with pytest.raises(CheckpointError, match="was interrupted"):
        plan_upload(folder)


def test_what_the_hub_refuses_is_one_line(saved, hub):
    """Four refusals in one process, which imports torch once."""
    code = to(hub) + (
        "import sys; from lora_adapters.cli import cli\n"
        "for status in (401, 403, 404, 400):\n"
        "    try: cli(['push', sys.argv[1], f'me/refuse-{status}', '--quiet'], standalone_mode=False)\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], check=False, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    words = ["hf auth login", "may not write to me/refuse-403", "knows no me/refuse-404", "(status 400): "]
    assert len(lines) == len(words)
    assert all(line.startswith("HubError ") and word in line for line, word in zip(lines, words, strict=True))
    assert hub.files == {}


def test_no_network_and_offline_are_one_line(saved):
    with running() as gone:
        pass
    done = run("push", str(saved), "me/mine", "--quiet", before=to(gone.url))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The Hub can't be reached (")
    assert done.stderr.count("\n") == 1
    done = run("push", str(saved), "me/mine", "--quiet", before=to(gone.url, HF_HUB_OFFLINE="1"))
    assert done.stderr == "Error: HF_HUB_OFFLINE is set, so the Hub is not contacted: unset it, then push again.\n"


@pytest.mark.parametrize("name", ["a/b/c", "me/-x", "a b", "me/x.git"])
def test_an_impossible_repository_name(saved, name):
    done = run("push", str(saved), name, "--dry-run")
    assert done.returncode == 1
    assert "Give 'name/repo'." in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_attached_adapter_goes_up_the_same_way(hub):
    code = to(hub) + (
        "import sys; sys.path.insert(0, sys.argv[1]); from helpers import llama; import lora_adapters as la; "
        "print(la.attach(llama(), rank=2).push_to_hub('me/attached', commit_message='Second'))"
    )
    tests = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, tests], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/attached/commit/c0ffee"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files["me/attached@main"])
    assert hub.summaries == ["Second"]


def test_the_name_is_checked_before_anything_else(tmp_path):
    from lora_adapters.hub import check_repo_id

    with pytest.raises(RequestError):
        check_repo_id("a/b/c")

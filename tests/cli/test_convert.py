"""`lora-adapters convert`, and `inspect` on what it reads and writes."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from format_models import loha, lora, same, values
from helpers import run_cli
from safetensors.torch import load_file, save_file

import lora_adapters as la
from lora_adapters import cli, formats
from lora_adapters.errors import CheckpointError, RequestError
from lora_adapters.formats import PortableAdapter

NAME = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def adapter():
    modules = {NAME: lora((24, 768), 2, 3.0), "up_blocks.1.upsamplers.0.conv": lora((24, 16, 3, 3), 4, 1.0)}
    text = {"text_model.encoder.layers.0.self_attn.q_proj": lora((16, 16), 2, 3.0)}
    return PortableAdapter({"unet": modules, "text_encoder": text}, "sd1")


def here(*arguments):
    """Run a command in this process."""
    return CliRunner().invoke(cli.cli, [*map(str, arguments)])


def facts_of(*arguments):
    done = here(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_every_format_into_every_other_and_back(tmp_path, adapter):
    formats.write(adapter, tmp_path / "first.safetensors", "kohya")
    names = ("kohya", "peft", "diffusers", "lycoris")
    for one in names:
        for other in names:
            ends = ["" if to == "peft" else ".safetensors" for to in (one, other)]
            made = [tmp_path / f"{one}-{other}-{step}{end}" for step, end in enumerate(ends)]
            la.convert(tmp_path / "first.safetensors", made[0], one)
            assert la.convert(made[0], made[1], other).notes == ()
            same(adapter, formats.read(made[1]))


def test_the_command_says_what_it_did(tmp_path, adapter):
    formats.write(adapter, tmp_path / "a.safetensors", "kohya")
    done = run_cli("convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b"), "--to", "diffusers")
    assert done.returncode == 0, done.stderr
    assert "(kohya)" in done.stdout
    assert f"{tmp_path / 'b.safetensors'} (diffusers)" in done.stdout
    assert "Everything is as it was." in done.stdout
    facts = facts_of("convert", tmp_path / "b.safetensors", tmp_path / "c", "--to", "peft")
    assert facts["layers"] == {"unet": 2, "text_encoder": 1}
    assert facts["family"] == "sd1"


def test_what_is_not_as_it_was_is_said(tmp_path):
    formats.write(PortableAdapter({"unet": {NAME: loha((24, 768))}}, "sd1"), tmp_path / "a.safetensors", "lycoris")
    done = here("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "kohya")
    assert "Not as it was" in done.output
    assert "rank 3 to 9" in done.output
    facts = facts_of(
        "convert", tmp_path / "a.safetensors", tmp_path / "c.safetensors", "--to", "kohya", "--max-rank", "4"
    )
    assert "were cut to rank 4: |lost| / |update| is 0." in facts["notes"][0]
    assert formats.read(tmp_path / "c.safetensors").components["unet"][NAME].rank == 4


def test_nothing_is_replaced_without_being_asked(tmp_path, adapter):
    formats.write(adapter, tmp_path / "a.safetensors", "kohya")
    (tmp_path / "b.safetensors").write_bytes(b"mine")
    with pytest.raises(RequestError, match="exists"):
        la.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    assert (tmp_path / "b.safetensors").read_bytes() == b"mine"
    la.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", overwrite=True)
    same(adapter, formats.read(tmp_path / "b.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_failed_write_leaves_what_was_there(tmp_path, adapter, monkeypatch):
    formats.write(adapter, tmp_path / "a.safetensors", "kohya")
    before = (tmp_path / "a.safetensors").read_bytes()
    broken = PortableAdapter({"unet": {NAME: replace(lora((24, 768)), b=torch.full((24, 4), torch.nan))}}, "sd1")
    with pytest.raises(CheckpointError, match="not written"):
        formats.write(broken, tmp_path / "a.safetensors", "kohya")
    assert (tmp_path / "a.safetensors").read_bytes() == before

    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        formats.write(adapter, tmp_path / "a.safetensors", "kohya")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_wrong_arguments(tmp_path, adapter):
    formats.write(adapter, tmp_path / "a.safetensors", "kohya")
    for options, said in (
        (dict(to="koya"), "no format 'koya'"),
        (dict(to="kohya", family="sd7"), "no family"),
        (dict(to="kohya", max_rank=0), "max_rank"),
        (dict(to="kohya", format="peft"), "not of the format"),
    ):
        with pytest.raises(RequestError, match=said):
            la.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
    tiny = PortableAdapter({"unet": {"mid_block.resnets.0.conv1": lora((4, 4, 3, 3))}})
    formats.write(tiny, tmp_path / "tiny.safetensors")
    with pytest.raises(RequestError, match="Give family="):
        la.convert(tmp_path / "tiny.safetensors", tmp_path / "b.safetensors", "kohya")
    la.convert(tmp_path / "tiny.safetensors", tmp_path / "b.safetensors", "kohya", family="sdxl")
    assert "lora_unet_middle_block_0_in_layers_2.alpha" in load_file(tmp_path / "b.safetensors")


# ---- inspect ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["kohya", "peft", "diffusers"])
def test_inspect_knows_them(tmp_path, adapter, format):
    place = tmp_path / ("it" if format == "peft" else "it.safetensors")
    formats.write(adapter, place, format)
    facts = facts_of("inspect", place, "--verify")
    assert facts["format"] == format
    assert facts["layers"] == 3
    assert facts["written_by"].startswith("lora_adapters ") or format == "peft"
    assert facts["dtypes"] == {"F32": facts["values"]}
    groups = {group["name"]: group for group in facts["groups"]}
    assert groups["unet: to_k"]["scalings"] == [1.5]
    assert groups["unet: conv"]["kind"] == "conv2d"
    assert groups["text_encoder: q_proj"]["ranks"] == [2]
    norm = max(factors.update().norm().item() for _, _, factors in adapter)
    assert facts["norms"]["max"] == pytest.approx(norm, rel=1e-6)
    assert "values: finite" in facts["checks"]
    done = here("inspect", place)
    assert "scaling" in done.output


def test_inspect_says_where_a_file_loads(tmp_path, adapter):
    formats.write(adapter, tmp_path / "kohya.safetensors", "kohya")
    formats.write(adapter, tmp_path / "diffusers.safetensors", "diffusers")
    done = here("inspect", tmp_path / "kohya.safetensors", "--for", "comfyui")
    assert done.exit_code == 0
    done = here("inspect", tmp_path / "diffusers.safetensors", "--for", "diffusers")
    assert done.exit_code == 0, done.output
    done = here("inspect", tmp_path / "diffusers.safetensors", "--for", "comfyui", "--json")
    assert done.exit_code == 1
    assert "at scale 1 instead of 0.25, 1.5" in json.loads(done.stdout)["for"]["comfyui"]["reasons"][0]
    for target in ("peft", "vllm", "timm"):
        assert here("inspect", tmp_path / "kohya.safetensors", "--for", target).exit_code == 1


def test_inspect_on_a_damaged_file_and_with_a_base(tmp_path):
    save_file({"lora_unet_nowhere.lora_down.weight": values(2, 2)}, tmp_path / "it.safetensors")
    done = here("inspect", tmp_path / "it.safetensors")
    assert isinstance(done.exception, la.LoraAdaptersError)
    assert "lora_unet_nowhere" in str(done.exception)
    done = here("inspect", tmp_path / "it.safetensors", "--base", "model")
    assert "no PEFT folder" in str(done.exception)

"""Folders that stock PEFT's LoHa and LoKr models save mean what PEFT computes, exactly."""

import json

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import lora_adapters as la
from lora_adapters import cli, formats
from lora_adapters.errors import CheckpointError, UnsupportedError


class Mid(nn.Module):
    """The ends of names of a UNet's layers, of every kind."""

    def __init__(self):
        super().__init__()
        self.mid_block = nn.ModuleDict(
            {
                "resnets": nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(16, 24, 3)})]),
                "attentions": nn.ModuleList(
                    [nn.ModuleDict({"proj_in": nn.Linear(24, 16), "proj_out": nn.Linear(16, 24)})]
                ),
            }
        )


TARGETS = ["conv1", "proj_in", "proj_out"]
CASES = {
    "LoHa": peft.LoHaConfig(r=2, alpha=3),
    "LoHa, ranks and alphas": peft.LoHaConfig(r=2, alpha=3, rank_pattern={"conv1": 4}, alpha_pattern={"proj_.*": 5}),
    "LoHa, cores": peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=1, alpha=3),
    "LoKr, whole factors": peft.LoKrConfig(r=60, alpha=20),
    "LoKr, cores": peft.LoKrConfig(r=1, alpha=3, use_effective_conv2d=True),
    "LoKr, products": peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4, module_dropout=0.1),
}


def saved(tmp_path, config, name="unet"):
    torch.manual_seed(0)
    config.target_modules, config.init_weights = TARGETS, False
    model = peft.get_peft_model(Mid(), config)
    model.save_pretrained(tmp_path / name)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    return tmp_path / name, {n: layer.get_delta_weight("default").detach().double() for n, layer in layers.items()}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_they_are_read_as_peft_computes(tmp_path, config):
    folder, updates = saved(tmp_path, config)
    for place in (folder, tmp_path):
        adapter = formats.read(place)
        assert adapter.kinds[0] == ("LoHa" if config.peft_type == peft.PeftType.LOHA else "LoKr")
        modules = adapter.components["unet"]
        assert set(modules) == set(updates)
        for name, wanted in updates.items():
            found = modules[name].update()
            assert found.shape == wanted.shape
            assert (found - wanted).norm() <= 1e-6 * wanted.norm(), name
    made = la.convert(folder, tmp_path / "lycoris.safetensors", "lycoris", family="sdxl")
    assert bool(made.notes) == (config.r == 60)  # alpha / r of whole factors goes into w1
    back = formats.read(tmp_path / "lycoris.safetensors").components["unet"]
    assert all(torch.allclose(back[name].update(), modules[name].update(), rtol=0, atol=1e-12) for name in modules)


def test_the_commands_know_them(tmp_path):
    folder, _ = saved(tmp_path, peft.LoHaConfig(r=2, alpha=3))

    def run(*arguments):
        return CliRunner().invoke(cli.cli, [*map(str, arguments), "--json"])

    facts = json.loads(run("inspect", folder).stdout)
    assert (facts["peft_type"], facts["layers"]) == ("LoHa", 3)
    done = run("convert", folder, tmp_path / "out.safetensors", "--to", "diffusers", "--max-rank", 2)
    notes = " ".join(json.loads(done.stdout)["notes"])
    assert "cut to rank 2" in notes


def test_what_does_not_fit_is_an_error(tmp_path):
    folder, _ = saved(tmp_path, peft.LoHaConfig(r=2, alpha=3))
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    right, tensors = json.loads(config.read_text()), load_file(weights)
    for change, error, said in (
        ({"r": 3}, CheckpointError, "rank 2, but its config says 3"),
        ({"peft_type": "LOKR"}, CheckpointError, "is LoHa, and its config describes LoKr"),
        ({"peft_type": "OFT"}, UnsupportedError, "'OFT'"),
        ({"alpha": "much"}, CheckpointError, "lora_alpha must be"),
        ({"new_field": 1}, CheckpointError, "unknown field"),
    ):
        config.write_text(json.dumps(right | change))
        with pytest.raises(error, match=said):
            formats.read(folder)
    config.write_text(json.dumps(right))
    save_file(tensors | {"base_model.model.conv_out.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(UnsupportedError, match=r"conv_out\.weight"):
        formats.read(folder)

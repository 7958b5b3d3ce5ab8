"""What TimmLoraModel saves: a PEFT checkpoint that stock PEFT loads, merged folders that timm loads, state dicts."""

import copy
import json

import pytest
import timm
import torch
from lora_adapters_timm import TimmLoraModel
from lora_adapters_timm.facts import Facts
from peft import PeftModel
from safetensors.torch import load_file, save_file
from timm_models import FAMILIES, RESNET, VIT, images, lora, plain, trained

from lora_adapters.checkpoint import inspect_adapter
from lora_adapters.errors import CheckpointError, RequestError


@pytest.mark.parametrize("which", [VIT, RESNET], ids=lambda w: w[0])
def test_stock_peft_loads_what_is_saved(which, tmp_path):
    model, x = trained(lora(which, norm="eval")), images(which)
    folder = model.save(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(plain(which), folder).eval()
    torch.testing.assert_close(stock(x), model(x), rtol=1e-4, atol=1e-5)
    again = TimmLoraModel.from_pretrained(folder, plain(which)).eval()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("norm", ["train", "affine"])
def test_statistics_that_training_changed_are_saved(norm, tmp_path):
    model = lora(RESNET, norm=norm).train()
    for seed in range(3):
        model(images(RESNET, 4, seed) * 3 + 1).sum().backward()
    trained(model.eval())
    folder = model.save(tmp_path / "adapter")
    again = TimmLoraModel.from_pretrained(folder, plain(RESNET)).eval()
    assert torch.equal(again(images(RESNET)), model(images(RESNET)))
    merged = model.save_merged(tmp_path / "merged")
    loaded = timm.create_model("test_resnet", num_classes=5, checkpoint_path=merged / "model.safetensors").eval()
    torch.testing.assert_close(loaded(images(RESNET)), model(images(RESNET)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", FAMILIES, ids=lambda w: w[0])
def test_timm_loads_the_merged_model(which, tmp_path):
    name, arguments = which
    model, x = trained(lora(which)), images(which)
    with torch.no_grad():
        expected = model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folder = model.save_merged(tmp_path / "merged")
    assert set(load_file(folder / "model.safetensors")) == set(plain(which).state_dict())
    loaded = timm.create_model(name, num_classes=5, checkpoint_path=folder / "model.safetensors", **arguments).eval()
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(by_folder(x), loaded(x))
        assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # The folder is a base again, whose weights are read without being asked for.
    again = TimmLoraModel(str(folder), rank=2).eval()
    torch.testing.assert_close(again(x), loaded(x), rtol=1e-5, atol=1e-5)  # an adapter's layers may round otherwise


@pytest.mark.parametrize("which", [VIT, RESNET], ids=lambda w: w[0])
def test_a_4_bit_base_is_merged_into_dense_weights(which, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, x = trained(lora(which, quantization="nf4", targets="auto")), images(which)
    assert model.adapter.plan.quantize
    with torch.no_grad():
        expected = model(x)
    folder = model.save_merged(tmp_path / "merged")
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for key, value in weights.items() if key.endswith("weight")} == {torch.float32}
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=1e-3, atol=1e-4)


def test_a_merged_and_an_unloaded_model_are_written_alike(tmp_path):
    model = trained(lora())
    first = load_file(model.save_merged(tmp_path / "one") / "model.safetensors")
    model.merge()
    second = load_file(model.save_merged(tmp_path / "two") / "model.safetensors")
    model.merge(unload=True)
    third = load_file(model.save_merged(tmp_path / "three") / "model.safetensors")
    assert first.keys() == second.keys() == third.keys()
    assert all(torch.equal(first[k], second[k]) and torch.equal(first[k], third[k]) for k in first)
    with pytest.raises(RequestError, match="is there already"):
        model.save_merged(tmp_path / "one")


def test_features_only_backbones_are_saved_and_merged(tmp_path):
    model, x = trained(lora(RESNET, None, features_only=True)), images(RESNET)
    folder = model.save(tmp_path / "adapter")
    torch.manual_seed(0)
    again = TimmLoraModel.from_pretrained(folder, timm.create_model("test_resnet", features_only=True)).eval()
    assert all(torch.equal(a, b) for a, b in zip(again(x), model(x), strict=True))
    merged = model.save_merged(tmp_path / "merged")
    loaded = timm.create_model("test_resnet", features_only=True, checkpoint_path=merged / "model.safetensors").eval()
    for a, b in zip(loaded(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- building the model again ----------------------------------------------------------------------------------------


def base_folder(tmp_path, which=VIT):
    base = plain(which, 4)
    timm.models.save_for_hf(base, tmp_path / "base", safe_serialization=True)
    return tmp_path / "base", base


def test_the_model_is_built_again_from_the_adapter_alone(tmp_path):
    folder, base = base_folder(tmp_path)
    model = trained(TimmLoraModel(str(folder), num_classes=6, rank=2).eval())
    assert torch.equal(model.base.patch_embed.proj.weight, base.patch_embed.proj.weight)
    saved = model.save(tmp_path / "adapter")
    assert inspect_adapter(saved).config.get("base_model_name_or_path") == str(folder)
    again = TimmLoraModel.from_pretrained(saved).eval()
    assert torch.equal(again(images()), model(images()))
    nf4 = TimmLoraModel.from_pretrained(saved, quantization="nf4").eval()
    assert nf4.get_submodule("blocks.0.mlp.fc1").get_base_layer().weight.dtype == torch.uint8
    assert (nf4(images()) - model(images())).norm() < 0.3 * model(images()).norm()


def test_a_file_of_weights_is_a_base(tmp_path):
    base = plain()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    model = trained(TimmLoraModel(base, rank=2).eval())
    saved = model.save(tmp_path / "adapter")
    again = TimmLoraModel.from_pretrained(saved, str(tmp_path / "base.safetensors")).eval()
    assert torch.equal(again(images()), model(images()))
    with pytest.raises(CheckpointError, match=r"does not say which base.*checkpoint="):
        TimmLoraModel.from_pretrained(saved)


def test_the_file_says_how_the_model_was_made(tmp_path):
    saved = lora(norm="eval", drop_path_rate=0.1).save(tmp_path / "adapter")
    known = Facts.read(inspect_adapter(saved).metadata)
    assert known.architecture.partition(".")[0] == VIT[0]
    assert known.arguments == {**VIT[1], "num_classes": 5, "drop_path_rate": 0.1}


@pytest.mark.parametrize(
    "entry",
    [
        {"timm.arguments": "[1]"},
        {"timm.arguments": '{"checkpoint_path": "/etc/passwd"}'},
        {"timm.arguments": '{"pretrained_cfg": {"url": "http://x"}}'},
        {"timm.arguments": '{"depth": {"a": 1}}'},
        {"timm.arguments": "{" * 10},
        {"timm.architecture": "../../somewhere"},
    ],
)
def test_what_a_file_says_is_not_trusted(entry):
    with pytest.raises(CheckpointError):
        Facts.read({"timm.architecture": "resnet50", "timm.arguments": "{}", **entry})


def test_arguments_that_are_no_values_are_not_kept():
    model = timm.create_model("test_resnet", norm_layer=torch.nn.BatchNorm2d)
    assert Facts.of(model).entries() == {}
    assert json.loads(Facts.of(plain()).entries()["timm.arguments"])["depth"] == 3


# ---- state dicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [VIT, RESNET, FAMILIES[5]], ids=lambda w: w[0])
def test_a_state_dict_is_loaded_exactly(which):
    model = trained(lora(which))
    state = copy.deepcopy(model.state_dict())
    other = lora(which, seed=4)
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    assert torch.equal(other(images(which)), model(images(which)))


def test_a_plain_checkpoint_of_timm_is_loaded(tmp_path):
    base = plain(seed=7)
    torch.save({"state_dict": base.state_dict()}, tmp_path / "base.pth")
    model = trained(lora())
    factors = {k: v.clone() for k, v in model.state_dict().items() if ".lora_" in k}
    timm.models.load_checkpoint(model, str(tmp_path / "base.pth"))
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    assert all(torch.equal(state[key], value) for key, value in factors.items())
    with model.adapter.disabled():
        torch.testing.assert_close(model(images()), base(images()))


def test_what_does_not_fit_is_refused():
    model = lora()
    state = copy.deepcopy(model.state_dict())
    for broken in (
        {k: v for k, v in state.items() if k != "blocks.0.attn.qkv.lora_A.default.weight"},
        {k: v for k, v in state.items() if k != "norm.weight"},
        {**state, "strange": torch.zeros(1)},
    ):
        with pytest.raises(RuntimeError, match="state_dict"):
            model.load_state_dict(broken)
    result = model.load_state_dict({**state, "strange": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["strange"]


@pytest.mark.parametrize("which", [VIT, RESNET], ids=lambda w: w[0])
def test_state_dicts_of_a_4_bit_base(which):
    pytest.importorskip("bitsandbytes")
    model = trained(lora(which, quantization="nf4"))
    state = copy.deepcopy(model.state_dict())
    other = lora(which, quantization="nf4")  # the same base, another adapter
    other.load_state_dict(state)
    assert torch.equal(other(images(which)), model(images(which)))
    strange = lora(which, quantization="nf4", seed=5)
    before = copy.deepcopy(strange.state_dict())
    for given in (state, plain(which).state_dict()):
        with pytest.raises(CheckpointError, match="before it is quantized"):
            strange.load_state_dict(given)
    assert all(torch.equal(value, before[key]) for key, value in strange.state_dict().items())


def test_inside_another_module():
    model = trained(lora())
    around = torch.nn.Sequential(model)
    state = copy.deepcopy(around.state_dict())
    assert [key.removeprefix("0.") for key in state] == list(model.state_dict())
    other = torch.nn.Sequential(lora(seed=4))
    other.load_state_dict(state)
    assert torch.equal(other(images()), around(images()))

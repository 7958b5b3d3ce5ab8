"""The base that a recipe names: found, sized, started from a file, or refused with what to do."""

import pytest
import timm
import torch
from lora_adapters_timm.recipes import ImageData, ImageModel
from lora_adapters_timm.training.base_model import (
    build,
    check_takes,
    data_config,
    note_size,
    set_checkpointing,
    skeleton,
    source_of,
)
from pictures import TINY_VIT

from lora_adapters.errors import LoraAdaptersError, RequestError, UnsupportedError

DATA = ImageData(train="x")


def section(**changes):
    return ImageModel(**{**TINY_VIT, **changes})


def test_a_model_of_one_size_is_made_for_the_images():
    model = section()
    meta = skeleton(model, 16, 3)
    assert model.timm_kwargs["img_size"] == 16  # what every later building takes
    assert meta.patch_embed.img_size == (16, 16)
    assert all(p.device.type == "meta" for p in meta.parameters())
    config = data_config(meta, model, ImageData(train="x", image_size=16))
    assert config["input_size"] == (3, 16, 16)
    check_takes(meta, config)
    note_size(meta, config)
    assert meta.pretrained_cfg["input_size"] == (3, 16, 16)
    real = build(model, 3)
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in meta.named_parameters()}
    assert real(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_a_model_of_every_size_is_left_alone():
    model = ImageModel(name="test_resnet", pretrained=False)
    meta = skeleton(model, 24, 3)
    assert model.timm_kwargs == {}
    check_takes(meta, data_config(meta, model, ImageData(train="x", image_size=24)))


def test_a_size_that_the_model_does_not_take_is_refused():
    model = section(timm_kwargs={**TINY_VIT["timm_kwargs"], "img_size": 16})
    meta = skeleton(model, None, 3)
    config = {**data_config(meta, model, DATA), "input_size": (3, 20, 20)}
    with pytest.raises(RequestError, match=r"data\.image_size: VisionTransformer does not take images of 20 x 20"):
        check_takes(meta, config)


def test_grey_images_have_the_mean_of_the_colours():
    model = ImageModel(name="test_resnet", pretrained=False, timm_kwargs={"in_chans": 1})
    config = data_config(skeleton(model, None, 2), model, ImageData(train="x", crop=0.8))
    assert config["input_size"][0] == 1
    assert len(config["mean"]) == len(config["std"]) == 1
    assert config["crop_pct"] == 0.8


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_gives_the_weights_but_for_the_classifier(tmp_path, suffix):
    options = {**TINY_VIT["timm_kwargs"], "img_size": 16}
    torch.manual_seed(0)
    first = timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(first.state_dict(), file)
    else:
        from safetensors.torch import save_file

        save_file(first.state_dict(), file)
    torch.manual_seed(1)
    model = build(section(pretrained=True, checkpoint=str(file), timm_kwargs=options), 3)
    old = first.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, old[name]) != name.startswith("head."), name
    assert model.num_classes == 3


def test_a_folder_of_timms_is_a_model(tmp_path):
    options = {**TINY_VIT["timm_kwargs"], "img_size": 16}
    first = timm.create_model("vit_tiny_patch16_224", num_classes=3, **options)
    timm.models.save_for_hf(first, tmp_path, model_args=options)
    named = ImageModel(name=str(tmp_path))
    assert source_of(named) == f"local-dir:{tmp_path}"
    made = build(named, 3)
    assert torch.equal(made.head.weight, first.head.weight)
    assert skeleton(named, None, 4).head.weight.shape == (4, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "vit_tiny_patch16_225"},
            "timm has no model 'vit_tiny_patch16_225'.*Did you mean 'vit_tiny_patch16_2",
        ),
        ({"name": "/no/such/folder"}, "there is no such folder"),
        ({"name": "/"}, "it holds no config.json"),
        ({"pretrained": True, "checkpoint": "no.pth"}, "model.checkpoint: there is no file"),
        ({"revision": "main"}, "model: Only models of the Hub"),
    ],
)
def test_what_is_not_there_is_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        source_of(section(**changes))


def test_names_of_the_hub_keep_their_revision():
    assert source_of(ImageModel(name="hf-hub:a/b", revision="v1")) == "hf-hub:a/b@v1"


def test_arguments_that_the_model_does_not_take_are_refused():
    with pytest.raises(RequestError, match=r"model: vit_tiny_patch16_224 does not take an argument.*no_such"):
        skeleton(section(timm_kwargs={"no_such": 3}), None, 2)


def test_weights_that_cannot_be_had_say_what_to_do(tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    for changes in ({"checkpoint": str(tmp_path / "bad.pth")}, {}):
        with pytest.raises(LoraAdaptersError, match=r"can't be had.*pretrained=False") as caught:
            build(section(pretrained=True, **changes), 2)
        assert "\n" not in str(caught.value)


def test_checkpointing():
    model = skeleton(section(), 16, 2)
    set_checkpointing(model)
    assert model.grad_checkpointing
    without = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match="has no gradient checkpointing"):
        set_checkpointing(without)

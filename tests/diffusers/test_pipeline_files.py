"""What LoraPipeline saves and loads gives the same image in a stock pipeline, where stock diffusers' own way may not."""

from __future__ import annotations

import diffusers
import pytest
import torch
from lora_adapters_diffusers import LoraPipeline
from safetensors.torch import load_file, save_file

from lora_adapters.errors import CheckpointError, LoraAdaptersWarning, UnsupportedError


@pytest.mark.parametrize(
    "options", [dict(alpha=2, use_rslora=True), dict(targets={"attention": 4, "conv": 2}, alpha=3)]
)
def test_every_scale_is_kept(tiny, tmp_path, options):
    lora = LoraPipeline(tiny.build("sd"))
    lora.attach(rank=4, **options)
    tiny.fill(lora.denoiser)
    ours = tiny.image(lora.pipe)
    lora.set({"default": 0.5})
    with pytest.warns(LoraAdaptersWarning, match="a weight is not saved"):
        lora.save(tmp_path / "mine.safetensors")
    stock = tiny.build("sd")
    stock.load_lora_weights(tmp_path, weight_name="mine.safetensors")
    tiny.close(tiny.image(stock), ours)


def test_the_level_text_model_of_other_versions_of_transformers(tiny, tmp_path):
    lora = tiny.trained("sd")
    lora.save(tmp_path / "mine.safetensors")
    tensors = load_file(tmp_path / "mine.safetensors")
    new = {key.replace("text_encoder.text_model.", "text_encoder."): value for key, value in tensors.items()}
    assert new.keys() != tensors.keys()
    both = {name: lora.save(tmp_path / name, format="peft") for name in ("new", "old")}
    old = both["old"] / "text_encoder" / "adapter_model.safetensors"
    named = {key.replace(".encoder.", ".text_model.encoder."): value for key, value in load_file(old).items()}
    save_file(named, old)  # as older versions of transformers name them, and other tools write them
    for source in (tensors, new, *both.values()):
        ours = LoraPipeline(tiny.build("sd"))
        ours.load(source)
        tiny.close(tiny.image(ours.pipe), tiny.image(lora.pipe), 1e-6)


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_files_that_do_not_fit(tiny, tmp_path):
    tiny.trained("sd").save(tmp_path / "sd")
    flux = LoraPipeline(tiny.build("flux"))
    with pytest.raises(CheckpointError, match="another pipeline"):
        flux.load(tmp_path / "sd")
    lora = LoraPipeline(tiny.build("sd"))
    with pytest.raises(CheckpointError, match="no known format"):
        lora.load({"lora_unet_down_blocks_0_attentions_0_proj_in": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"several files|holds no adapter"):
        lora.load(tmp_path)
    with pytest.raises(CheckpointError, match="no file or folder"):
        lora.load(tmp_path / "nothing")
    good = torch.zeros(2, 16)
    bad = {"unet.down_blocks.0.nothing.lora_A.weight": good, "unet.down_blocks.0.nothing.lora_B.weight": good.T}
    with pytest.raises(CheckpointError, match="made for another model"):
        lora.load(bad)
    assert lora.adapters == {}
    assert not hasattr(lora.denoiser, "peft_config")


def test_loading_a_pipeline_from_a_folder(tiny, tmp_path):
    pipe = tiny.build("sdxl")
    pipe.save_pretrained(tmp_path)
    lora = LoraPipeline(tmp_path)
    lora.pipe.set_progress_bar_config(disable=True)
    assert isinstance(lora.pipe, diffusers.StableDiffusionXLPipeline)
    assert list(lora.components) == ["unet", "text_encoder", "text_encoder_2"]
    tiny.close(tiny.image(lora.pipe), tiny.image(pipe), 1e-6)


def test_what_diffusers_format_can_not_hold(tiny, tmp_path):
    lora = LoraPipeline(tiny.build("sd"))
    lora.attach(rank=2, modules_to_save=["conv_out"])
    with pytest.raises(UnsupportedError, match="PEFT folder"):
        lora.save(tmp_path)
    assert not list(tmp_path.iterdir())
    lora.save(tmp_path, format="peft")
    assert (tmp_path / "unet" / "adapter_config.json").is_file()

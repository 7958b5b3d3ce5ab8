"""On a pipeline's image: where stock diffusers applies an adapter wrong, or not at all, without an error, ours is right.

tests/formats/test_silent_failures.py has the same failures layer by layer.
"""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from format_models import loha, lokr, tucker
from lora_adapters_diffusers import LoraPipeline
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_adapters import formats
from lora_adapters.formats import PortableAdapter

pytestmark = pytest.mark.filterwarnings("ignore")


def stock_image(tiny, kind, source, **options):
    pipe = tiny.build(kind)
    pipe.load_lora_weights(source, **options)
    return tiny.image(pipe)


def our_image(tiny, kind, source):
    pipe = LoraPipeline(tiny.build(kind))
    pipe.load(source)
    return tiny.image(pipe.pipe)


def attached(tiny, kind="sd", **options):
    lora = LoraPipeline(tiny.build(kind))
    lora.attach(rank=4, **options)
    tiny.fill(lora.denoiser)
    return lora


@pytest.mark.parametrize("options", [dict(alpha=16), dict(alpha=4, use_rslora=True)])
def test_1_alpha_without_metadata(tiny, tmp_path, options):
    """Stock diffusers saves no metadata unless told, and loads alpha = rank; the file of ours has it."""
    lora = attached(tiny, **options)
    wanted = tiny.image(lora.pipe)
    layers = get_peft_model_state_dict(lora.denoiser)
    layers = {key.removeprefix("base_model.model."): value for key, value in layers.items()}
    lora.pipe.save_lora_weights(tmp_path / "stock", unet_lora_layers=layers)
    assert tiny.differs(stock_image(tiny, "sd", tmp_path / "stock"), wanted)
    file = lora.save(tmp_path / "ours")
    tiny.close(stock_image(tiny, "sd", file), wanted)
    tiny.close(our_image(tiny, "sd", file), wanted, 1e-6)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == options["alpha"]


def test_2_a_peft_folder(tiny, tmp_path):
    """Stock diffusers loads nothing of a PEFT folder, with a warning only."""
    pipe = tiny.build("sd")
    bare = tiny.image(pipe)
    adapted = get_peft_model(pipe.unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False))
    wanted = tiny.image(pipe)
    adapted.save_pretrained(tmp_path / "unet")
    stock = stock_image(tiny, "sd", tmp_path / "unet", weight_name="adapter_model.safetensors")
    assert torch.equal(stock, bare)
    for place in (tmp_path / "unet", tmp_path):
        tiny.close(our_image(tiny, "sd", place), wanted)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_3_minority_alphas_on_attention(tiny, kind, tmp_path):
    """Stock diffusers gives an attention layer of a kohya file the alpha of most layers."""
    lora = attached(tiny, kind, targets={"attention": 4, "q": {"rank": 4, "alpha": 1}})
    wanted = tiny.image(lora.pipe)
    file = lora.save(tmp_path / "kohya", format="kohya")
    assert tiny.differs(stock_image(tiny, kind, file), wanted)
    tiny.close(our_image(tiny, kind, file), wanted, 1e-6)
    tiny.close(stock_image(tiny, kind, lora.save(tmp_path / "diffusers")), wanted)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_4_loha_lokr_and_tucker_cores(tiny, kind, tmp_path):
    """Stock diffusers raises for each; here they are LoRA with the same update, which stock diffusers then loads."""
    name = "mid_block.resnets.0.conv1"
    for make in (loha, lokr, tucker):
        factors = make((32, 32, 3, 3), alpha=60.0)
        file = tmp_path / f"{make.__name__}.safetensors"
        formats.write(PortableAdapter({"unet": {name: factors}}), file, "lycoris", {"sd": "sd1"}.get(kind, kind))
        with pytest.raises((ValueError, KeyError, RuntimeError)):
            stock_image(tiny, kind, file)
        merged = tiny.build(kind)
        with torch.no_grad():
            merged.unet.get_submodule(name).weight += factors.update()
        wanted = tiny.image(merged)
        assert tiny.differs(wanted, tiny.image(tiny.build(kind)))
        ours = LoraPipeline(tiny.build(kind))
        ours.load(file)
        tiny.close(tiny.image(ours.pipe), wanted)
        tiny.close(stock_image(tiny, kind, ours.save(tmp_path / make.__name__)), wanted)


def test_5_the_names_of_clip_before_and_after_transformers_5(tiny, tmp_path):
    """ComfyUI knows `text_model.encoder...` only (comfy/lora.py): what stock code saves is lost there, ours is not."""
    known = "text_encoder.text_model.encoder.layers."
    pipe = tiny.build("sd")
    encoder = get_peft_model(pipe.text_encoder, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=2))
    tiny.fill(encoder, size=3)
    wanted = tiny.image(pipe)
    layers = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(encoder).items()}
    pipe.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    stock = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert not any(key.startswith(known) for key in stock)
    ours = LoraPipeline(tiny.build("sd"))
    ours.load(tmp_path)
    file = ours.save(tmp_path / "ours")
    tensors = load_file(file)
    assert all(key.startswith(known) for key in tensors)
    for image in (tiny.image(ours.pipe), stock_image(tiny, "sd", file), our_image(tiny, "sd", file)):
        tiny.close(image, wanted)
    assert tiny.differs(wanted, tiny.image(tiny.build("sd")))


def test_6_exporting_to_kohya(tiny, tmp_path):
    """Stock diffusers' export writes alpha = rank, so that the image changes in every tool that reads it."""
    lora = attached(tiny, alpha=16)
    wanted = tiny.image(lora.pipe)
    exported = convert_state_dict_to_kohya(load_file(lora.save(tmp_path)))
    save_file({key: value.contiguous() for key, value in exported.items()}, tmp_path / "stock.safetensors")
    for image in (stock_image, our_image):
        assert tiny.differs(image(tiny, "sd", tmp_path / "stock.safetensors"), wanted)
        tiny.close(image(tiny, "sd", lora.save(tmp_path / "ours", format="kohya")), wanted)

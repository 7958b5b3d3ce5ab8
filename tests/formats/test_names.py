"""Names in kohya's files against the real structures, and against what diffusers' own converters make of them."""

import re

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers.loaders import lora_conversion_utils as stock
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from format_models import adapter_on, denoiser, layers
from format_pipelines import adapter_for, sd3

from lora_adapters.formats import PortableAdapter
from lora_adapters.formats.families import FAMILIES
from lora_adapters.formats.keys import factors_of, layers_of
from lora_adapters.formats.kohya_file import KohyaFile
from lora_adapters.formats.kohya_names import find, written
from lora_adapters.formats.text_encoder_names import CLIP_NAMES, T5_NAMES
from lora_adapters.formats.transformer_names import RELEASES
from lora_adapters.formats.unet_names import DIFFUSERS_NAMES, LDM_NAMES, from_ldm, to_ldm

COMPONENT = {"sd1": "unet", "sd2": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_a_name_of_its_own_that_leads_back(family):
    names = layers(denoiser(family))
    found = {}
    for name in names:
        target = written(COMPONENT[family], name, FAMILIES[family])
        assert target is not None, name
        place = find(target.name, family)
        assert place.component == COMPONENT[family]
        assert place.modules[target.place] == name
        assert len(place.modules) == target.count
        assert found.setdefault((target.name, target.place), name) == name
    assert len(found) == len(names)
    assert all(re.fullmatch(r"lora_unet_\w+", name) for name, _ in found)


def test_the_modules_that_kohya_trains_by_default_are_as_many():
    def in_transformers(name):
        return ".attentions." in name

    assert sum(map(in_transformers, layers(denoiser("sd1")))) == 192
    assert sum(map(in_transformers, layers(denoiser("sdxl")))) == 722


def test_names_that_research_lists():
    assert to_ldm("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q") == (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    )
    assert to_ldm("down_blocks.0.downsamplers.0.conv") == "input_blocks.3.0.op"
    assert to_ldm("up_blocks.0.upsamplers.0.conv") == "output_blocks.2.2.conv"
    assert to_ldm("mid_block.resnets.1.conv2") == "middle_block.2.out_layers.3"
    assert to_ldm("down_blocks.1.resnets.0.conv_shortcut") == "input_blocks.4.0.skip_connection"
    assert to_ldm("time_embedding.linear_1") == "time_embed.0"
    assert to_ldm("add_embedding.linear_1") == "label_emb.0.0"
    # Stable Diffusion 1's first up block has no attention, so that its upsampler is one place further to the front.
    assert from_ldm("output_blocks.2.1.conv") == "up_blocks.0.upsamplers.0.conv"


@pytest.mark.parametrize(
    "name",
    [
        "input_blocks.3.0.in_layers.2",  # a downsampler's place
        "input_blocks.4.0.op",  # a resnet's
        "input_blocks.4.1.in_layers.2",  # a resnet's part in an attention
        "output_blocks.1.2.conv",  # not the block's last
        "output_blocks.2.0.conv",
        "middle_block.3.proj_in",
        "out.0",
        "input_blocks.0.1.proj_in",
    ],
)
def test_what_is_no_layer_of_ldm_is_none(name):
    assert from_ldm(name) is None


@pytest.mark.parametrize(
    "table", [DIFFUSERS_NAMES, LDM_NAMES, CLIP_NAMES, T5_NAMES, *(r.released for r in RELEASES.values())]
)
def test_no_flat_name_has_two_meanings(table):
    templates = [template for entries in table._by_shape.values() for template, _ in entries]
    flat = [re.sub("#", "7", template).replace(".", "_") for template in templates]
    for name in flat:
        matches = [t for entries in table._by_shape.values() for t, pattern in entries if pattern.fullmatch(name)]
        assert len(matches) == 1, (name, matches)


def test_unknown_layers_are_none():
    assert find("lora_unet_down_blocks_0_resnets_0_conv3", "sd1") is None
    assert find("lora_unet_double_blocks_00_img_mod_lin", "flux") is None
    assert find("lora_te3_text_model_encoder_layers_0_mlp_fc1", "sd1") is None
    assert written("text_encoder_3", "text_model.encoder.layers.0.mlp.fc1", FAMILIES["sd1"]) is None


# ---- against diffusers' converters ----------------------------------------------------------------------------------


def kohya_tensors(family, **options):
    adapter = adapter_on(family, rank=1, alpha=1, **options)
    return adapter, dict(KohyaFile().encode(adapter, family).tensors)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_converts_every_unet_layer_to_ours(family):
    adapter, tensors = kohya_tensors(family)
    config = type("Config", (), {"layers_per_block": 2})
    mapped = stock._maybe_map_sgm_blocks_to_diffusers(tensors, config)
    converted, alphas = stock._convert_non_diffusers_lora_to_diffusers(mapped)
    unet = {key.removeprefix("unet."): value for key, value in converted.items() if key.startswith("unet.")}
    theirs = {}
    for key, value in convert_unet_state_dict_to_peft(unet).items():
        if not key.endswith(("up.weight", "lora_B.weight")):
            name = key.replace("to_out_lora.down", "to_out.0.lora_A").replace("_lora.down.weight", ".lora_A.weight")
            theirs[name.removesuffix(".lora_A.weight")] = value
    ours = {name: factors.a for name, factors in adapter.components["unet"].items()}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    encoders = {key.split(".")[0] for key in converted} - {"unet"}
    assert encoders == set(adapter.components) - {"unet"}
    assert len(alphas) == len(adapter)


def test_diffusers_converts_every_flux_layer_to_ours():
    adapter, tensors = kohya_tensors("flux", text=False)
    converted = stock._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    for name, factors in adapter.components["transformer"].items():
        # 0.42 leaves "transformer." out for layers outside of the blocks, and then loads none of them.
        key = name if f"transformer.{name}.lora_A.weight" not in converted else f"transformer.{name}"
        assert torch.equal(converted.pop(f"{key}.lora_A.weight"), factors.a), name
        assert torch.equal(converted.pop(f"{key}.lora_B.weight"), factors.b), name
    assert not converted


class Loose(dict):
    """A checkpoint in which everything that nothing was put into is zero."""

    def pop(self, key, *default):
        return super().pop(key, torch.zeros(6))


@pytest.mark.parametrize("swapped", ["norm_out.linear", "transformer_blocks.1.norm1_context.linear", None])
def test_sd3s_released_weights_are_converted_to_ours(swapped):
    """Updates put into a released checkpoint by kohya's names, which diffusers then converts, are those of our layers."""
    pipe = sd3()
    adapter = adapter_for(pipe, "sd3", chosen=lambda name: swapped is None or name == swapped)
    adapter = PortableAdapter({"transformer": adapter.components["transformer"]}, "sd3")
    tensors = dict(KohyaFile().encode(adapter, "sd3").tensors)
    released = Loose({"context_embedder.weight": torch.zeros(16, 8)})
    released |= {f"joint_blocks.{block}.x_block.attn.qkv.weight": torch.zeros(48, 16) for block in (0, 1)}
    released["joint_blocks.0.x_block.attn2.qkv.weight"] = torch.zeros(48, 16)
    for name, layer in layers_of(tensors, "it").items():
        dotted = RELEASES["sd3"].released.dotted(name.removeprefix("lora_unet_"))
        released[f"{dotted}.weight"] = factors_of(layer, "it").update()
    converted = convert_sd3_transformer_checkpoint_to_diffusers(released)
    assert converted.keys() >= {
        key for key in pipe.transformer.state_dict() if key.endswith("weight") and "norm_" not in key
    }
    for name, factors in adapter.components["transformer"].items():
        assert torch.allclose(converted[f"{name}.weight"], factors.update(), atol=1e-12), name
    if swapped:
        assert not torch.allclose(released_rows(tensors), adapter.components["transformer"][swapped].update())


def released_rows(tensors):
    (layer,) = layers_of(tensors, "it").values()
    return factors_of(layer, "it").update()

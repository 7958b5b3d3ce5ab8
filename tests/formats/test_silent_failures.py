"""Where stock diffusers applies an adapter wrong, or not at all, without an error: that it does, and that ours does not.

"Stock" is load_lora_weights on the file as another tool writes it, "ours" the file that `formats` writes, or reads and
writes again, loaded by that same load_lora_weights.
"""

import json

import pytest
import torch
from format_models import loha, lokr, tucker
from format_pipelines import PIPELINES, adapter_for, clip, loaded, sd1, unet, wrong
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_adapters import formats
from lora_adapters.formats import PortableAdapter
from lora_adapters.formats.kohya_file import KohyaFile
from lora_adapters.image_file_portability import judge_portable

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("sd1", "sdxl", "sd3", "flux")


def load(family, file):
    pipe = PIPELINES[family]()
    pipe.load_lora_weights(file)
    return pipe


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [dict(), dict(rank_stabilised=True), dict(ranks=(1, 3, 2), alphas=(1.0, 0.3, 5.0))])
def test_1_alphas_that_are_not_the_rank(tmp_path, family, more):
    adapter = adapter_for(PIPELINES[family](), family, **more)
    formats.write(adapter, tmp_path / "ours.safetensors", family=family)
    assert wrong(load(family, tmp_path / "ours.safetensors"), adapter) == []
    # Stock: the same tensors without metadata, as diffusers' training scripts wrote them until 0.34.
    save_file(load_file(tmp_path / "ours.safetensors"), tmp_path / "stock.safetensors")
    assert len(wrong(load(family, tmp_path / "stock.safetensors"), adapter)) > len(adapter) / 2


def test_1_what_stock_saves_with_metadata_is_read_with_its_scaling(tmp_path):
    pipe = sd1()
    pipe.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=7, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 3}, use_rslora=True)
    )
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    pipe.unet.save_lora_adapter(tmp_path / "unprefixed")
    metadata = pipe.unet.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(pipe.unet)
    type(pipe).save_lora_weights(tmp_path / "stock", unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    for folder in ("unprefixed", "stock"):
        assert formats.detect(tmp_path / folder) == "diffusers"
        assert wrong(pipe, formats.read(tmp_path / folder)) == []


def test_2_peft_folders(tmp_path):
    adapted = get_peft_model(
        unet(), LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "folder")
    stock = sd1()
    stock.load_lora_weights(tmp_path / "folder")
    assert loaded(stock) == {}
    adapter = formats.read(tmp_path / "folder")
    formats.convert(tmp_path / "folder", tmp_path / "ours.safetensors", to="diffusers")
    assert wrong(load("sd1", tmp_path / "ours.safetensors"), adapter) == []
    assert len(adapter) == len(loaded(load("sd1", tmp_path / "ours.safetensors")))
    # What PEFT computes is the measure, not what was read.
    weight = adapted.base_model.model.mid_block.resnets[0].conv1
    ours = adapter.components["unet"]["mid_block.resnets.0.conv1"].update()
    assert torch.allclose(weight.get_delta_weight("default").double(), ours, atol=1e-6)


def test_2_a_folder_for_each_component(tmp_path):
    adapter = adapter_for(PIPELINES["sdxl"](), "sdxl", alphas=(1.0, 3.0), ranks=(2, 5))
    formats.write(adapter, tmp_path / "folders", "peft")
    from peft import PeftModel

    pipe = PIPELINES["sdxl"]()
    for component in adapter.components:
        PeftModel.from_pretrained(getattr(pipe, component), tmp_path / "folders" / component)
    assert wrong(pipe, adapter) == []


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_3_minority_alphas_on_attention(tmp_path, family):
    adapter = adapter_for(PIPELINES[family](), family, alphas=(2.0, 2.0, 0.5))
    save_file(*written_by_kohya(adapter, family), tmp_path / "kohya.safetensors")
    bad = wrong(load(family, tmp_path / "kohya.safetensors"), adapter)
    assert any("attn" in module for _, module in bad)
    verdict = judge_portable(adapter, tmp_path / "kohya.safetensors", "kohya", "diffusers")
    assert "instead of 0.25" in verdict.reasons[0]
    formats.convert(tmp_path / "kohya.safetensors", tmp_path / "ours.safetensors", to="diffusers", family=family)
    assert wrong(load(family, tmp_path / "ours.safetensors"), adapter) == []


def written_by_kohya(adapter, family):
    """Tensors as sd-scripts saves them, without a header that says more than it needs to."""
    return (dict(KohyaFile().encode(adapter, family).tensors),)


KINDS = {"LoHa": loha, "LoKr": lokr, "lora_mid": tucker}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_4_lycoris_kinds(tmp_path, family, kind):
    names = {"up_blocks.0.resnets.0.conv1": (32, 64, 3, 3)}
    if kind != "lora_mid":
        names["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"] = (32, 32)
    adapter = PortableAdapter({"unet": {name: KINDS[kind](shape) for name, shape in names.items()}}, family)
    formats.write(adapter, tmp_path / "lycoris.safetensors", "lycoris", family)
    stock = PIPELINES[family]()
    with pytest.raises((ValueError, KeyError, RuntimeError)):
        stock.load_lora_weights(tmp_path / "lycoris.safetensors")
    made = formats.convert(tmp_path / "lycoris.safetensors", tmp_path / "ours.safetensors", to="diffusers")
    assert "plain LoRA now" in made.notes[0]
    assert wrong(load(family, tmp_path / "ours.safetensors"), adapter) == []


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_5_the_names_of_clip_before_and_after_transformers_5(tmp_path, family):
    adapter = adapter_for(PIPELINES[family](), family)
    formats.write(adapter, tmp_path / "ours.safetensors", family=family)
    names = [key for key in load_file(tmp_path / "ours.safetensors") if key.startswith("text_encoder.")]
    # ComfyUI knows these only (comfy/lora.py, model_lora_keys_clip).
    assert names
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in names)
    assert wrong(load(family, tmp_path / "ours.safetensors"), adapter) == []
    # Stock, from transformers 5 on: the flattened names of CLIPTextModel.
    encoder = get_peft_model(clip(), LoraConfig(r=2, target_modules=["q_proj"]))
    layers = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(encoder).items()}
    type(PIPELINES[family]()).save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    stock = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("text_encoder.encoder.layers.") for key in stock)
    back = formats.read(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("text_model.encoder.layers.") for name in back.components["text_encoder"])
    verdict = judge_portable(back, tmp_path / "pytorch_lora_weights.safetensors", "diffusers", "comfyui")
    assert "text_model.encoder only" in " ".join(verdict.reasons)


def test_6_exporting_to_kohya(tmp_path):
    from diffusers.utils import convert_state_dict_to_kohya

    adapter = adapter_for(sd1(), "sd1", alphas=(8.0,))
    formats.write(adapter, tmp_path / "diffusers.safetensors")
    formats.convert(tmp_path / "diffusers.safetensors", tmp_path / "ours.safetensors", to="kohya", family="sd1")
    ours, stock = (
        load_file(tmp_path / "ours.safetensors"),
        convert_state_dict_to_kohya(load_file(tmp_path / "diffusers.safetensors")),
    )
    alphas = {key: value.item() for key, value in stock.items() if key.endswith(".alpha")}
    assert set(alphas.values()) == {2}
    assert {value.item() for key, value in ours.items() if key.endswith(".alpha")} == {8}
    assert any(key.startswith("lora_te1_") for key in stock)
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj") for key in ours)
    assert not any(key.startswith("lora_te1_") for key in ours)
    # What it names wrong is read all the same.
    back = formats.read(stock, family="sd1")
    assert {component: set(modules) for component, modules in back.components.items()} == {
        component: set(modules) for component, modules in adapter.components.items()
    }
    with open(tmp_path / "ours.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"]["ss_base_model_version"] == "sd_v1"


def test_6_dora_exported_to_kohya_has_the_keys_that_uis_read(tmp_path):
    from diffusers.utils import convert_state_dict_to_kohya
    from format_models import lora, values

    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = PortableAdapter({"unet": {name: lora((32, 32), magnitude=values(32))}}, "sd1")
    formats.write(adapter, tmp_path / "diffusers.safetensors")
    stock = convert_state_dict_to_kohya(load_file(tmp_path / "diffusers.safetensors"))
    wanted = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.dora_scale"
    assert wanted not in stock
    formats.convert(tmp_path / "diffusers.safetensors", tmp_path / "ours.safetensors", to="kohya")
    assert load_file(tmp_path / "ours.safetensors")[wanted].shape == (32, 1)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_6_transformers_exported_to_kohya_come_back(tmp_path, family):
    adapter = adapter_for(PIPELINES[family](), family, alphas=(1.0, 4.0), ranks=(2,))
    formats.write(adapter, tmp_path / "kohya.safetensors", "kohya", family)
    made = formats.convert(tmp_path / "kohya.safetensors", tmp_path / "ours.safetensors", to="diffusers", family=family)
    assert made.layers == {component: len(modules) for component, modules in adapter.components.items()}
    assert wrong(load(family, tmp_path / "ours.safetensors"), adapter) == []


def test_flux_layers_outside_of_the_blocks_of_a_kohya_file(tmp_path):
    """One more: 0.42 converts them to names that it then passes over, and gives the last layer the scale 1."""
    chosen = ("x_embedder", "context_embedder", "proj_out", "norm_out.linear", "transformer_blocks.0.attn.to_out.0")
    adapter = adapter_for(PIPELINES["flux"](), "flux", chosen=lambda name: name in chosen)
    adapter = PortableAdapter({"transformer": adapter.components["transformer"]}, "flux")
    formats.write(adapter, tmp_path / "kohya.safetensors", "kohya")
    stock = load("flux", tmp_path / "kohya.safetensors")
    assert [module for _, module in wrong(stock, adapter)] == sorted(chosen[:4])
    verdict = judge_portable(adapter, tmp_path / "kohya.safetensors", "kohya", "diffusers")
    assert any("outside of the blocks" in reason for reason in verdict.reasons)
    formats.convert(tmp_path / "kohya.safetensors", tmp_path / "ours.safetensors", to="diffusers")
    assert wrong(load("flux", tmp_path / "ours.safetensors"), adapter) == []


def test_dora_of_a_kohya_file(tmp_path):
    """And: load_lora_weights leaves dora_scale out with a warning; diffusers' own form of it is loaded."""
    from format_models import lora, values

    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    shapes = {name: (32, 32), "mid_block.resnets.0.conv1": (32, 32, 3, 3)}
    modules = {name: lora(shape, magnitude=values(32) + 1) for name, shape in shapes.items()}
    formats.write(PortableAdapter({"unet": modules}, "sd1"), tmp_path / "kohya.safetensors", "kohya")
    formats.convert(tmp_path / "kohya.safetensors", tmp_path / "ours.safetensors", to="diffusers")
    stock, ours = (load("sd1", tmp_path / f"{name}.safetensors").unet for name in ("kohya", "ours"))
    for name in shapes:
        assert not stock.get_submodule(name).lora_magnitude_vector
        magnitude = ours.get_submodule(name).lora_magnitude_vector["default_0"].weight
        assert torch.equal(magnitude.detach().flatten(), values(32) + 1)

"""Files as other tools write them, older ones too, and files that are damaged, unsafe or hold what nothing here can."""

import json
from contextlib import suppress

import pytest
import torch
from format_models import adapter_on, loha, lora, same, values
from format_pipelines import adapter_for, sd1
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_adapters import formats
from lora_adapters.errors import CheckpointError, LoraAdaptersError, PluginError, RequestError, UnsupportedError
from lora_adapters.formats.keys import tensors_for
from lora_adapters.formats.kohya_file import KohyaFile
from lora_adapters.hooks.manager import plugins
from lora_adapters.hooks.specs import FormatSpec

NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = f"lora_unet_{NAME.replace('.', '_')}"


def kohya(**more):
    made = {
        f"{FLAT}.lora_down.weight": values(2, 8),
        f"{FLAT}.lora_up.weight": values(8, 2),
        f"{FLAT}.alpha": torch.tensor(1.0),
    }
    return made | more


def of(tensors, **options):
    return formats.read(tensors, **options).components["unet"]


# ---- as others write them -----------------------------------------------------------------------------------------------


def test_without_alpha_the_scaling_is_1():
    tensors = kohya()
    del tensors[f"{FLAT}.alpha"]
    assert of(tensors)[NAME].scaling == 1


@pytest.mark.parametrize("alpha", [torch.tensor(4), torch.tensor([4.0]), torch.tensor(4.0, dtype=torch.bfloat16)])
def test_alphas_in_all_their_forms(tmp_path, alpha):
    save_file(kohya(**{f"{FLAT}.alpha": alpha}), tmp_path / "it.safetensors")
    assert of(tmp_path / "it.safetensors")[NAME].alpha == 4.0


def test_the_first_attention_processors_of_diffusers():
    made = {}
    for name in ("to_q", "to_k", "to_v", "to_out"):
        made[f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.{name}_lora.down.weight"] = values(2, 8)
        made[f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.{name}_lora.up.weight"] = values(8, 2)
    # The same without a component, which save_attn_procs wrote.
    for tensors in (made, {key.removeprefix("unet."): value for key, value in made.items()}):
        assert formats.detect(tensors) == "diffusers"
        found = of(tensors)
        assert {name.rpartition("attn1.")[2] for name in found} == {"to_q", "to_k", "to_v", "to_out.0"}
        assert all(factors.scaling == 1 for factors in found.values())


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.{}.weight", "self_attn.out_proj"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}.weight", "self_attn.q_proj"),
        ("text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer.{}.weight", "mlp.fc1"),
    ],
)
def test_old_names_of_text_encoders(name, wanted):
    tensors = {name.format("down"): values(2, 8), name.format("up"): values(8, 2)}
    (found,) = formats.read(tensors).components["text_encoder"]
    assert found == f"text_model.encoder.layers.0.{wanted}"


def test_old_files_are_read_as_stock_diffusers_reads_them(tmp_path):
    pytest.importorskip("diffusers")
    pipe = sd1()
    from format_pipelines import wrong

    old = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith((".to_q", ".to_out.0")) and isinstance(module, torch.nn.Linear):
            stem, _, last = name.removesuffix(".0").rpartition(".")
            key = f"unet.{stem}.processor.{last}_lora"
            old |= {
                f"{key}.down.weight": values(2, module.in_features),
                f"{key}.up.weight": values(module.out_features, 2),
            }
    save_file(old, tmp_path / "old.safetensors")
    pipe.load_lora_weights(tmp_path / "old.safetensors")
    adapter = formats.read(tmp_path / "old.safetensors")
    assert len(adapter) == len(old) / 2
    assert wrong(pipe, adapter) == []


def test_alphas_beside_diffusers_names():
    tensors = {
        f"transformer.x_embedder.{side}.weight": t for side, t in (("lora_A", values(2, 8)), ("lora_B", values(6, 2)))
    }
    tensors["transformer.x_embedder.alpha"] = torch.tensor(8.0)
    assert formats.read(tensors).components["transformer"]["x_embedder"].scaling == 4


def test_comfyuis_and_other_trainers_names_of_flux():
    factors = lora((24, 8), 2, 2.0)
    ends = tensors_for(factors, "kohya")
    named = {
        "diffusion_model.double_blocks.3.img_mlp.0": "transformer_blocks.3.ff.net.0.proj",
        "lora_transformer_single_transformer_blocks_7_proj_mlp": "single_transformer_blocks.7.proj_mlp",
        "lora_unet_single_blocks_7_modulation_lin": "single_transformer_blocks.7.norm.linear",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.2.mlp.fc1": "text_model.encoder.layers.2.mlp.fc1",
    }
    for name, wanted in named.items():
        tensors = {f"{name}{end}": tensor for end, tensor in ends.items()}
        anchor = {f"lora_unet_double_blocks_0_img_mod_lin{end}": tensor for end, tensor in ends.items()}
        back = formats.read(tensors | anchor)
        assert back.family == "flux"
        assert any(module == wanted for _, module, _ in back)


def test_lycoris_names_of_a_transformer():
    ends = tensors_for(loha((8, 8)), "kohya")
    tensors = {f"lycoris_single_transformer_blocks_0_attn_to_q{end}": tensor for end, tensor in ends.items()}
    assert formats.detect(tensors) == "lycoris"
    assert list(formats.read(tensors).components["transformer"]) == ["single_transformer_blocks.0.attn.to_q"]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_sdxl_with_the_names_of_diffusers(family):
    pytest.importorskip("diffusers")
    adapter = adapter_on(family, lambda name: name.startswith("up_blocks.1."), rank=1)
    wanted = dict(adapter.components["unet"])
    ends = [(name, end, t) for name, factors in wanted.items() for end, t in tensors_for(factors, "kohya").items()]
    tensors = {f"lora_unet_{name.replace('.', '_')}{end}": tensor for name, end, tensor in ends}
    assert set(of(tensors)) == set(wanted)


def test_family_is_told_by_what_the_layers_are():
    pytest.importorskip("diffusers")
    for family in ("sd1", "sd2", "sdxl", "sd3", "flux"):
        tensors = dict(KohyaFile().encode(adapter_on(family, rank=1), family).tensors)
        assert formats.read(tensors).family == family
    assert formats.read(kohya()).family == ""
    assert formats.read(kohya(), metadata={"ss_base_model_version": "sdxl_base_v1-0"}).family == "sdxl"
    assert formats.read(kohya(), family="sd2").family == "sd2"


# ---- what is refused ------------------------------------------------------------------------------------------------------

BAD = {
    "an unknown layer": (kohya(**{"lora_unet_nowhere.lora_down.weight": values(2, 8)}), "lora_unet_nowhere"),
    "no up": ({key: value for key, value in kohya().items() if "up" not in key}, "has no lora_B"),
    "ranks": (kohya(**{f"{FLAT}.lora_up.weight": values(8, 3)}), "different ranks"),
    "alpha": (kohya(**{f"{FLAT}.alpha": torch.tensor(float("nan"))}), "NaN"),
    "alphas": (kohya(**{f"{FLAT}.alpha": torch.tensor([1.0, 2.0])}), "no number"),
    "a huge alpha": (kohya(**{f"{FLAT}.alpha": torch.tensor(1e30)}), "no number"),
    "infinite": (kohya(**{f"{FLAT}.lora_up.weight": torch.full((8, 2), torch.inf)}), "infinite"),
    "two kinds": (kohya(**{f"{FLAT}.hada_w1_a": values(8, 2)}), "tensors of LoRA and hada"),
    "an alpha alone": (
        kohya(lora_unet_conv_in=values(1)) | {"lora_unet_conv_in.alpha": torch.tensor(1.0)},
        "lora_unet_conv_in",
    ),
    "a core": (kohya(**{f"{FLAT}.lora_mid.weight": values(3, 3, 3, 3)}), "core"),
    "a magnitude": (kohya(**{f"{FLAT}.dora_scale": values(5, 1)}), "magnitude"),
    "OFT": (kohya(**{f"{FLAT}.oft_blocks": values(2, 4, 4)}), "OFT"),
    "a weight trained whole": (kohya(**{f"{FLAT}.diff": values(8, 8)}), "trained whole"),
    "GLoRA": (kohya(**{f"{FLAT}.a1.weight": values(8, 8)}), "GLoRA"),
    "an embedding": (kohya(**{"bundle_emb.x.string_to_param": values(2, 8)}), "textual inversion"),
    "half of LoHa": ({f"{FLAT}.hada_w1_a": values(8, 2), f"{FLAT}.hada_w1_b": values(2, 8)}, "has no hada_w2_a"),
    "half of LoKr": ({f"{FLAT}.lokr_w1": values(2, 2)}, "lokr_w2"),
    "two layers": (
        kohya()
        | {
            key.replace("lora_unet_mid_block_attentions_0", "lora_unet_middle_block_1"): v for key, v in kohya().items()
        },
        "two of its layers",
    ),
    "both names": (kohya(**{f"{FLAT}.lora_A.weight": values(2, 8)}), "twice"),
}


@pytest.mark.parametrize("tensors, said", BAD.values(), ids=BAD)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_bad_file_is_an_error_that_says_what(tmp_path, tensors, said, in_memory):
    if not in_memory:
        save_file(tensors, tmp_path / "it.safetensors")
    with pytest.raises((CheckpointError, UnsupportedError), match=said):
        formats.read(tensors if in_memory else tmp_path / "it.safetensors")


def test_other_things(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        formats.read(tmp_path / "nothing.safetensors")
    torch.save(kohya(), tmp_path / "it.pt")
    with pytest.raises(CheckpointError, match="pickle"):
        formats.read(tmp_path / "it.pt")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        formats.read(tmp_path)
    save_file(kohya(), tmp_path / "a.safetensors")
    assert formats.detect(tmp_path) == "kohya"
    save_file(kohya(), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="several files"):
        formats.read(tmp_path)
    with pytest.raises(CheckpointError, match="no known format"):
        formats.read({"model.layers.0.weight": values(2, 2)})
    with pytest.raises(CheckpointError, match="Give the folder"):
        formats.read({f"base_model.model.{NAME}.lora_A.weight": values(2, 8)})
    with pytest.raises(RequestError, match="is a file"):
        formats.write(formats.read(kohya()), tmp_path / "a.safetensors", "peft")
    with pytest.raises(RequestError, match="no format 'koya'"):
        formats.read(kohya(), format="koya")
    with pytest.raises(RequestError, match="not of the format 'peft'"):
        formats.read(kohya(), format="peft")
    with pytest.raises(RequestError, match="no family"):
        formats.read(kohya(), family="sd5")
    with pytest.raises(RequestError, match="tensors by name"):
        formats.read({"x": 3})
    with pytest.raises(CheckpointError, match="dtype"):
        formats.read({f"{FLAT}.lora_down.weight": torch.ones(2, 8, dtype=torch.int32)})


def test_a_config_that_is_not_the_files(tmp_path):
    adapter = adapter_for(sd1(), "sd1") if pytest.importorskip("diffusers") else None
    formats.write(adapter, tmp_path / "it.safetensors")
    tensors = load_file(tmp_path / "it.safetensors")

    def saved(**config):
        save_file(tensors, tmp_path / "it.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
        return tmp_path / "it.safetensors"

    with pytest.raises(CheckpointError, match="has rank 2, but its config says 3"):
        formats.read(saved(**{"unet.r": 3}))
    with pytest.raises(CheckpointError, match="lora_alpha must be"):
        formats.read(saved(**{"unet.r": 2, "unet.lora_alpha": "many"}))
    with pytest.raises(UnsupportedError, match="OFT"):
        formats.read(saved(**{"unet.peft_type": "OFT"}))
    with pytest.raises(CheckpointError, match="is damaged"):
        save_file(tensors, tmp_path / "it.safetensors", metadata={"lora_adapter_metadata": "{"})
        formats.read(tmp_path / "it.safetensors")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_damage_gives_anything_but_our_errors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "it.safetensors"
    save_file(kohya(), path, metadata={"lora_adapters.fused": '{"x": [[1, 2.0, false, "float32", 1.0]]}'})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(LoraAdaptersError):
        formats.read(path)


# ---- formats of plugins -------------------------------------------------------------------------------------------------


class Lines:
    """A format of one text file: a line for each layer with its alpha; everything else is zeros."""

    def detect(self, source):
        return source.metadata.get("kind") == "lines"

    def read(self, source):
        return KohyaFile().read(source)

    def write(self, adapter, path, family):
        path.write_text("".join(f"{module} {factors.alpha}\n" for _, module, factors in adapter))
        return ("only alphas are kept",)


class Plugin:
    pass


def register(monkeypatch, name):
    from lora_adapters.hooks import hookimpl

    plugin = Plugin()
    specs = [FormatSpec(name, "Lines of text.", "test_lines_format:Lines")]
    plugin.lora_adapters_formats = hookimpl(lambda: specs, specname="lora_adapters_formats")
    import sys
    import types

    module = types.ModuleType("test_lines_format")
    module.Lines = Lines
    monkeypatch.setitem(sys.modules, "test_lines_format", module)
    plugins().register(plugin, "lines")


def test_a_plugins_format_is_detected_read_and_written(tmp_path, monkeypatch):
    register(monkeypatch, "lines")
    assert formats.detect(kohya(), metadata={"kind": "lines"}) == "lines"
    adapter = formats.read(kohya(), metadata={"kind": "lines"})
    same(adapter, formats.read(kohya()))
    save_file(kohya(), tmp_path / "it.safetensors")
    made = formats.convert(tmp_path / "it.safetensors", tmp_path / "out.txt", to="lines")
    assert made.notes == ("only alphas are kept",)
    assert (tmp_path / "out.txt").read_text() == f"{NAME} 1.0\n"


def test_a_plugin_cannot_take_a_built_in_name(monkeypatch):
    monkeypatch.setenv("LORA_ADAPTERS_STRICT", "1")
    register(monkeypatch, "kohya")
    with pytest.raises(PluginError, match="format 'kohya' is already"):
        formats.specs()

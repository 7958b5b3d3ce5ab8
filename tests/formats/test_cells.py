"""Each format, read and written, for each family: a test per cell of the table in docs/formats.md."""

import json
from dataclasses import replace

import pytest
import torch
from format_models import adapter_on, loha, lokr, lora, same, same_updates, tucker, values
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_adapters import formats
from lora_adapters.errors import UnsupportedError
from lora_adapters.formats import PortableAdapter
from lora_adapters.tensor_file import read_header

pytest.importorskip("diffusers")

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux")
ONE_FILE = ("diffusers", "kohya", "lycoris")


def some(family):
    """A few layers of each kind, small enough to be quick."""

    def chosen(name):
        parts = ("down_blocks.1.", "mid_block.", "up_blocks.0.", "conv_", "_embedding.", "transformer_blocks.1.")
        return name.startswith(parts) and "mlp" not in name and ".ff" not in name and "norm" not in name

    return adapter_on(family, chosen, dtype=torch.float16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", [*ONE_FILE, "peft"])
def test_round_trip_of_lora_is_exact(tmp_path, format, family):
    adapter = some(family)
    place = tmp_path / ("out" if format == "peft" else "out.safetensors")
    notes = formats.write(adapter, place, format)
    assert [note for note in notes if "T5" not in note] == []
    # A file of plain LoRA is kohya's, whoever wrote it.
    assert formats.detect(place) == format.replace("lycoris", "kohya")
    back = formats.read(place)
    assert back.family == family
    same(adapter, back)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_round_trip_of_ai_toolkit_is_exact_at_scale_1(tmp_path, family):
    adapter = adapter_on(
        family, lambda name: name.startswith("transformer_blocks.1.attn"), rank=2, alpha=2.0, text=False
    )
    assert formats.write(adapter, tmp_path / "out.safetensors", "ai-toolkit") == ()
    back = formats.read(tmp_path / "out.safetensors")
    assert formats.detect(tmp_path / "out.safetensors") == "ai-toolkit"
    same(adapter, back)
    assert not any(key.endswith("alpha") for key in load_file(tmp_path / "out.safetensors"))


@pytest.mark.parametrize(
    "alpha, dtype, exact", [(4.0, torch.float16, True), (3.0, torch.bfloat16, False), (3.0, torch.float32, False)]
)
def test_ai_toolkit_holds_the_scaling_in_b_and_says_how_well(tmp_path, alpha, dtype, exact):
    shapes = {"transformer_blocks.1.attn.to_q": (48, 48), "single_transformer_blocks.0.proj_mlp": (96, 48)}
    modules = {name: lora(shape, 2, alpha, dtype=dtype) for name, shape in shapes.items()}
    adapter = PortableAdapter({"transformer": modules}, "flux")
    notes = formats.write(adapter, tmp_path / "out.safetensors", "ai-toolkit")
    assert "alphas are gone" in notes[0]
    assert any("rounded" in note for note in notes) != exact
    back = formats.read(tmp_path / "out.safetensors")
    same_updates(adapter, back, 0 if exact else torch.finfo(dtype).eps)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_ai_toolkit_and_diffusers_read_each_others(tmp_path, format):
    adapter = adapter_on("flux", lambda name: name.startswith("single_transformer_blocks.0.attn"), 2, 2.0, text=False)
    formats.write(adapter, tmp_path / "a.safetensors", "ai-toolkit")
    formats.convert(tmp_path / "a.safetensors", tmp_path / "b", to=format)
    place = tmp_path / ("b" if format == "peft" else "b.safetensors")
    same(adapter, formats.read(place))


# ---- what only LyCORIS has --------------------------------------------------------------------------------------------

NAME, CONV = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.1.resnets.0.conv1"
LYCORIS = {
    "LoHa": {NAME: loha((24, 768)), CONV: loha((24, 16, 3, 3))},
    "LoHa with cores": {CONV: loha((24, 16, 3, 3), core=True)},
    "LoKr": {NAME: lokr((24, 768)), CONV: lokr((24, 16, 3, 3))},
    "LoKr of products": {NAME: lokr((24, 768), w1="product")},
    "LoKr whole": {NAME: lokr((24, 768), w2="whole"), CONV: lokr((24, 16, 3, 3), w2="whole")},
    "LoKr with a core": {CONV: lokr((24, 16, 3, 3), w2="core")},
    "Tucker": {CONV: tucker((24, 16, 3, 3))},
    "1 x 1": {"down_blocks.1.resnets.0.conv_shortcut": loha((24, 16, 1, 1)), NAME: loha((24, 768))},
    "1 x 1 of SD1": {"down_blocks.1.attentions.0.proj_in": loha((24, 24, 1, 1)), NAME: loha((24, 768))},
}


@pytest.mark.parametrize("modules", LYCORIS.values(), ids=LYCORIS)
def test_lycoris_holds_everything_as_it_is(tmp_path, modules):
    adapter = PortableAdapter({"unet": modules}, "sd1")
    assert formats.write(adapter, tmp_path / "out.safetensors", "lycoris") == ()
    assert formats.detect(tmp_path / "out.safetensors") == "lycoris"
    same(adapter, formats.read(tmp_path / "out.safetensors"))


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("modules", LYCORIS.values(), ids=LYCORIS)
def test_elsewhere_it_is_lora_with_the_same_update_and_that_is_said(tmp_path, modules, format):
    adapter = PortableAdapter({"unet": modules}, "sd1")
    place = tmp_path / ("out" if format == "peft" else "out.safetensors")
    notes = formats.write(adapter, place, format)
    assert "plain LoRA now" in notes[0]
    back = formats.read(place)
    assert {factors.kind for _, _, factors in back} == {"LoRA"}
    same_updates(adapter, back, 3e-7)


def test_a_family_that_is_given_decides_what_a_layer_is():
    """A projection around a small UNet's attention is a convolution in SD1 and linear in SDXL."""
    name = "down_blocks.1.attentions.0.proj_in"
    tensors = {f"lora_unet_{name.replace('.', '_')}{end}": t for end, t in formats_tensors(loha((24, 24))).items()}
    assert formats.read(tensors, family="sd1").components["unet"][name].shape == (24, 24, 1, 1)
    assert formats.read(tensors, family="sdxl").components["unet"][name].shape == (24, 24)


def test_loha_of_a_fused_projection_is_split_exactly_and_lokr_as_lora(tmp_path):
    for make in (loha, lokr):
        name = "transformer_blocks.0.attn.to_q"
        whole = make((36, 12))
        tensors = {f"lora_unet_double_blocks_0_img_attn_qkv{end}": t for end, t in formats_tensors(whole).items()}
        back = formats.read(tensors)
        update = torch.cat(
            [back.components["transformer"][name.replace("to_q", n)].update() for n in ("to_q", "to_k", "to_v")]
        )
        assert (update - whole.update()).norm() <= 3e-7 * whole.update().norm()


def formats_tensors(factors):
    from lora_adapters.formats.keys import tensors_for

    return tensors_for(factors, "kohya")


# ---- DoRA, biases, rank-stabilised ------------------------------------------------------------------------------------


def dora(axis="output", every=True):
    sizes = {"output": 0, "input": 1}
    shapes = {NAME: (24, 768), CONV: (24, 16, 3, 3)}
    make = lambda shape: lora(shape, magnitude=values(shape[sizes[axis]], seed=5), magnitude_axis=axis)  # noqa: E731
    modules = {name: make(shape) for name, shape in shapes.items()}
    if not every:
        modules[CONV] = lora(shapes[CONV])
    return PortableAdapter({"unet": modules}, "sd1")


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "lycoris"])
def test_dora_is_exact_in_all(tmp_path, format):
    place = tmp_path / ("out" if format == "peft" else "out.safetensors")
    assert formats.write(dora(), place, format) == ()
    same(dora(), formats.read(place))


@pytest.mark.parametrize("adapter", [dora("input"), dora(every=False)])
def test_dora_that_peft_has_no_form_for(tmp_path, adapter):
    for format in ("diffusers", "peft"):
        with pytest.raises(UnsupportedError, match=r"PEFT|diffusers"):
            formats.write(adapter, tmp_path / format, format)
        assert not (tmp_path / format).exists()
    formats.write(adapter, tmp_path / "out.safetensors", "lycoris")
    back = formats.read(tmp_path / "out.safetensors")
    same(adapter, back)
    assert back.components["unet"][NAME].magnitude_axis == adapter.components["unet"][NAME].magnitude_axis


def test_biases(tmp_path):
    modules = {NAME: lora((24, 768), bias=values(24)), CONV: lora((24, 16, 3, 3), bias=values(24))}
    adapter = PortableAdapter({"unet": modules}, "sd1")
    for format in ("diffusers", "peft"):
        place = tmp_path / ("out" if format == "peft" else "out.safetensors")
        assert formats.write(adapter, place, format) == ()
        same(adapter, formats.read(place))
    for format in ("kohya", "lycoris"):
        with pytest.raises(UnsupportedError, match="has a bias"):
            formats.write(adapter, tmp_path / f"{format}.safetensors", format)


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_rank_stabilised_stays_so(tmp_path, format):
    modules = {
        NAME: lora((24, 768), 3, 5.0, rank_stabilised=True),
        CONV: lora((24, 16, 3, 3), 7, 5.0, rank_stabilised=True),
    }
    adapter = PortableAdapter({"unet": modules}, "sd1")
    place = tmp_path / ("out" if format == "peft" else "out.safetensors")
    assert formats.write(adapter, place, format) == ()
    same(adapter, formats.read(place))


def test_rank_stabilised_in_kohya_is_an_alpha_of_64_bits(tmp_path):
    adapter = PortableAdapter({"unet": {NAME: lora((24, 768), 3, 5.0, rank_stabilised=True)}}, "sd1")
    formats.write(adapter, tmp_path / "out.safetensors", "kohya")
    back = formats.read(tmp_path / "out.safetensors").components["unet"][NAME]
    assert back.scaling == pytest.approx(5 / 3**0.5, rel=1e-15)


def test_some_rank_stabilised_and_some_not_is_said(tmp_path):
    modules = {NAME: lora((24, 768), 3, 5.0, rank_stabilised=True), CONV: lora((24, 16, 3, 3), 7, 5.0)}
    adapter = PortableAdapter({"unet": modules}, "sd1")
    (note,) = formats.write(adapter, tmp_path / "out.safetensors", "diffusers")
    assert "plain alphas" in note
    same_updates(adapter, formats.read(tmp_path / "out.safetensors"), 1e-14)


# ---- any ranks, alphas and dtypes -------------------------------------------------------------------------------------

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
ONES = st.tuples(
    st.integers(1, 5),
    st.one_of(st.sampled_from([1.0, 16.0, 0.5]), st.floats(1e-3, 1e3)),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ONES, min_size=4, max_size=4), st.sampled_from([*ONE_FILE, "peft"]), st.sampled_from(["sd1", "sdxl"]))
def test_any_ranks_alphas_and_dtypes(tmp_path_factory, layers, format, family):
    block = "up_blocks.0.attentions.1.transformer_blocks.0.attn1"
    modules = {
        f"{block}.{name}": lora((6, 8), r, a, 0, dtype) for name, (r, a, dtype) in zip(LAYERS, layers, strict=True)
    }
    adapter = PortableAdapter({"unet": modules}, family)
    place = tmp_path_factory.mktemp("any") / ("out" if format == "peft" else "out.safetensors")
    formats.write(adapter, place, format, family)
    same(adapter, formats.read(place, family=family))


@settings(max_examples=40, deadline=None)
@given(st.lists(ONES, min_size=4, max_size=4), st.sampled_from(["sd3", "flux"]))
def test_any_ranks_alphas_and_dtypes_in_fused_projections(tmp_path_factory, layers, family):
    block = "transformer_blocks.0.attn"
    modules = {
        f"{block}.{name}": lora((8, 8), r, a, 0, dtype) for name, (r, a, dtype) in zip(LAYERS, layers, strict=True)
    }
    adapter = PortableAdapter({"transformer": modules}, family)
    place = tmp_path_factory.mktemp("any") / "out.safetensors"
    notes = formats.write(adapter, place, "kohya", family)
    back = formats.read(place, family=family)
    same_updates(adapter, back, 1e-6 if any("6e-8" in note for note in notes) else 1e-14)
    for component, module, factors in adapter:
        found = back.components[component][module]
        assert (found.alpha, found.rank) == (factors.alpha, factors.rank)
        assert found.b.dtype == factors.b.dtype


# ---- headers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ONE_FILE)
def test_uis_know_what_a_file_is_for(tmp_path, format, family):
    formats.write(some(family), tmp_path / "out.safetensors", format)
    metadata = read_header(tmp_path / "out.safetensors").metadata
    # A1111's rule (modules/sd_models_networks, network.py): sdxl_ -> SDXL, ss_v2 -> SD2, any other header -> SD1.
    a1111 = (
        "sdxl"
        if metadata["ss_base_model_version"].startswith("sdxl_")
        else "sd2"
        if metadata["ss_v2"] == "True"
        else "sd1"
    )
    assert a1111 == (family if family in ("sd1", "sd2", "sdxl") else "sd1")
    assert metadata["ss_network_dim"] == "2"
    assert float(metadata["ss_network_alpha"]) == 3.0
    assert metadata["modelspec.architecture"].endswith("/lora")
    assert metadata["modelspec.sai_model_spec"]


def test_what_a_file_said_of_its_training_stays(tmp_path):
    adapter = replace(
        some("sd1"), metadata={"ss_steps": "500", "ss_base_model_version": "sd_v1", "modelspec.title": "Mine"}
    )
    formats.write(adapter, tmp_path / "a.safetensors", "kohya")
    formats.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    formats.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
    metadata = read_header(tmp_path / "c.safetensors").metadata
    assert (metadata["ss_steps"], metadata["modelspec.title"]) == ("500", "Mine")
    again = read_header(tmp_path / "a.safetensors").metadata
    assert metadata == again


def test_lycoris_names_its_algorithm(tmp_path):
    formats.write(PortableAdapter({"unet": LYCORIS["LoHa"]}, "sd1"), tmp_path / "out.safetensors", "lycoris")
    metadata = read_header(tmp_path / "out.safetensors").metadata
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"]) == {"algo": "loha"}

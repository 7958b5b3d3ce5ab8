"""Any format in, any format out: the image of a pipeline is the measure, here and in a stock pipeline."""

from __future__ import annotations

import warnings

import pytest
import torch
from format_models import loha, lokr, lora, tucker, values
from lora_adapters_diffusers import LoraPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lora_adapters import formats
from lora_adapters.errors import CheckpointError, LoraAdaptersWarning, RequestError, UnsupportedError
from lora_adapters.formats import PortableAdapter

KINDS = ("sd", "sdxl", "sd3", "flux")
FAMILIES = {"sd": "sd1", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux"}
FORMATS = ("diffusers", "peft", "kohya", "lycoris")
#: What stock diffusers reads right: no PEFT folders, and of SD3 no kohya files (it passes over them).
STOCK = {kind: {"diffusers", "kohya", "lycoris", "ai-toolkit"} for kind in KINDS} | {"sd3": {"diffusers", "ai-toolkit"}}


def adapted(tiny, kind, text=True, **options):
    """An adapter on attention, feed-forward and, in UNets, convolutions, and on text encoders; alpha is not the rank."""
    pipe = LoraPipeline(tiny.build(kind))
    name = tiny.denoiser_name(pipe.pipe)
    targets = "attention+mlp+conv" if name == "unet" else "attention+mlp"
    if kind == "flux":  # The sizes of the fused layer of a single block are those of Flux.1 in stock diffusers.
        options["exclude"] = ["single_transformer_blocks"]
    pipe.attach(components=[name], **{"rank": 4, "alpha": 2, "targets": targets, **options})
    if text:
        pipe.attach(rank=3, alpha=6, targets="attention+mlp", components=tiny.ENCODERS[kind])
    for seed, component in enumerate(pipe.adapters):
        tiny.fill(pipe.components[component], seed)
    return pipe


def loaded(tiny, kind, source, **options):
    pipe = LoraPipeline(tiny.build(kind))
    pipe.load(source, **options)
    return pipe


def stock_image(tiny, kind, source):
    pipe = tiny.build(kind)
    pipe.load_lora_weights(source)
    return tiny.image(pipe)


@pytest.mark.filterwarnings("ignore::lora_adapters.errors.LoraAdaptersWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_each_format_gives_the_same_image_here_and_in_stock_pipelines(tiny, kind, tmp_path):
    ours = adapted(tiny, kind)
    assert ours.family == FAMILIES[kind]
    wanted = tiny.image(ours.pipe)
    assert tiny.differs(wanted, tiny.image(tiny.build(kind)))
    for format in FORMATS:
        path = ours.save(tmp_path / format, format=format)
        assert formats.detect(path) == ("kohya" if format == "lycoris" else format)  # the same file, for plain LoRA
        back = loaded(tiny, kind, path)
        assert set(back.adapters) == {tiny.denoiser_name(ours.pipe), *tiny.ENCODERS[kind]}
        tiny.close(tiny.image(back.pipe), wanted, 1e-6)
        if format in STOCK[kind]:
            tiny.close(stock_image(tiny, kind, path), wanted)
    # The folders say for which family they are, so that other formats can be made of them.
    assert formats.read(tmp_path / "peft").family == FAMILIES[kind]
    with safe_open(tmp_path / "kohya" / "pytorch_lora_weights.safetensors", "pt") as file:
        header = file.metadata()
        alphas = {file.get_tensor(key).item() for key in file.keys() if key.endswith(".alpha")}  # noqa: SIM118
    assert (
        header["ss_base_model_version"]
        == {"sd": "sd_v1", "sdxl": "sdxl_base_v1-0", "sd3": "sd3", "flux": "flux1"}[kind]
    )
    assert header["modelspec.architecture"].endswith("/lora")
    # Three projections of rank 4 that are one layer in the file have rank 12 there, and alpha 6.
    assert alphas == {2.0, 6.0}


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_ai_toolkit(tiny, kind, tmp_path):
    ours = adapted(tiny, kind, text=False)
    wanted = tiny.image(ours.pipe)
    with pytest.warns(LoraAdaptersWarning, match="alphas are gone"):
        file = ours.save(tmp_path, format="ai-toolkit")
    assert formats.detect(file) == "ai-toolkit"
    tiny.close(tiny.image(loaded(tiny, kind, file).pipe), wanted)
    tiny.close(stock_image(tiny, kind, file), wanted)


@pytest.mark.filterwarnings("ignore::lora_adapters.errors.LoraAdaptersWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_stock_code_give_the_same_image_here(tiny, kind, tmp_path):
    """Made by PEFT and saved by save_lora_weights, or saved from here, in each format."""
    stock = tiny.build(kind)
    parts = [tiny.denoiser_name(stock), *tiny.ENCODERS[kind]]
    attention = ["to_q", "to_v", "to_out.0", "conv1", "q_proj", "v_proj"]
    for seed, name in enumerate(parts):
        model = getattr(stock, name)
        # What add_adapter calls; that of transformers 5.24 refuses PEFT before 0.22.
        config = LoraConfig(r=3, lora_alpha=6, target_modules=attention, use_rslora=name == "text_encoder")
        inject_adapter_in_model(config, model)
        tiny.fill(model, seed)
    wanted = tiny.image(stock)
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(getattr(stock, name)) for name in parts}
    metadata = {
        f"{name}_lora_adapter_metadata": getattr(stock, name).peft_config["default"].to_dict() for name in parts
    }
    stock.save_lora_weights(tmp_path / "stock", **layers, **metadata)
    theirs = loaded(tiny, kind, tmp_path / "stock", adapter_name="theirs")
    tiny.close(tiny.image(theirs.pipe), wanted)
    scaled = theirs.denoiser.peft_config["theirs"]
    assert (scaled.r, scaled.lora_alpha) == (3, 6)
    for format in FORMATS:
        path = LoraPipeline(stock).save(tmp_path / format, format=format)
        tiny.close(tiny.image(loaded(tiny, kind, path).pipe), wanted)
    # And what stock code loads of a file, instead of what it made.
    again = tiny.build(kind)
    again.load_lora_weights(tmp_path / "stock", adapter_name="again")
    path = LoraPipeline(again).save(tmp_path / "again", "again", format="peft")
    tiny.close(tiny.image(loaded(tiny, kind, path).pipe), wanted)


def test_dora(tiny, tmp_path):
    ours = adapted(tiny, "sd", text=False, use_dora=True)
    wanted = tiny.image(ours.pipe)
    for format in FORMATS:
        tiny.close(tiny.image(loaded(tiny, "sd", ours.save(tmp_path / format, format=format)).pipe), wanted, 1e-6)
    tiny.close(stock_image(tiny, "sd", tmp_path / "diffusers"), wanted)


def test_what_stock_code_swapped_in_is_not_saved_without_a_word(tiny, tmp_path):
    """PEFT's hot swap sets scales, and leaves the alphas of the adapter that was there before."""
    for name, alpha in (("a", 8), ("b", 2)):
        adapted(tiny, "sd", text=False, alpha=alpha).save(tmp_path / name)
    pipe = LoraPipeline(tiny.build("sd"))
    pipe.pipe.load_lora_weights(tmp_path / "a", adapter_name="it")
    pipe.pipe.load_lora_weights(tmp_path / "b", adapter_name="it", hotswap=True)
    for format in ("diffusers", "peft"):
        with pytest.warns(
            LoraAdaptersWarning, match="2 as the adapter's alpha says, and now set to 0.5; .*lost its alpha"
        ):
            pipe.save(tmp_path / f"as {format}", "it", format=format)
    pipe.hotswap(tmp_path / "b", "it")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraAdaptersWarning)
        pipe.save(tmp_path / "right", "it")
    tiny.close(stock_image(tiny, "sd", tmp_path / "right"), stock_image(tiny, "sd", tmp_path / "b"))


# ---- LoHa, LoKr, Tucker ---------------------------------------------------------------------------------------------


def odd_adapter(tiny, kind):
    """LoHa, LoKr and a Tucker core on layers of a UNet (or a transformer), DoRA on none."""
    model = getattr(tiny.build(kind), tiny.denoiser_name(tiny.build(kind)))
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    makers = [loha, lokr, lora]
    chosen = [n for n in shapes if n.endswith(("to_q", "to_out.0", "conv1", "conv_shortcut", "ff.net.2", "proj_in"))]
    modules = {}
    for index, name in enumerate(chosen):
        make = tucker if name.endswith("conv1") and index % 2 else makers[index % 3]
        if make is not lokr or all(side % 4 == 0 for side in shapes[name][:2]):
            modules[name] = make(shapes[name], alpha=8.0, seed=index)
    return PortableAdapter({tiny.denoiser_name(tiny.build(kind)): modules}, FAMILIES[kind])


def with_updates(tiny, kind, adapter):
    """A stock pipeline with an adapter's updates added to its weights, as the formulas of the factors say."""
    pipe = tiny.build(kind)
    with torch.no_grad():
        for component, module, factors in adapter:
            weight = getattr(pipe, component).get_submodule(module).weight
            weight += factors.update().reshape(weight.shape)
    return pipe


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_files(tiny, kind, tmp_path):
    adapter = odd_adapter(tiny, kind)
    assert {"LoHa", "LoKr"} < set(adapter.kinds)
    formats.write(adapter, tmp_path / "odd.safetensors", "lycoris")
    wanted = tiny.image(with_updates(tiny, kind, adapter))
    assert tiny.differs(wanted, tiny.image(tiny.build(kind)))
    with pytest.warns(LoraAdaptersWarning, match="plain LoRA now"):
        ours = loaded(tiny, kind, tmp_path / "odd.safetensors")
    tiny.close(tiny.image(ours.pipe), wanted)
    with pytest.warns(LoraAdaptersWarning, match=r"cut to rank 2: \|lost\|"):
        small = loaded(tiny, kind, tmp_path / "odd.safetensors", max_rank=2)
    assert max(layer.rank for layer in small.adapter().plan.layers) == 2
    with pytest.raises(RequestError, match="max_rank"):
        small.load(tmp_path / "odd.safetensors", adapter_name="other", max_rank=0)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_folders_of_pefts_loha_and_lokr_layers(tiny, tmp_path, config):
    pipe = tiny.build("sd")
    targets = ["to_q", "conv1", "proj_in"]
    made = config(r=2, alpha=3, target_modules=targets, rank_pattern={"conv1": 3}, init_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(pipe.unet, made)
    wanted = tiny.image(pipe)
    adapted.save_pretrained(tmp_path / "unet")
    for place in (tmp_path, tmp_path / "unet"):
        with pytest.warns(LoraAdaptersWarning, match="plain LoRA now"):
            ours = loaded(tiny, "sd", place)
        tiny.close(tiny.image(ours.pipe), wanted)


@pytest.mark.filterwarnings("ignore::lora_adapters.errors.LoraAdaptersWarning")
def test_hotswap_takes_any_format(tiny, tmp_path):
    first, second = (adapted(tiny, "sd", rank=rank, alpha=3) for rank in (4, 2))
    tiny.fill(second.denoiser, 7)
    first.save(tmp_path / "first")
    for format in ("diffusers", "peft", "kohya"):
        pipe = loaded(tiny, "sd", tmp_path / "first")
        before = [id(module) for module in pipe.denoiser.modules()]
        pipe.hotswap(second.save(tmp_path / format, format=format))
        assert before == [id(module) for module in pipe.denoiser.modules()]
        tiny.close(tiny.image(pipe.pipe), tiny.image(second.pipe))
    odd = odd_adapter(tiny, "sd")
    formats.write(odd, tmp_path / "odd.safetensors", "lycoris")
    pipe = LoraPipeline(tiny.build("sd"))
    pipe.attach(rank=2, targets="re:.")
    pipe.hotswap(tmp_path / "odd.safetensors")
    tiny.close(tiny.image(pipe.pipe), tiny.image(with_updates(tiny, "sd", odd)))


# ---- names and shapes of others -------------------------------------------------------------------------------------


def test_factors_stored_as_those_of_a_1x1_convolution_or_flat(tiny, tmp_path):
    """SD1's proj_in is a convolution, SDXL's is linear, and files have either for both."""
    name = "mid_block.attentions.0.proj_in"
    for kind, shape, other in (("sd", (32, 32, 1, 1), (32, 32)), ("sdxl", (32, 32), (32, 32, 1, 1))):
        images = []
        for number, each in enumerate((shape, other)):
            formats.write(
                PortableAdapter({"unet": {name: lora(each, alpha=40)}}), tmp_path / f"{kind}{number}.safetensors"
            )
            images.append(tiny.image(loaded(tiny, kind, tmp_path / f"{kind}{number}.safetensors").pipe))
        assert torch.equal(*images)
        assert tiny.differs(images[0], tiny.image(tiny.build(kind)))


def test_old_keys_and_state_dicts(tiny, tmp_path):
    pipe = adapted(tiny, "sd")
    state = load_file(pipe.save(tmp_path, format="kohya"))
    tiny.close(tiny.image(loaded(tiny, "sd", state).pipe), tiny.image(pipe.pipe), 1e-6)
    place = "mid_block.attentions.0.transformer_blocks.0.attn1.{}to_q{}.weight"
    a, b = values(2, 32), 10 * values(32, 2, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old = loaded(
            tiny, "sd", {place.format("processor.", "_lora.down"): a, place.format("processor.", "_lora.up"): b}
        )
        new = loaded(tiny, "sd", {f"unet.{place.format('', '.lora_A')}": a, f"unet.{place.format('', '.lora_B')}": b})
    assert torch.equal(tiny.image(old.pipe), tiny.image(new.pipe))


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_files_for_other_pipelines(tiny, tmp_path):
    clip = "text_model.encoder.layers.0.self_attn.q_proj"
    formats.write(
        PortableAdapter(
            {"unet": {"mid_block.attentions.0.proj_in": lora((32, 32))}, "text_encoder_2": {clip: lora((32, 32))}}
        ),
        tmp_path / "sdxl.safetensors",
        "kohya",
        "sdxl",
    )
    pipe = LoraPipeline(tiny.build("sd"))
    with pytest.raises(UnsupportedError, match="By its header it is for sdxl, and this pipeline is sd1"):
        pipe.load(tmp_path / "sdxl.safetensors")
    t5 = PortableAdapter({"text_encoder_3": {"encoder.block.0.layer.0.SelfAttention.q": lora((64, 64))}})
    formats.write(t5, tmp_path / "t5.safetensors", "kohya", "sd3")
    sd3 = LoraPipeline(tiny.build("sd3"))
    with pytest.raises(CheckpointError, match="adapts the text_encoder_3"):
        sd3.load(tmp_path / "t5.safetensors")
    assert pipe.adapters == sd3.adapters == {}


def test_a_peft_folder_that_fits_several_parts(tiny, tmp_path):
    pipe = LoraPipeline(tiny.build("sd3"))
    made = pipe.attach(rank=2, components=["text_encoder_2"], init_lora_weights=False)
    wanted = tiny.image(pipe.pipe)
    made["text_encoder_2"].save(tmp_path / "mine")
    other = LoraPipeline(tiny.build("sd3"))
    with pytest.raises(CheckpointError, match=r"fits several parts .*text_encoder, text_encoder_2"):
        other.load(tmp_path / "mine")
    (tmp_path / "mine").rename(tmp_path / "text_encoder_2")
    other.load(tmp_path / "text_encoder_2")
    tiny.close(tiny.image(other.pipe), wanted, 1e-6)


def test_what_formats_can_not_hold_is_said_before_anything_is_written(tiny, tmp_path):
    pipe = LoraPipeline(tiny.build("sd"))
    pipe.attach(rank=2, lora_bias=True)
    for format, reason in (("kohya", "lora_bias"), ("lycoris", "lora_bias"), ("ai-toolkit", "holds a transformer's")):
        with pytest.raises(UnsupportedError, match=reason):
            pipe.save(tmp_path, format=format)
    one = tiny.sdxl()
    one.unet = tiny.unet(**{name: one.unet.config[name] for name in SDXL_FIELDS}, layers_per_block=1)
    pipe = LoraPipeline(one)
    pipe.attach(rank=2)
    with pytest.raises(UnsupportedError, match="2 resnets in a block, and this UNet has 1"):
        pipe.save(tmp_path, format="kohya")
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="other files"):
        pipe.save(tmp_path, format="peft")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


SDXL_FIELDS = (
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    *("cross_attention_dim", "use_linear_projection"),
)


def test_the_family_is_told_by_the_parts(tiny):
    from lora_adapters_diffusers.families import pipeline_family

    encoder = tiny.clip(0)
    assert pipeline_family(tiny.unet(), encoder) == "sd1"
    assert pipeline_family(tiny.unet(use_linear_projection=True), encoder) == "sd2"
    assert pipeline_family(tiny.unet(cross_attention_dim=1024), None) == "sd2"
    assert pipeline_family(tiny.unet(), tiny.t5(0)) == ""
    with_hint = dict(addition_embed_type="image", addition_embed_type_num_heads=4, encoder_hid_dim=8)
    assert pipeline_family(tiny.unet(**with_hint), encoder) == ""
    assert pipeline_family(nn.Linear(1, 1), None) == ""

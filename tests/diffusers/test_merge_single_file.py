"""Merging into checkpoints of one file and into pipelines' folders: stock diffusers makes the adapted pipeline's images."""

import json
import shutil

import pytest
import single_files
import torch
from click.testing import CliRunner
from format_models import loha, lokr, lora, tucker, values
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_adapters as la
from lora_adapters import cli, formats
from lora_adapters.errors import CheckpointError, MergeError, RequestError, UnsupportedError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "proj_in", "proj_out")
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module")
def bases(tiny, tmp_path_factory):
    """Family -> (pipeline, its single file, its folder)."""
    root, made = tmp_path_factory.mktemp("bases"), {}
    for family, build in {
        "sd1": lambda _: tiny.build("sd"),
        "sd2": single_files.sd2,
        "sdxl": single_files.sdxl,
    }.items():
        pipe = build(tiny)
        file, folder = root / f"{family}.safetensors", root / family
        single_files.write(pipe, file, family, metadata={"modelspec.title": "tiny", "modelspec.hash_sha256": "0x1"})
        pipe.save_pretrained(folder)
        made[family] = pipe, file, folder
    return made


def layers(model, ends):
    kinds = (nn.Linear, nn.Conv2d)
    found = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, kinds)}
    return {name: shape for name, shape in found.items() if name.endswith(ends)}


def adapter_on(pipe, family, kinds=(lora,), ends=ATTENTION, clip=(*CLIP, "text_projection"), **more):
    """An adapter on the denoiser and on every CLIP, of kinds that take turns."""
    components = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        if model is not None:
            mine = ends if component == "unet" else clip
            found = {
                name if component == "unet" or name.startswith("text_") else f"text_model.{name}": kinds[
                    i % len(kinds)
                ](shape, seed=10 * i, **more)
                for i, (name, shape) in enumerate(layers(model, mine).items())
            }
            components |= {component: found} if found else {}
    return formats.PortableAdapter(components, family)


def merged_by_hand(pipe, adapter, scale=1.0):
    """Add every update to the weight of its layer, in float64, and return the weights (component, layer) by name."""
    for component, module, factors in adapter:
        model = getattr(pipe, component)
        flat = not hasattr(model, "text_model") and module.startswith("text_model.")
        layer = model.get_submodule(module.removeprefix("text_model.") if flat else module)
        with torch.no_grad():
            weight = layer.weight.double() + scale * factors.update()
            if factors.magnitude is not None:
                first = weight if factors.magnitude_axis == "output" else weight.transpose(0, 1)
                ratio = factors.magnitude.double() / first.flatten(1).norm(dim=1)
                first *= ratio.reshape(-1, *[1] * (weight.dim() - 1))
            layer.weight.copy_(weight)
    return pipe


def stock(base, file, folder):
    made = type(base).from_single_file(str(file), config=str(folder), local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def weights_of(pipe):
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    models = {name: getattr(pipe, name, None) for name in parts}
    return {f"{part}.{name}": v for part, m in models.items() if m is not None for name, v in m.state_dict().items()}


def copy_of(pipe):
    import copy

    models = {name: copy.deepcopy(m) if isinstance(m, nn.Module) else m for name, m in pipe.components.items()}
    made = type(pipe)(**models)
    made.set_progress_bar_config(disable=True)
    return made


def same_weights(one, other, limit=2e-6):
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=limit, atol=limit, msg=name)


# ---- single files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_merged_file_makes_the_image_of_the_pipeline_that_carries_the_adapter(bases, tiny, family, tmp_path):
    pipe, file, folder = bases[family]
    ends = (*ATTENTION, *CONVOLUTIONS)
    adapter = adapter_on(pipe, family, ends=ends, rank=3, alpha=2.0)
    if family == "sd2":  # The text encoder's class has no projection, and the file has none.
        assert "text_projection" not in adapter.components["text_encoder"]
    formats.write(adapter, tmp_path / "adapter.safetensors", "diffusers")
    made = la.merge_checkpoint(file, tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors")
    assert (made.folder, made.model, made.layers) == (tmp_path / "merged.safetensors", family, len(adapter))
    merged = stock(pipe, made.folder, folder)

    carrying = copy_of(pipe)
    with_projection = adapter.components.get("text_encoder_2", {}).pop("text_projection", None)
    formats.write(adapter, tmp_path / "stock.safetensors", "diffusers")
    carrying.load_lora_weights(tmp_path / "stock.safetensors")
    if with_projection:  # Stock diffusers does not put an adapter on it.
        merged_by_hand(carrying, formats.PortableAdapter({"text_encoder_2": {"text_projection": with_projection}}))
    expected = tiny.image(carrying)
    tiny.close(tiny.image(merged), expected)
    assert tiny.differs(tiny.image(pipe), expected)

    # What was not touched has its bits, and the file its names, order and metadata.
    before, after = load_file(file), load_file(made.folder)
    assert list(before) == list(after)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    fused = sum(
        name.endswith(("k_proj", "v_proj")) for c, name, _ in adapter if c == "text_encoder_2" or family == "sd2"
    )
    assert len(changed) == made.layers - fused
    assert not any(key.startswith("first_stage_model") or key.endswith("bias") for key in changed)
    with safe_open(made.folder, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.title"] == "tiny"
    assert "modelspec.hash_sha256" not in metadata
    record = {"adapter": "adapter.safetensors", "scale": 1.0, "layers": made.layers}
    assert json.loads(metadata["lora_adapters.merged"]) == [record]


def dora(shape, seed=0, **more):
    return lora(shape, seed=seed, magnitude=1 + values(shape[0], seed=seed + 5), **more)


def test_every_kind_of_adapter_and_a_scale(bases, tiny, tmp_path):
    pipe, file, folder = bases["sdxl"]

    def kron(shape, seed):
        return lokr(shape, first=(2, 2), seed=seed)

    def cored(shape, seed):
        return (tucker if len(shape) > 2 else lora)(shape, seed=seed)

    def inner(shape, seed):  # DoRA with a magnitude for each input, as older LyCORIS has it
        return lora(shape, seed=seed, magnitude=1 + values(shape[1], seed=seed + 5), magnitude_axis="input")

    # CLIP's feed-forward is 37 wide here, which no Kronecker product is.
    kinds, ends = (loha, kron, cored, dora, inner), (*ATTENTION, *CONVOLUTIONS)
    adapter = adapter_on(pipe, "sdxl", kinds, ends, clip=("q_proj", "k_proj", "v_proj", "out_proj"))
    formats.write(adapter, tmp_path / "adapter.safetensors", "lycoris")
    la.merge_checkpoint(file, tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors", scale=0.5)
    same_weights(stock(pipe, tmp_path / "merged.safetensors", folder), merged_by_hand(copy_of(pipe), adapter, 0.5))


def test_dora_as_stock_peft_fuses_it(bases, tiny, tmp_path):
    pipe, file, folder = bases["sd1"]
    # On the UNet alone: transformers 5 loads a text encoder's magnitudes under names that it then does not find.
    adapter = adapter_on(pipe, "sd1", (dora,), (*ATTENTION, "conv1"), clip=("none",))
    formats.write(adapter, tmp_path / "adapter.safetensors", "diffusers")
    la.merge_checkpoint(file, tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors", scale=0.5)
    fused = copy_of(pipe)
    fused.load_lora_weights(tmp_path / "adapter.safetensors")
    fused.fuse_lora(components=["unet"], lora_scale=0.5)
    fused.unload_lora_weights()
    same_weights(stock(pipe, tmp_path / "merged.safetensors", folder), fused, 1e-5)


def test_kohyas_file_and_a_file_of_16_bits(bases, tiny, tmp_path):
    pipe, _, folder = bases["sdxl"]
    half = tmp_path / "half.safetensors"
    single_files.write(pipe, half, "sdxl", torch.float16)
    adapter = adapter_on(pipe, "sdxl", alpha=1.0)
    formats.write(adapter, tmp_path / "kohya.safetensors", "kohya", "sdxl")
    made = la.merge_checkpoint(half, tmp_path / "kohya.safetensors", tmp_path / "merged.safetensors")
    assert made.dtype == "float16"
    exact = la.merge_checkpoint(half, tmp_path / "kohya.safetensors", tmp_path / "wide.safetensors", dtype="float32")
    assert exact.dtype == "float32"
    before, after, wide = load_file(half), load_file(made.folder), load_file(exact.folder)
    # One rounding: float16 is the rounded sum, not a sum of rounded terms.
    assert all(torch.equal(after[key], wide[key].half()) for key in before)
    assert {value.dtype for value in wide.values()} == {torch.float32}
    pipe = copy_of(pipe)
    (
        pipe.unet.half().float(),
        pipe.text_encoder.half().float(),
        pipe.text_encoder_2.half().float(),
        pipe.vae.half().float(),
    )
    same_weights(stock(pipe, exact.folder, folder), merged_by_hand(pipe, adapter))


def test_older_checkpoints_of_sd1(bases, tmp_path):
    pipe, file, _ = bases["sd1"]
    formats.write(adapter_on(pipe, "sd1"), tmp_path / "adapter.safetensors", "kohya")
    old = {key.replace(".text_model.", "."): value for key, value in load_file(file).items()}
    save_file({**old, "model_ema.diffusion_modelout2weight": torch.ones(2)}, tmp_path / "old.safetensors")
    plain = la.merge_checkpoint(file, tmp_path / "adapter.safetensors", tmp_path / "plain.safetensors")
    made = la.merge_checkpoint(
        tmp_path / "old.safetensors", tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors"
    )
    assert "model_ema" in made.notes[-1]
    assert not plain.notes
    merged = load_file(made.folder)
    assert torch.equal(merged.pop("model_ema.diffusion_modelout2weight"), torch.ones(2))
    wanted = {key.replace(".text_model.", "."): value for key, value in load_file(plain.folder).items()}
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[key], wanted[key]) for key in merged)


def test_the_command_and_one_of_three_fused_layers(bases, tmp_path):
    _, file, _ = bases["sdxl"]
    adapter, out = tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors"
    factors = lora((48, 48), seed=3)
    name = "text_model.encoder.layers.1.self_attn.k_proj"
    formats.write(formats.PortableAdapter({"text_encoder_2": {name: factors}}, "sdxl"), adapter, "kohya")
    arguments = ["merge", str(adapter), str(out)]
    without = CliRunner().invoke(cli.cli, arguments)
    assert "does not name its base" in str(without.exception)
    done = CliRunner().invoke(cli.cli, [*arguments, "--base", str(file), "--scale", "-0.5", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["model"], said["dtype"], said["layers"], said["folder"]) == ("sdxl", "float32", 1, str(out))
    key = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    before, after = load_file(file), load_file(out)
    assert {k for k in before if not torch.equal(before[k], after[k])} == {key}
    expected = before[key].clone().double()
    expected[48:96] -= 0.5 * factors.update()
    assert torch.equal(after[key], expected.float())


# ---- folders ----------------------------------------------------------------------------------------------------------


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_merged_folder_makes_the_image_of_the_adapted_pipeline(bases, tiny, tmp_path):
    pipe, file, _ = bases["sdxl"]
    base = tmp_path / "base"
    pipe.save_pretrained(base)
    shutil.rmtree(base / "unet")
    pipe.unet.save_pretrained(base / "unet", max_shard_size="200KB")
    copy_of(pipe).unet.half().save_pretrained(base / "unet", variant="fp16")
    (base / "unet/diffusion_pytorch_model.bin").write_bytes(b"the weights from before")
    shutil.copy(file, base / "sdxl.safetensors")
    adapter = adapter_on(pipe, "sdxl", ends=(*ATTENTION, *CONVOLUTIONS), alpha=2.0)
    adapter.components.pop("text_encoder")
    formats.write(adapter, tmp_path / "adapter", "peft")
    made = la.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert "left out" in made.notes[-1]
    assert "unet/diffusion_pytorch_model.bin" in made.notes[-1]

    before, after = everything(base), everything(tmp_path / "merged")
    assert before.keys() - after.keys() == {"unet/diffusion_pytorch_model.bin", "sdxl.safetensors"}
    changed = {name for name in after if before[name] != after[name]}
    shards = {name for name in after if name.startswith("unet/") and name.endswith(".safetensors")}
    assert len(shards) > 2
    assert changed == {*shards, "text_encoder_2/model.safetensors"}
    merged = type(pipe).from_pretrained(tmp_path / "merged")
    merged.set_progress_bar_config(disable=True)
    by_hand = merged_by_hand(copy_of(pipe), adapter)
    same_weights(merged, by_hand)
    tiny.close(tiny.image(merged), tiny.image(by_hand))
    assert tiny.differs(tiny.image(merged), tiny.image(pipe))
    half = type(pipe.unet).from_pretrained(tmp_path / "merged/unet", variant="fp16", torch_dtype=torch.float16)
    for name, value in half.state_dict().items():
        torch.testing.assert_close(value.float(), by_hand.unet.state_dict()[name], rtol=2e-3, atol=2e-3)


def test_the_folder_of_a_denoiser_and_another_dtype(bases, tmp_path):
    pipe, _, folder = bases["sd1"]
    unet = formats.PortableAdapter({"unet": adapter_on(pipe, "sd1").components["unet"]}, "sd1")
    formats.write(unet, tmp_path / "adapter.safetensors", "kohya")
    la.merge_checkpoint(folder / "unet", tmp_path / "adapter.safetensors", tmp_path / "unet")
    by_hand = merged_by_hand(copy_of(pipe), unet)
    merged = type(pipe.unet).from_pretrained(tmp_path / "unet")
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, by_hand.unet.state_dict()[name], rtol=2e-6, atol=2e-6)

    before = everything(tmp_path / "unet")
    with pytest.raises(RequestError, match="holds files already"):
        la.merge_checkpoint(folder / "unet", tmp_path / "adapter.safetensors", tmp_path / "unet", scale=0.5)
    assert everything(tmp_path / "unet") == before
    la.merge_checkpoint(folder / "unet", tmp_path / "adapter.safetensors", tmp_path / "unet", scale=0.5, overwrite=True)
    assert everything(tmp_path / "unet") != before

    half = la.merge_checkpoint(folder, tmp_path / "adapter.safetensors", tmp_path / "half", dtype=torch.bfloat16)
    assert half.dtype == "bfloat16"
    files = sorted(half.folder.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "unet", "vae"]
    assert {value.dtype for file in files for value in load_file(file).values()} == {torch.bfloat16}
    assert json.loads((half.folder / "text_encoder/config.json").read_text())["dtype"] == "bfloat16"


# ---- refused, with nothing written ------------------------------------------------------------------------------------


def refused(error, message, base, adapter, out, **options):
    before = everything(out.parent)
    with pytest.raises(error, match=message):
        la.merge_checkpoint(base, adapter, out, **options)
    assert everything(out.parent) == before
    assert not list(out.parent.glob(".*saving*"))


def test_what_does_not_fit_is_named_before_anything_is_written(bases, tmp_path):
    pipe, file, folder = bases["sd1"]
    adapter = adapter_on(pipe, "sd1")
    path, out = tmp_path / "adapter.safetensors", tmp_path / "out.safetensors"
    formats.write(adapter, path, "diffusers")
    refused(CheckpointError, r"another model \(it is for sd1\): .*sdxl.safetensors lacks", bases["sdxl"][1], path, out)
    unet = {**adapter.components["unet"], "up_blocks.7.resnets.0.conv1": lora((8, 8, 3, 3))}
    formats.write(formats.PortableAdapter({"unet": unet}, "sd1"), tmp_path / "deep.safetensors", "diffusers")
    message = r"lacks 1 of its \d+ layers, 'up_blocks.7.resnets.0.conv1' of the unet"
    refused(CheckpointError, message, file, tmp_path / "deep.safetensors", out)
    refused(CheckpointError, message, folder, tmp_path / "deep.safetensors", tmp_path / "out")
    name = next(iter(adapter.components["unet"]))
    wide = formats.PortableAdapter({"unet": {name: lora((8, 8))}}, "sd1")
    formats.write(wide, tmp_path / "wide.safetensors", "diffusers")
    refused(CheckpointError, r"is \[8, 8\], and that of", file, tmp_path / "wide.safetensors", out)
    biased = formats.PortableAdapter({"unet": {name: lora((16, 16), bias=values(16))}}, "sd1")
    formats.write(biased, tmp_path / "biased.safetensors", "diffusers")
    refused(UnsupportedError, "has none to add it to", file, tmp_path / "biased.safetensors", out)
    refused(CheckpointError, "layers of the text_encoder", folder / "unet", path, tmp_path / "out")


def test_bases_and_places_that_are_refused(bases, tmp_path):
    pipe, file, folder = bases["sd1"]
    path, out = tmp_path / "adapter.safetensors", tmp_path / "out.safetensors"
    formats.write(adapter_on(pipe, "sd1"), path, "diffusers")
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
    save_file({**tensors, f"{key}.absmax": torch.ones(2)}, tmp_path / "four.safetensors")
    refused(UnsupportedError, "is quantized .*absmax", tmp_path / "four.safetensors", path, out)
    save_file({**tensors, key: tensors[key].to(torch.float8_e4m3fn)}, tmp_path / "eight.safetensors")
    refused(UnsupportedError, "stores .* as F8_E4M3", tmp_path / "eight.safetensors", path, out)
    shutil.copytree(folder, tmp_path / "nf4")
    config = tmp_path / "nf4/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"load_in_4bit": True}}))
    refused(UnsupportedError, "unet is quantized", tmp_path / "nf4", path, tmp_path / "out")
    (tmp_path / "base.ckpt").write_bytes(b"x")
    refused(UnsupportedError, "is a pickle", tmp_path / "base.ckpt", path, out)

    refused(RequestError, "name it, as .*out.safetensors", file, path, tmp_path / "out")
    refused(RequestError, "exists.*--overwrite", file, path, tmp_path / "four.safetensors")
    refused(RequestError, "is read for the merge", file, path, path, overwrite=True)
    refused(RequestError, "lies in .*, which is copied", tmp_path / "nf4", path, tmp_path / "nf4/out")
    refused(RequestError, "scale must be a number", file, path, out, scale=float("nan"))
    refused(RequestError, "revision has no meaning", file, path, out, revision="main")
    refused(RequestError, "dtype must be", file, path, out, dtype="int8")
    la.merge_checkpoint(file, path, tmp_path / "four.safetensors", overwrite=True)
    assert f"{key}.absmax" not in load_file(tmp_path / "four.safetensors")


def test_a_failure_midway_leaves_nothing_behind(bases, tmp_path, monkeypatch):
    pipe, file, folder = bases["sd1"]
    path = tmp_path / "adapter.safetensors"
    formats.write(adapter_on(pipe, "sd1", alpha=1e6), path, "diffusers")
    half = tmp_path / "half.safetensors"
    single_files.write(pipe, half, "sd1", torch.float16)
    message = "'.*weight' would hold values that are not finite in float16"
    refused(MergeError, message, half, path, tmp_path / "out.safetensors", scale=1e3)
    refused(MergeError, "not finite in float16", folder, path, tmp_path / "out", dtype="float16", scale=1e3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_adapters.tensor_stream._copy", full)
    refused(CheckpointError, "No space left", file, path, tmp_path / "out.safetensors")
    refused(CheckpointError, "No space left", folder, path, tmp_path / "out")

"""Merging into single files of Flux and SD3, whose q, k and v are one tensor: as stock diffusers converts them."""

import pytest
import torch
from format_models import lora, values
from safetensors.torch import load_file, save_file

import lora_adapters as la
from lora_adapters import formats

WIDTH = 16
_WIDE = 4 * WIDTH


def _linear(**shapes):
    found = {}
    for seed, (name, (out, inside)) in enumerate(shapes.items()):
        found |= {f"{name}.weight": values(out, inside, seed=seed), f"{name}.bias": values(out, seed=seed + 1)}
    return found


def flux():
    """Flux with one double and one single block, in Black Forest Labs' names."""
    shapes = {"img_in": (WIDTH, 4), "txt_in": (WIDTH, 8), "final_layer.linear": (4, WIDTH)}
    shapes["final_layer.adaLN_modulation.1"] = (2 * WIDTH, WIDTH)
    for name in ("time_in", "vector_in", "guidance_in"):
        shapes |= {f"{name}.in_layer": (WIDTH, 8), f"{name}.out_layer": (WIDTH, WIDTH)}
    norms = {}
    for stream in ("img", "txt"):
        there = f"double_blocks.0.{stream}"
        shapes |= {f"{there}_mod.lin": (6 * WIDTH, WIDTH), f"{there}_attn.qkv": (3 * WIDTH, WIDTH)}
        shapes |= {f"{there}_attn.proj": (WIDTH, WIDTH), f"{there}_mlp.0": (_WIDE, WIDTH)}
        shapes |= {f"{there}_mlp.2": (WIDTH, _WIDE)}
        norms |= {f"{there}_attn.norm.{name}_norm.scale": torch.ones(8) for name in ("query", "key")}
    there = "single_blocks.0"
    shapes |= {f"{there}.linear1": (3 * WIDTH + _WIDE, WIDTH), f"{there}.linear2": (WIDTH, WIDTH + _WIDE)}
    shapes |= {f"{there}.modulation.lin": (3 * WIDTH, WIDTH)}
    norms |= {f"{there}.norm.{name}_norm.scale": torch.ones(8) for name in ("query", "key")}
    return _linear(**shapes) | norms


def sd3():
    """SD3 with two blocks, the first with a second attention, in Stability AI's names."""
    shapes = {"context_embedder": (WIDTH, 8), "final_layer.linear": (16, WIDTH)}
    shapes["final_layer.adaLN_modulation.1"] = (2 * WIDTH, WIDTH)
    for name in ("t_embedder", "y_embedder"):
        shapes |= {f"{name}.mlp.0": (WIDTH, 8), f"{name}.mlp.2": (WIDTH, WIDTH)}
    for block in (0, 1):
        for stream in ("x", "context"):
            there, last = f"joint_blocks.{block}.{stream}_block", block == 1 and stream == "context"
            parts = 9 if block == 0 and stream == "x" else 2 if last else 6
            shapes |= {f"{there}.adaLN_modulation.1": (parts * WIDTH, WIDTH), f"{there}.attn.qkv": (3 * WIDTH, WIDTH)}
            if not last:
                shapes |= {f"{there}.attn.proj": (WIDTH, WIDTH), f"{there}.mlp.fc1": (_WIDE, WIDTH)}
                shapes |= {f"{there}.mlp.fc2": (WIDTH, _WIDE)}
    shapes |= {
        "joint_blocks.0.x_block.attn2.qkv": (3 * WIDTH, WIDTH),
        "joint_blocks.0.x_block.attn2.proj": (WIDTH, WIDTH),
    }
    patch = {"x_embedder.proj.weight": values(WIDTH, 4, 2, 2), "x_embedder.proj.bias": values(WIDTH)}
    return _linear(**shapes) | patch | {"pos_embed": values(1, 16, WIDTH)}


def converted(family, tensors):
    """Return the tensors in diffusers' names, by stock diffusers' converter."""
    from diffusers.loaders import single_file_utils as stock

    tensors = {key: value.clone() for key, value in tensors.items()}
    if family == "sd3":
        return stock.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    split = torch.split
    with pytest.MonkeyPatch.context() as patch:
        # The converter has Flux's own width as a number in it.
        patch.setattr(torch, "split", lambda tensor, sizes, dim: split(tensor, [WIDTH] * 3 + [_WIDE], dim))
        return stock.convert_flux_transformer_checkpoint_to_diffusers(tensors)


@pytest.mark.parametrize(("family", "prefix"), [("flux", ""), ("sd3", "model.diffusion_model.")])
def test_every_layer_of_a_transformer_in_one_file(family, prefix, tmp_path):
    pytest.importorskip("diffusers")
    released = {f"{prefix}{key}": value for key, value in {"flux": flux, "sd3": sd3}[family]().items()}
    save_file(released, tmp_path / "base.safetensors")
    before = converted(family, released)
    names = [key.removesuffix(".weight") for key in before if key.endswith(".weight") and before[key].dim() > 1]
    # No file of diffusers holds magnitudes or biases of some layers, so the kinds are merged one after the other.
    parts = {"plain": {}, "biased": {}, "dora": {}}
    for index, name in enumerate(sorted(names)):
        shape, kind = tuple(before[f"{name}.weight"].shape), list(parts)[index % 3]
        more = {"biased": {"bias": values(shape[0])}, "dora": {"magnitude": 1 + values(shape[0])}}.get(kind, {})
        parts[kind][name] = lora(shape, 2, 3.0, index, **more)
    assert len(names) == {"flux": 30, "sd3": 37}[family]
    base = tmp_path / "base.safetensors"
    for kind, part in parts.items():
        adapter = formats.PortableAdapter({"transformer": part}, family)
        formats.write(adapter, tmp_path / f"{kind}-adapter.safetensors", "diffusers")
        made = la.merge_checkpoint(base, tmp_path / f"{kind}-adapter.safetensors", tmp_path / f"{kind}.safetensors")
        assert (made.model, made.layers) == (family, len(part))
        base = made.folder
    after = converted(family, load_file(base))
    expected = {key: value.double() for key, value in before.items()}
    for name, factors in (parts["plain"] | parts["biased"] | parts["dora"]).items():
        weight = expected[f"{name}.weight"] + factors.update()
        if factors.magnitude is not None:
            norm = weight.flatten(1).norm(dim=1)
            weight = weight * (factors.magnitude.double() / norm).reshape(-1, *[1] * (weight.dim() - 1))
        expected[f"{name}.weight"] = weight
        if factors.bias is not None:
            expected[f"{name}.bias"] = expected[f"{name}.bias"] + factors.scaling * factors.bias.double()
    assert after.keys() == expected.keys()
    for key, value in after.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-6, atol=1e-6, msg=key)
    assert all(not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"]) for name in names)

"""Adapters on pipelines whose weights are elsewhere between calls: hooks of accelerate and diffusers, on the CPU."""

from __future__ import annotations

import accelerate
import pytest
import torch
from lora_adapters_diffusers import LoraPipeline

import lora_adapters as la
from lora_adapters.errors import MergeError, RequestError, UnsupportedError


def sequential(pipe):
    """Do what enable_sequential_cpu_offload does, which names the device "cpu:0", for accelerate not the same as "cpu"."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(part, torch.device("cpu"))
    assert {p.device.type for p in LoraPipeline(pipe).denoiser.parameters()} == {"meta"}


def group(pipe, **options):
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **options)


def hooks(pipe):
    """Return the kinds of hooks that are on a pipeline's modules."""
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    theirs = {type(m._hf_hook).__name__ for m in modules if hasattr(m, "_hf_hook")}
    own = {name for m in modules if hasattr(m, "_diffusers_hook") for name in m._diffusers_hook.hooks}
    return theirs | own


WAYS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequential,
    "group by leaf": lambda pipe: group(pipe, offload_type="leaf_level"),
    "group by block": lambda pipe: group(pipe, offload_type="block_level", num_blocks_per_group=1),
}


KINDS = dict(zip(WAYS, ("flux", "sd", "sdxl", "sd3"), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_offloaded(tiny, way, tmp_path):
    """Every method gives the images that it gives in a plain pipeline, and the hooks are there afterwards."""
    kind = KINDS[way]
    tiny.trained(kind).save(tmp_path / "a")
    lora, plain = LoraPipeline(tiny.build(kind)), LoraPipeline(tiny.build(kind))
    WAYS[way](lora.pipe)
    before = hooks(lora.pipe)
    assert before
    bare = tiny.predict(plain.pipe).detach()

    @torch.no_grad()
    def same():
        assert hooks(lora.pipe) == before
        expected = tiny.predict(plain.pipe)
        tiny.close(tiny.predict(lora.pipe), expected, 1e-5)
        assert hooks(lora.pipe) == before
        return expected

    def each(act):
        for each in (lora, plain):
            act(each)
        return same()

    on = each(lambda it: it.load(tmp_path / "a", adapter_name="a"))
    assert tiny.differs(on, bare)
    tiny.close(tiny.image(lora.pipe), tiny.image(plain.pipe), 1e-5)
    each(lambda it: it.attach(rank=2, adapter_name="b", init_lora_weights=False, seed=3))
    both = each(lambda it: it.set({"a": 0.5, "b": 1.5}))
    tiny.close(each(lambda it: it.fuse()), both)
    assert torch.equal(each(lambda it: it.unfuse()), both)
    lora.save(tmp_path / "b", "b")
    each(lambda it: it.delete("b"))
    each(lambda it: it.load(tmp_path / "b", adapter_name="b"))
    each(lambda it: it.hotswap(tmp_path / "b", adapter_name="b"))
    with pytest.raises(RequestError, match="no adapter"):
        lora.delete("c")
    with pytest.raises(la.errors.NoTargetError):
        lora.attach(targets="router", adapter_name="c")
    same()
    each(lambda it: it.optimize())
    each(lambda it: it.delete("a"))
    tiny.close(each(lambda it: it.delete("b")), bare)


def test_what_stock_code_can_not_fuse_under_hooks_is_refused(tiny, tmp_path):
    """diffusers' hooks hold the old layers' forwards: fused without taking them off, images would be the old ones."""
    lora = tiny.trained("flux")
    expected = tiny.image(lora.pipe)
    group(lora.pipe, offload_type="leaf_level")
    with pytest.raises(MergeError, match=r"LoraPipeline\.fuse"):
        lora.pipe.fuse_lora(components=["transformer"])
    tiny.close(tiny.image(lora.pipe), expected, 1e-5)


def test_weights_on_the_disk(tiny, tmp_path):
    lora = LoraPipeline(tiny.build("flux"))
    group(lora.pipe, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    with pytest.raises(UnsupportedError, match="on the disk"):
        lora.attach(rank=2)
    assert lora.adapters == {}

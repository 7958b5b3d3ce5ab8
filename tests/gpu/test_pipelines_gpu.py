"""Pipelines on CUDA: training in mixed precision on dense and 4-bit bases, fusing, offloading, compiled swaps, memory."""

import gc
import importlib
from pathlib import Path

import pytest
import torch
from lora_adapters_diffusers import LoraPipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KINDS = ("sd", "sdxl", "flux", "sd3")
DEVICE = "cuda"


@pytest.fixture(scope="module")
def tiny():
    """The module that builds tiny pipelines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "diffusers"))
        yield importlib.import_module("pipelines")


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """Without TF32, and without cuDNN's attention, whose backward pass gives NaN (pytorch/pytorch#196678)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


def picture(tiny, pipe):
    return tiny.image(pipe).float().cpu()


def parts_of(tiny, kind, pipe):
    return [tiny.denoiser_name(pipe), *tiny.ENCODERS[kind]]


def build(tiny, kind, dtype=torch.float32, quantized=False):
    """Return a LoraPipeline on the GPU, its denoiser and encoders in NF4 if asked."""
    pipe = tiny.build(kind).to(DEVICE, dtype)
    quantization = dict.fromkeys(parts_of(tiny, kind, pipe), "nf4") if quantized else None
    return LoraPipeline(pipe, quantization=quantization)


def base_weights(lora):
    return {
        f"{part}.{name.replace('.base_layer', '')}": value.detach().clone()
        for part, module in lora.components.items()
        for name, value in module.state_dict().items()
        if ".lora_" not in name
    }


def same_weights(lora, before):
    now = base_weights(lora)
    assert now.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in now.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_train_fuse_save_load(tiny, kind, quantized, dtype, tmp_path):
    """Adapters of a 16-bit pipeline are fp32, train under autocast and a gradient scaler, and leave the base as it is."""
    lora = build(tiny, kind, dtype, quantized)
    bare, before = picture(tiny, lora.pipe), base_weights(lora)
    made = lora.attach(targets=tiny.convolutions(kind), seed=0)
    made |= lora.attach(rank=3, alpha=6, components=tiny.ENCODERS[kind], seed=0)
    limit = 0.03 if dtype == torch.bfloat16 else 0.02  # what rounding to 16 bits in another order does
    tiny.close(picture(tiny, lora.pipe), bare, limit)
    parameters = [p for adapter in made.values() for p in adapter.parameters()]
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0, enabled=dtype == torch.float16)
    goal, losses = None, []
    for _ in range(8):
        with torch.autocast(DEVICE, dtype):
            found = tiny.predict(lora.pipe).float()
        goal = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) if goal is None else goal
        loss = (found - goal).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in parameters)
    same_weights(lora, before)

    on = picture(tiny, lora.pipe)
    assert on.isfinite().all()
    assert (on - bare).abs().max() > 2 * limit
    lora.fuse()
    tiny.close(picture(tiny, lora.pipe), on, limit)
    lora.unfuse()
    same_weights(lora, before)
    tiny.close(picture(tiny, lora.pipe), on, 1e-3)
    lora.save(tmp_path)
    again = build(tiny, kind, dtype, quantized)
    again.load(tmp_path)
    tiny.close(picture(tiny, again.pipe), on, 1e-3)
    if not quantized:
        stock = tiny.build(kind).to(DEVICE, dtype)
        stock.load_lora_weights(tmp_path)
        tiny.close(picture(tiny, stock), on, limit)
    lora.delete("default")
    same_weights(lora, before)
    tiny.close(picture(tiny, lora.pipe), bare, 1e-3)


def group(pipe, **options):
    pipe.enable_group_offload(onload_device=torch.device(DEVICE), offload_device=torch.device("cpu"), **options)


WAYS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "group by leaf": lambda pipe: group(pipe, offload_type="leaf_level"),
    "group by leaf, with a stream": lambda pipe: group(pipe, offload_type="leaf_level", use_stream=True),
    "group by block": lambda pipe: group(pipe, offload_type="block_level", num_blocks_per_group=1),
}


def devices(module):
    return {p.device.type for p in module.parameters()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded(tiny, kind, way, tmp_path):
    """Each method, and stock calls between them, give the images of a pipeline that stays on the GPU."""
    tiny.trained(kind).save(tmp_path / "a")
    plain, lora = build(tiny, kind), LoraPipeline(tiny.build(kind))
    parts = parts_of(tiny, kind, lora.pipe)
    WAYS[way](lora.pipe)

    def each(act):
        for it in (lora, plain):
            act(it)
        expected = picture(tiny, plain.pipe)
        tiny.close(picture(tiny, lora.pipe), expected, 1e-3)
        assert "cuda" not in devices(lora.denoiser)  # the hooks are there, and have taken it away again
        return expected

    bare = each(lambda it: None)
    on = each(lambda it: it.load(tmp_path / "a", adapter_name="a"))
    assert tiny.differs(on, bare)
    each(lambda it: it.attach(rank=2, adapter_name="b", init_lora_weights=False, seed=3))
    both = each(lambda it: it.set({"a": 0.5, "b": 1.5}))
    tiny.close(each(lambda it: it.fuse()), both, 1e-3)
    tiny.close(each(lambda it: it.unfuse()), both, 1e-3)
    lora.save(tmp_path / "b", "b")
    plain.save(tmp_path / "plain", "b")
    each(lambda it: it.hotswap(tmp_path / "b", adapter_name="b"))
    each(lambda it: it.pipe.load_lora_weights(tmp_path / "b", adapter_name="c"))
    each(lambda it: it.pipe.set_adapters(["a", "c"], [1.0, 0.5]))
    each(lambda it: it.pipe.delete_adapters("a"))
    assert lora.adapters == {parts[0]: ["b", "c"]}
    each(lambda it: it.optimize())
    each(lambda it: it.delete("c"))
    tiny.close(each(lambda it: it.delete("b")), bare, 1e-3)
    each(lambda it: it.load(tmp_path / "a", adapter_name="a"))
    tiny.close(each(lambda it: it.pipe.unload_lora_weights()), bare, 1e-3)


def test_four_bits_offloaded_by_model(tiny, tmp_path):
    """Packed weights, of convolutions too, move to the GPU and back with their model."""
    made = LoraPipeline(tiny.build("sd"))
    made.attach(targets={"attention": 4, "conv": 2})
    tiny.fill(made.denoiser)
    made.save(tmp_path)
    plain, lora = build(tiny, "sd", quantized=True), build(tiny, "sd", quantized=True)
    lora.pipe.enable_model_cpu_offload()
    for it in (plain, lora):
        it.load(tmp_path)
    expected = picture(tiny, plain.pipe)
    tiny.close(picture(tiny, lora.pipe), expected, 1e-3)
    assert devices(lora.denoiser) == {"cpu"}
    for it in (plain, lora):
        it.fuse()
    tiny.close(picture(tiny, lora.pipe), picture(tiny, plain.pipe), 1e-3)
    lora.unfuse()
    tiny.close(picture(tiny, lora.pipe), expected, 1e-3)


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_compiled_swaps_compile_nothing_again(tiny, kind, tmp_path):
    for rank, name in ((4, "small"), (8, "large")):
        tiny.trained(kind, rank=rank, alpha=2 * rank).save(tmp_path / name)
    lora, plain = build(tiny, kind), build(tiny, kind)
    lora.pipe.enable_lora_hotswap(target_rank=8)
    lora.load(tmp_path / "small")
    lora.denoiser.compile(fullgraph=True)
    picture(tiny, lora.pipe)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("large", "small"):
            lora.hotswap(tmp_path / name)
            plain.load(tmp_path / name, adapter_name=name)
            plain.set(name)
            tiny.close(picture(tiny, lora.pipe), picture(tiny, plain.pipe), 1e-3)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_compiled_by_inductor(tiny, kind, quantized):
    """The fast forwards of linear layers and convolutions are compiled with the rest, and trained."""
    lora, plain = build(tiny, kind, quantized=quantized), build(tiny, kind, quantized=quantized)
    for it in (lora, plain):
        it.attach(targets=tiny.convolutions(kind), init_lora_weights=False, seed=3)
    lora.denoiser.compile()
    tiny.close(picture(tiny, lora.pipe), picture(tiny, plain.pipe), 1e-3)
    gradients = []
    for it in (lora, plain):
        tiny.predict(it.pipe).square().mean().backward()
        gradients.append([p.grad for p in it.adapter().parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3 * theirs.abs().max().item() + 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_optimize_what_stock_code_loaded(tiny, kind, tmp_path):
    tiny.trained(kind).save(tmp_path)
    lora = build(tiny, kind)
    lora.pipe.load_lora_weights(tmp_path)
    expected = picture(tiny, lora.pipe)
    reports = lora.optimize()
    tiny.close(picture(tiny, lora.pipe), expected, 1e-3)
    for report in reports.values():
        report.undo()
    tiny.close(picture(tiny, lora.pipe), expected, 1e-3)


def test_loading_and_deleting_takes_no_memory(tiny, tmp_path):
    tiny.trained("sd").save(tmp_path)
    lora, taken = build(tiny, "sd"), []
    for _ in range(6):
        lora.load(tmp_path)
        picture(tiny, lora.pipe)
        lora.delete("default")
        gc.collect()
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_allocated())
    assert len(set(taken[1:])) == 1, taken

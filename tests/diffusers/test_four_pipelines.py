"""What must hold for every kind of pipeline: SD, SDXL with two encoders, Flux and SD3, each beside a stock pipeline."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch
from lora_adapters_diffusers import LoraPipeline
from peft.tuners.lora.layer import LoraLayer

from lora_adapters.layers.optimized import stock_class

KINDS = ("sd", "sdxl", "flux", "sd3")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def files(tiny, kind, tmp_path_factory):
    """Two adapters of this kind's denoiser and encoders, and the image of each in a stock pipeline."""
    folder, pictures = tmp_path_factory.mktemp(kind), {}
    for seed, (name, options) in enumerate(
        {"a": dict(alpha=8, targets=tiny.convolutions(kind)), "b": dict(rank=2)}.items()
    ):
        lora = LoraPipeline(tiny.build(kind))
        lora.attach(components=[tiny.denoiser_name(lora.pipe)], **options)
        lora.attach(components=tiny.ENCODERS[kind], rank=options.get("rank", 4), alpha=options.get("alpha"))
        for part in lora.components.values():
            tiny.fill(part, seed)
        pictures[name] = tiny.image(lora.pipe)
        lora.save(folder / name)
    return folder, pictures


def weights_of(lora):
    """Return the base weights of every part, under the names they have without adapters."""
    return {
        f"{part}.{name.replace('.base_layer', '')}": value.detach().clone()
        for part, module in lora.components.items()
        for name, value in module.state_dict().items()
        if ".lora_" not in name
    }


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def reached(tiny, pipe, parts):
    """Return part -> modules whose weight the prediction depends on, by a bare pipeline's own gradients."""
    for part in parts:
        getattr(pipe, part).requires_grad_(True)
    tiny.predict(pipe).square().mean().backward()
    return {
        part: {
            n.removesuffix(".weight")
            for n, p in getattr(pipe, part).named_parameters()
            if p.grad is not None and p.grad.any()
        }
        for part in parts
    }


def with_gradients(adapter):
    """Return the names of the layers whose A and B both have a gradient that is not zero."""
    pairs = {n: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for n, layer in adapter.layers.items()}
    return {n for n, pair in pairs.items() if all(p.grad is not None and p.grad.any() for p in pair)}


def test_train_save_load_fuse_delete_reload(tiny, kind, tmp_path):
    lora, stock = LoraPipeline(tiny.build(kind)), tiny.build(kind)
    bare, before = tiny.image(stock), weights_of(lora)
    made = lora.attach(targets=tiny.convolutions(kind), seed=0)
    made |= lora.attach(rank=3, alpha=9, components=tiny.ENCODERS[kind], seed=0)
    assert list(made) == [*lora.components]
    ranks = {layer.role: layer.rank for layer in lora.adapter().plan.layers}
    assert ranks == {**dict.fromkeys("qkvo", 4), "mlp": 3, **({"conv": 2} if "conv" in tiny.convolutions(kind) else {})}
    assert torch.equal(tiny.image(lora.pipe), bare)

    parameters = [p for adapter in made.values() for p in adapter.parameters()]
    optimizer, losses = torch.optim.AdamW(parameters, lr=2e-2), []
    goal = torch.randn(tiny.predict(stock).shape, generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        loss = (tiny.predict(lora.pipe) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if len(losses) < 4:
            optimizer.step()
    assert losses[3] < losses[0]
    want = reached(tiny, tiny.build(kind), made)
    for part, adapter in made.items():
        assert with_gradients(adapter) == want[part] & set(adapter.layers), part
        assert (
            len(want[part] & set(adapter.layers)) >= len(adapter.layers) / 2
        )  # SDXL leaves out its encoders' last layers
    assert same(weights_of(lora), before)

    on = tiny.image(lora.pipe)
    assert tiny.differs(on, bare)
    lora.save(tmp_path)
    stock.load_lora_weights(tmp_path)
    tiny.close(tiny.image(stock), on)

    lora.fuse()
    assert lora.pipe.fused_loras == {"default"}
    tiny.close(tiny.image(lora.pipe), on)
    lora.unfuse()
    assert same(weights_of(lora), before)
    assert torch.equal(tiny.image(lora.pipe), on)

    lora.delete("default")
    assert not any(isinstance(m, LoraLayer) for part in lora.components.values() for m in part.modules())
    assert torch.equal(tiny.image(lora.pipe), bare)
    lora.load(tmp_path)
    tiny.close(tiny.image(lora.pipe), on, 1e-6)


def test_stock_calls_before_and_after_ours(tiny, kind, files):
    """Each call gives the same images as in a pipeline that is all stock, whoever loaded which adapter."""
    folder, pictures = files
    parts = [tiny.denoiser_name(tiny.build(kind)), *tiny.ENCODERS[kind]]
    stock, ours, theirs = tiny.build(kind), LoraPipeline(tiny.build(kind)), LoraPipeline(tiny.build(kind))
    pipes = [stock, ours.pipe, theirs.pipe]
    bare = tiny.image(stock)
    for name in "ab":
        stock.load_lora_weights(folder / name, adapter_name=name)
    ours.load(folder / "a", adapter_name="a")
    ours.pipe.load_lora_weights(folder / "b", adapter_name="b")
    theirs.pipe.load_lora_weights(folder / "a", adapter_name="a")
    theirs.load(folder / "b", adapter_name="b")

    def each(act):
        for pipe in pipes:
            act(pipe)
        expected = tiny.image(stock)
        for pipe in pipes[1:]:
            tiny.close(tiny.image(pipe), expected)
            assert pipe.get_active_adapters() == stock.get_active_adapters()
            assert pipe.get_list_adapters() == stock.get_list_adapters()
        return expected

    each(lambda pipe: pipe.set_adapters("a"))
    tiny.close(tiny.image(stock), pictures["a"])
    both = each(lambda pipe: pipe.set_adapters(["a", "b"], [0.7, 0.3]))
    for lora in (ours, theirs):
        lora.set({"b": 1.0})
        tiny.close(tiny.image(lora.pipe), pictures["b"])
        lora.set({"a": 0.7, "b": 0.3})
        tiny.close(tiny.image(lora.pipe), both)
    tiny.close(each(lambda pipe: pipe.disable_lora()), bare)
    tiny.close(each(lambda pipe: pipe.enable_lora()), both)
    tiny.close(each(lambda pipe: pipe.fuse_lora(components=parts)), both)
    tiny.close(each(lambda pipe: pipe.unfuse_lora(components=parts)), both)
    for pipe in pipes:
        pipe.set_lora_device(["a", "b"], "cpu")
        pipe.to(torch.float64)
        pipe.to(torch.float32)
    blocks: dict = {"transformer_blocks.0": 0.2}
    if "unet" in parts:
        scales = [0.1, 0.9, 0.4][: len(ours.denoiser.up_blocks[1].attentions)]
        blocks = {"down": 0.2, "mid": 0.5, "up": {"block_1": scales}}
    weights = [{parts[0]: blocks}, 0.5]
    by_block = each(lambda pipe: pipe.set_adapters(["a", "b"], copy.deepcopy(weights)))
    for lora in (ours, theirs):
        lora.set("a")
        lora.set(dict(zip("ab", weights, strict=True)))
        tiny.close(tiny.image(lora.pipe), by_block)
    each(lambda pipe: pipe.set_adapters(["a", "b"], [0.7, 0.3]))
    each(lambda pipe: pipe.delete_adapters("a"))
    assert ours.adapters == theirs.adapters == {part: ["b"] for part in parts}
    for lora in (ours, theirs):
        lora.load(folder / "a", adapter_name="a")
        lora.delete("b")
        lora.set("a")
        tiny.close(tiny.image(lora.pipe), pictures["a"])
    stock.unload_lora_weights()
    stock.load_lora_weights(folder / "a", adapter_name="a")
    tiny.close(each(lambda pipe: pipe.unload_lora_weights()), bare)
    tiny.close(each(lambda pipe: pipe.load_lora_weights(folder / "b", adapter_name="b")), pictures["b"])


def test_calls_with_a_scale_a_callback_and_a_copy(tiny, kind, files, tmp_path):
    folder, pictures = files
    lora, stock = LoraPipeline(tiny.build(kind)), tiny.build(kind)
    bare = tiny.image(stock)
    lora.load(folder / "a")
    stock.load_lora_weights(folder / "a", adapter_name="default")
    option = "cross_attention_kwargs" if kind in ("sd", "sdxl") else "joint_attention_kwargs"
    half = tiny.image(lora.pipe, **{option: {"scale": 0.5}})
    tiny.close(half, tiny.image(stock, **{option: {"scale": 0.5}}))
    assert tiny.differs(half, pictures["a"])
    tiny.close(tiny.image(lora.pipe), pictures["a"])  # the scale was for that call

    weights, seen = (1.0, 0.0), []

    def next_step(pipe, step, timestep, inputs):
        seen.append(pipe.get_active_adapters())
        pipe.set_adapters("default", weights[step])
        return inputs

    images = [tiny.image(pipe, callback_on_step_end=next_step) for pipe in (lora.pipe, stock)]
    tiny.close(*images)
    assert seen == [["default"]] * 4
    for pipe in (lora.pipe, stock):
        pipe.set_adapters("default", 1.0)

    twin = copy.deepcopy(lora.pipe)
    twin.unload_lora_weights()
    tiny.close(tiny.image(twin), bare)
    tiny.close(tiny.image(lora.pipe), pictures["a"])
    lora.fuse()
    lora.pipe.unload_lora_weights()
    lora.pipe.save_pretrained(tmp_path)
    again = type(lora.pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    tiny.close(tiny.image(again), pictures["a"])


def test_compiled_whole(tiny, tmp_path):
    """A transformer with adapters is one graph; see test_pipeline.py for a UNet."""
    a, b = tiny.two(tmp_path, "flux")
    lora, plain = LoraPipeline(tiny.build("flux")), LoraPipeline(tiny.build("flux"))
    for name, folder in {"a": a, "b": b}.items():
        lora.load(folder, adapter_name=name)
        plain.load(folder, adapter_name=name)
    lora.denoiser.compile(backend="eager", fullgraph=True)
    tiny.close(tiny.image(lora.pipe), tiny.image(plain.pipe), 1e-5)


def test_four_bits(tiny, kind, files):
    """On an NF4 base the adapter is the same, fusing and unfusing too, and unfused bits are the packed ones."""
    pytest.importorskip("bitsandbytes")
    folder, _ = files
    parts = [tiny.denoiser_name(tiny.build(kind)), *tiny.ENCODERS[kind]]
    lora = LoraPipeline(tiny.build(kind), quantization=dict.fromkeys(parts, "nf4"))
    before, bare = weights_of(lora), tiny.image(lora.pipe)
    assert any(value.dtype == torch.uint8 for value in before.values())
    made = lora.load(folder / "a")
    assert {layer.format for adapter in made.values() for layer in adapter.plan.layers} == {"nf4"}
    on = tiny.image(lora.pipe)
    assert tiny.differs(on, bare)
    parameters = [p for adapter in made.values() for p in adapter.parameters()]
    tiny.predict(lora.pipe).square().mean().backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in parameters) >= len(parameters) / 2
    lora.fuse()
    tiny.close(tiny.image(lora.pipe), on)
    lora.unfuse()
    assert same(weights_of(lora), before)
    assert torch.equal(tiny.image(lora.pipe), on)
    lora.hotswap(folder / "b")
    swapped = tiny.image(lora.pipe)
    lora.delete("default")
    assert torch.equal(tiny.image(lora.pipe), bare)
    lora.load(folder / "b")
    tiny.close(tiny.image(lora.pipe), swapped, 1e-5)


def test_hotswap_and_optimize(tiny, kind, files):
    folder, pictures = files
    lora = LoraPipeline(tiny.build(kind))
    lora.pipe.load_lora_weights(folder / "a", adapter_name="default")
    layers = [m for part in lora.components.values() for m in part.modules() if isinstance(m, LoraLayer)]
    classes = [type(layer) for layer in layers]
    reports = lora.optimize()
    assert list(reports) == [*lora.components]
    assert all(stock_class(type(layer)) is cls for layer, cls in zip(layers, classes, strict=True))
    tiny.close(tiny.image(lora.pipe), pictures["a"])
    lora.hotswap(folder / "b")
    tiny.close(tiny.image(lora.pipe), pictures["b"])
    lora.hotswap(folder / "a")
    tiny.close(tiny.image(lora.pipe), pictures["a"])
    for report in reports.values():
        report.undo()
    assert [type(layer) for layer in layers] == classes
    tiny.close(tiny.image(lora.pipe), pictures["a"])


def test_loading_and_deleting_leaves_nothing(tiny, tmp_path, monkeypatch):
    """Five times: the modules and tensors are those of the beginning, and each load does the same work."""
    file, _ = tiny.two(tmp_path)
    lora, visits = LoraPipeline(tiny.build("sd")), count_visits(monkeypatch)
    tensors_before, modules, attributes = tensors(), list(lora.denoiser.modules()), dir(lora.denoiser)
    gone = []
    for _ in range(5):
        visits.append(0)
        made = lora.load(file, adapter_name="a")
        gone += [weakref.ref(p) for p in made["unet"].parameters()]
        del made
        lora.delete("a")
        visits.append(0)
        assert list(lora.denoiser.modules()) == modules
        assert dir(lora.denoiser) == attributes
    assert len(set(visits[::2])) == 1, visits
    assert tensors() <= tensors_before
    assert not any(ref() is not None for ref in gone)


def test_the_next_adapter_takes_no_more_passes_over_the_model(tiny, tmp_path, monkeypatch):
    """Each adapter adds the same number of module visits: a fixed number of passes over the modules that there are."""
    file, _ = tiny.two(tmp_path)
    lora, visits, sizes = LoraPipeline(tiny.build("sd")), count_visits(monkeypatch), []
    for n in range(5):
        visits.append(0)
        lora.load(file, adapter_name=f"a{n}")
        visits.append(0)
        sizes.append(len(list(lora.denoiser.modules())))
    more = [after - before for before, after in itertools.pairwise(visits[2::2])]
    assert len(set(more)) == 1, visits
    assert more[0] <= 45 * (sizes[2] - sizes[1])


def count_visits(monkeypatch):
    """Return a list whose last number goes up with every module that anything walks over."""
    visits, named_modules = [], torch.nn.Module.named_modules

    def counting(module, memo=None, *args, **options):
        for found in named_modules(module, memo, *args, **options):
            if memo is None and visits:  # the walk calls itself
                visits[-1] += 1
            yield found

    monkeypatch.setattr(torch.nn.Module, "named_modules", counting)
    return visits


def tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_16_bits_train_in_32(tiny, kind):
    """Adapters of a bf16 pipeline are fp32, train under autocast, and go through a gradient scaler's unscaling."""
    lora = LoraPipeline(tiny.build(kind).to(torch.bfloat16))
    made = lora.attach(targets=tiny.convolutions(kind)) | lora.attach(rank=2, components=tiny.ENCODERS[kind])
    parameters = [p for adapter in made.values() for p in adapter.parameters()]
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer, scaler = torch.optim.SGD(parameters, lr=1.0), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in parameters]
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = tiny.predict(lora.pipe).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # raises "Attempting to unscale FP16 gradients" on parameters in 16 bits
        scaler.update()
        optimizer.zero_grad()
    assert sum(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)) >= len(parameters) / 2
    assert all(p.isfinite().all() for p in parameters)

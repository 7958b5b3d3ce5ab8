"""timm's models that read or standardise weights, pad by the input's size, read layers' attributes, or say base_layer."""

from functools import partial

import pytest
import torch
from helpers import assert_same, state
from layer_checks import error
from reading import with_reads
from torch import nn

import lora_adapters as la
from lora_adapters.targets import candidates

timm = pytest.importorskip("timm")
from lora_adapters_timm.backend import TimmBackend  # noqa: E402


@pytest.fixture(autouse=True)
def _reads(monkeypatch):
    with_reads(monkeypatch, TimmBackend)


def bit():
    from timm.layers import StdConv2d
    from timm.models.resnetv2 import ResNetV2

    conv = partial(StdConv2d, eps=1e-8)
    settings = {"num_classes": 5, "stem_chs": 32, "stem_type": "fixed", "conv_layer": conv}
    return ResNetV2(layers=(1, 1), channels=(128, 128), **settings)


def nfnet():
    from timm.models.nfnet import NormFreeNet, _dm_nfnet_cfg

    return NormFreeNet(_dm_nfnet_cfg(depths=(1, 1), channels=(256, 256)), num_classes=5)


def named(name, **options):
    return partial(timm.create_model, name, num_classes=5, **options)


#: Model, image size, how many layers are read by others, and how many have a forward of their own.
MODELS = {
    "beit": (named("beit_base_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3), 32, 2, 0),
    "eva": (named("eva02_tiny_patch14_224", img_size=28, embed_dim=48, depth=2, num_heads=3, qkv_fused=True), 28, 2, 0),
    "swinv2": (
        named("swinv2_tiny_window8_256", img_size=64, embed_dim=24, depths=(1, 1), num_heads=(2, 2), window_size=4),
        64,
        2,
        0,
    ),
    "bit": (bit, 64, 0, 9),
    "nfnet": (nfnet, 64, 0, 15),
    "same padding": (named("tf_mobilenetv3_small_minimal_100"), 64, 0, 5),
    "davit": (named("davit_tiny", depths=(1, 1), embed_dims=(32, 64), num_heads=(2, 2)), 64, 0, 0),
    "dla": (named("dla46x_c"), 64, 0, 0),
}


def built(name):
    """Return a model in eval mode whose every branch counts (some begin with a factor of zero), and images."""
    torch.manual_seed(0)
    make, size, *_ = MODELS[name]
    model = make().eval()
    for parameter_name, parameter in model.named_parameters():
        if not parameter.any() and not parameter_name.endswith("bias"):
            nn.init.normal_(parameter, 0.5, 0.1)
    return model, torch.randn(2, 3, size, size)


def adapted(name, quantization):
    model, x = built(name)
    heads = [n for n, module in model.named_modules() if module is model.get_classifier() or "head.fc" in n]
    names = {n: 1 for n in candidates(model) if n not in heads}
    adapter = la.attach(model, targets=names, quantization=quantization, modules_to_save=[], seed=0)
    return model, x, adapter


def fill(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::lora_adapters.errors.LoraAdaptersWarning")
def test_from_attaching_to_unloading(name, quantization, tmp_path):
    dense, x = built(name)
    with torch.no_grad():
        original = dense(x)
    model, x, adapter = adapted(name, quantization)
    plan = adapter.plan
    own = [layer for layer in plan.layers if "effective" in layer.layer and not layer.read_by]
    assert (sum(bool(layer.read_by) for layer in plan.layers), len(own)) == MODELS[name][2:]
    with torch.no_grad():
        plain = model(x)
    assert torch.equal(plain, original) if quantization is None else error(plain, original) > 0
    fill(model)
    y = model(x)
    y.square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        assert error(y, plain) > 1e-3
        evaluated = model(x)
        adapter.merge()
        assert error(model(x), y) < 1e-4
        adapter.unmerge()
        assert torch.equal(model(x), evaluated)
        adapter.save(tmp_path)
        if quantization is None:
            adapter.detach()
            assert_same(model, state(dense))
        again = model if quantization is None else adapted(name, quantization)[0]
        back = la.restore(again, tmp_path, adapter_name="back")
        for layer in back.layers.values():
            layer.set_adapter(["back"])
        assert error(again(x), y) < 1e-6
        if quantization is None:
            unloaded = back.merge(unload=True)
            assert error(unloaded(x), y) < 1e-4
            assert unloaded.state_dict().keys() == dense.state_dict().keys()
            assert {n: type(m) for n, m in unloaded.named_modules()} == {n: type(m) for n, m in dense.named_modules()}


@pytest.mark.filterwarnings("ignore::lora_adapters.errors.LoraAdaptersWarning")
def test_detaching_in_4_bits_leaves_a_model_that_runs():
    model, x, adapter = adapted("beit", "nf4")
    with torch.no_grad():
        plain = model(x)
        fill(model)
        adapter.detach()
        torch.testing.assert_close(model(x), plain)


def test_stock_peft_loads_what_dla_s_own_base_layer_holds(tmp_path):
    from peft import PeftModel

    model, x = built("dla")
    adapter = la.attach(model, rank=2, targets=["base_layer.0", "level0.0", "level2.root.conv"], modules_to_save=[])
    fill(model)
    y = model(x)
    adapter.save(tmp_path)
    stock = PeftModel.from_pretrained(built("dla")[0], tmp_path).eval()
    torch.testing.assert_close(stock(x), y, rtol=1e-4, atol=1e-4)


def test_biases_inside_a_module_called_base_layer_are_saved(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"base_layer": nn.Linear(8, 8), "other": nn.Linear(8, 8)})

        def forward(self, x):
            return self.inner.other(self.inner.base_layer(x))

    torch.manual_seed(0)
    model, x = Holder(), torch.randn(3, 8)
    adapter = la.attach(model, rank=2, targets=["inner.other"], bias="all")
    fill(model)
    y = model(x)
    adapter.save(tmp_path)
    torch.manual_seed(0)
    again = Holder()
    la.restore(again, tmp_path)
    torch.testing.assert_close(again(x), y)

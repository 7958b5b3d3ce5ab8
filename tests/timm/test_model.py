"""TimmLoraModel is taken for a timm model: its methods, its names, its copies."""

import copy

import pytest
import timm
import torch
from lora_adapters_timm import TimmLoraModel
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from timm_models import FAMILIES, RESNET, VIT, images, lora, plain, trained
from torch import nn

import lora_adapters as la
from lora_adapters.errors import LoraAdaptersError, NoTargetError, RequestError, StateError

IDS = [name for name, _ in FAMILIES]


@pytest.mark.parametrize("which", FAMILIES, ids=IDS)
def test_it_computes_what_the_timm_model_does(which):
    base = plain(which)
    x = images(which)
    with torch.no_grad():
        expected = base(x), base.forward_features(x)
        model = TimmLoraModel(base, rank=2).eval()
        assert model.base is base
        torch.testing.assert_close(model(x), expected[0])
        torch.testing.assert_close(model.forward_features(x), expected[1])
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), expected[0])
    assert (model.num_classes, model.num_features) == (5, base.num_features)
    assert model.pretrained_cfg is base.pretrained_cfg is model.default_cfg


@pytest.mark.parametrize("which", FAMILIES, ids=IDS)
def test_names_and_state_are_timms(which):
    theirs = plain(which).state_dict()
    model = lora(which)
    ours = model.state_dict()
    assert [key for key in ours if key in theirs] == list(theirs)
    rest = [key for key in ours if key not in theirs]
    assert all(".lora_" in key or ".original_module." in key for key in rest)
    assert any(".lora_A.default." in key for key in rest)
    for key, value in theirs.items():
        assert ours[key].shape == value.shape
    with pytest.raises(AttributeError, match="no_such"):
        _ = model.no_such


def test_what_is_set_reaches_the_timm_model():
    model = lora()
    model.set_grad_checkpointing(True)
    assert model.grad_checkpointing
    assert model.base.grad_checkpointing
    model.grad_checkpointing = False
    assert not model.base.grad_checkpointing
    model.train()
    assert model.base.training
    assert model.training
    assert all(m.training for m in model.base.modules() if not isinstance(m, nn.modules.batchnorm._BatchNorm))
    model.mark_of_a_tool = 1
    assert not hasattr(model.base, "mark_of_a_tool")


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for on in (False, True):
        model = lora().train()
        model.set_grad_checkpointing(on)
        model(images()).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert all(g is not None for g in grads[-1].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_intermediates_and_features():
    model, x = lora(), images()
    final, steps = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(final), model(x))
    assert len(steps) == 3
    backbone = lora(RESNET, None, features_only=True, out_indices=(1, 3))
    assert [f.shape[1] for f in backbone(images(RESNET))] == backbone.feature_info.channels()
    assert backbone.adapter.plan.trained == ()
    given = TimmLoraModel(timm.create_model("test_resnet", features_only=True), rank=2)
    assert len(given(images(RESNET))) == len(given.feature_info)
    getter = lora(VIT, None, features_only=True)
    getter(images())[-1].sum().backward()
    assert all(p.grad is not None for p in getter.parameters() if p.requires_grad)


def test_the_classifier_is_seen_without_wrappers():
    model = lora()
    head = model.get_classifier()
    assert type(head) is nn.Linear
    assert head.weight.requires_grad
    assert model.get_parameter("head.modules_to_save.default.weight") is head.weight
    frozen = lora(train_head=False)
    assert not frozen.get_classifier().weight.requires_grad
    assert frozen.adapter.plan.trained == ()
    assert not any(".original_module." in key for key in frozen.state_dict())
    assert len(lora(FAMILIES[6]).get_classifier()) == 2  # a distilled model has two


@pytest.mark.parametrize("which", [VIT, RESNET, FAMILIES[3], FAMILIES[6]], ids=lambda w: w[0])
def test_reset_classifier_after_attaching(which, tmp_path):
    model, x = trained(lora(which)), images(which)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.num_classes == 7
    trained(model, 5)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    saved = model.save(tmp_path / "adapter")
    base = plain(which)
    base.reset_classifier(7)
    again = TimmLoraModel.from_pretrained(saved, base).eval()
    torch.testing.assert_close(again(x), model(x))


def test_a_frozen_head_stays_frozen_when_replaced():
    model = lora(train_head=False)
    model.reset_classifier(7)
    assert not any(p.requires_grad for p in model.get_classifier().parameters())


def test_a_given_model_gets_a_new_classifier_or_stays_as_it_was():
    base = plain()
    assert TimmLoraModel(base, num_classes=9, rank=2)(images()).shape == (2, 9)
    base = plain()
    before, head = copy.deepcopy(base.state_dict()), base.head
    with pytest.raises(NoTargetError):
        TimmLoraModel(base, num_classes=9, targets=["nothing"])
    assert base.head is head
    assert base.num_classes == 5
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_a_deep_copy_is_a_model_of_its_own():
    model, x = trained(lora()), images()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x))
    assert twin._modules is twin.base._modules
    assert twin.base is not model.base
    mine = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in mine for p in twin.parameters())
    trained(twin, 3)
    assert not torch.equal(twin(x), model(x))
    with pytest.raises(StateError, match="copy"):
        _ = twin.adapter


def test_timms_average_of_the_whole_model():
    model, x = lora(), images()
    ema = ModelEmaV3(model, decay=0.5)
    trained(model)
    ema.update(model)
    name = "blocks.0.attn.qkv.lora_B.default.weight"
    torch.testing.assert_close(ema.module.state_dict()[name], model.state_dict()[name] / 2)
    assert ema.module(x).shape == (2, 5)


def test_moving_and_memory_format():
    model = lora(RESNET).to(torch.float64)
    assert {p.dtype for p in model.base.parameters()} == {torch.float64}
    x = images(RESNET)
    expected = model(x.double())
    model.to(memory_format=torch.channels_last)
    assert (
        model.get_submodule("layer2.0.conv1").get_base_layer().weight.is_contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(model(x.double().to(memory_format=torch.channels_last)), expected)


def test_mixup_trains():
    model, x = lora().train(), images(batch=4)
    mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    mixed, target = mix(x, torch.tensor([0, 1, 2, 3]))
    SoftTargetCrossEntropy()(model(mixed), target).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_compiled_outputs_are_the_same():
    model, x = trained(lora()), images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("which", [VIT, RESNET], ids=lambda w: w[0])
def test_the_merged_model_is_exported(which):
    model, x = trained(lora(which)), images(which)
    with torch.no_grad():
        expected = model(x)
        base = model.merge(unload=True)
        torch.testing.assert_close(base(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x), base(x))  # still a view of it
        program = torch.export.export(base.eval(), (x,))
        torch.testing.assert_close(program.module()(x), base(x), rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == set(plain(which).state_dict())


def test_onnx_export_of_the_merged_model(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    base = trained(lora()).merge(unload=True)
    torch.onnx.export(base.eval(), (images(),), str(tmp_path / "model.onnx"), dynamo=True)
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_other_arguments_of_attach():
    model = lora(attach_options={"layers": [1], "seed": 3})
    assert {layer.name.split(".")[1] for layer in model.adapter.plan.layers} == {"1"}
    with pytest.raises(RequestError, match="rank is given in attach_options"):
        lora(attach_options={"rank": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit_tiny_patch16_22",), "Did you mean 'vit_tiny_patch16_224'"),
        (("resnet50.no_such_tag",), "no weights 'no_such_tag'.*a1_in1k"),
        ((nn.Linear(3, 3),), "no timm model"),
    ],
)
def test_what_is_no_timm_model_is_refused(arguments, message):
    with pytest.raises(RequestError, match=message):
        TimmLoraModel(*arguments)


def test_contradictions_are_refused():
    with pytest.raises(RequestError, match="takes no arguments to make it"):
        TimmLoraModel(plain(), pretrained=True)
    with pytest.raises(RequestError, match="img_size"):
        TimmLoraModel(plain(), img_size=64)
    with pytest.raises(RequestError, match="TimmLoraModel already"):
        TimmLoraModel(lora())
    with pytest.raises(RequestError, match="does not take an argument"):
        TimmLoraModel("test_resnet", no_such_argument=1)
    with pytest.raises(StateError, match="can't be taken off"):
        lora().reset_classifier(0)


def test_weights_without_a_connection(monkeypatch):
    with pytest.raises(LoraAdaptersError, match=r"can't be had.*pretrained=False"):
        TimmLoraModel("test_resnet", pretrained=True)


def test_detach_gives_the_timm_model_back():
    base = plain()
    before, x = copy.deepcopy(base.state_dict()), images()
    model = trained(TimmLoraModel(base, rank=2))
    assert model.adapter.detach() is base
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    torch.testing.assert_close(model(x), base(x))
    assert la.plan(base, rank=2).layers


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one precision for the process; other tests have theirs."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_trains_it(fresh_accelerate):
    from accelerate import Accelerator

    model = lora().train()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.7)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):  # the first step moves B, and A from then on
        loss = prepared(images()).float().square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    plain_again = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert plain_again is model
    assert model(images()).dtype == torch.float32


def test_the_average_of_what_trains():
    from lora_adapters.ema import AdapterEma

    model, x = lora(), images()
    ema = AdapterEma(model, decay=0.5)
    before = model(x)
    ema.update(trained(model), 2)
    after = model(x)
    with ema.applied(model):
        averaged = model(x)
    assert torch.equal(model(x), after)
    assert not torch.equal(averaged, after)
    assert not torch.equal(averaged, before)
    assert set(ema.state_dict()["averages"]) == {n for n, p in model.named_parameters() if p.requires_grad}

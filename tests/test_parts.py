"""q, k and v of a fused projection adapted alone: exactly what separate layers would do, and plain LoRA for PEFT."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from fused_models import FusedBackend, fused_net, images, register, rows
from helpers import assert_same, perturb, state
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_adapters as la
from lora_adapters import hookimpl
from lora_adapters.adapter_file import PARTS_ENTRY
from lora_adapters.errors import CheckpointError, NoTargetError, PluginError, RequestError
from lora_adapters.hooks.manager import plugins
from lora_adapters.hooks.specs import PlanEdit
from lora_adapters.targets import Part

FUSED = ("contiguous", "interleaved", "conv")


@pytest.fixture(autouse=True)
def _backend():
    register()


def effective(adapter, name):
    """scaling * B @ A of a layer, (out, in)."""
    return adapter.layers[name].get_delta_weight(adapter.name).detach().flatten(1)


def row_mask(layout, *roles):
    mask = torch.zeros(64, dtype=torch.bool)
    for role in roles:
        for first, end in rows(layout)[role]:
            mask[first:end] = True
    return mask


# ---- what is chosen -------------------------------------------------------------------------------------------------


def test_a_role_means_the_separate_layers_and_the_parts_of_the_fused_ones():
    plan = la.plan(fused_net(), rank=4, targets="q+v")
    found = {layer.name: layer for layer in plan.layers}
    assert set(found) == {"blocks.0.qkv", "blocks.1.qkv", "blocks.2.qkv", "blocks.3.q", "blocks.3.v"}
    for index, layout in enumerate(FUSED):
        layer = found[f"blocks.{index}.qkv"]
        assert layer.parts == tuple(Part(role, 4, rows(layout)[role]) for role in ("q", "v"))
        assert (layer.rank, layer.alpha, layer.scaling, layer.role) == (8, 8, 1, "qkv")
        assert layer.parameters == 8 * (64 + 64)
    assert found["blocks.3.q"].parts == ()
    assert any("3 layers are adapted in parts" in note for note in plan.notes)
    assert "qkv: q 4 + v 4" in str(plan)


def test_the_note_counts_the_zeros():
    plan = la.plan(fused_net(layouts=("interleaved",)), rank=3, targets="q+v")
    adapter = la.attach(model := fused_net(layouts=("interleaved",)), rank=3, targets="q+v")
    perturb(model)
    zeros = int((adapter.layers["blocks.0.qkv"].lora_B["default"].weight == 0).sum())
    assert any(f"{zeros:,} of the trainable values are such zeros" in note for note in plan.notes)
    assert zeros == 64 * 6 - 3 * 16 - 3 * 32


def test_ranks_of_their_own_and_the_order_of_the_layer():
    plan = la.plan(fused_net(), targets={"v": 6, "q": 2, "proj": 3})
    layer = next(layer for layer in plan.layers if layer.name == "blocks.1.qkv")
    assert [(p.role, p.rank) for p in layer.parts] == [("q", 2), ("v", 6)]
    assert (layer.rank, layer.scaling) == (8, 1)


def test_attention_still_means_the_whole_layer():
    plan = la.plan(fused_net(), rank=4, targets="attention")
    assert all(layer.parts == () and layer.rank == 4 for layer in plan.layers)


def test_a_later_entry_overrides_parts_by_the_whole():
    plan = la.plan(fused_net(), targets={"q": 2, "attention": 4})
    assert all(layer.parts == () and layer.rank == 4 for layer in plan.layers)


def test_a_list_means_roles_where_nothing_has_the_name():
    plan = la.plan(fused_net(layouts=("contiguous",)), rank=2, targets=["q", "v"])
    assert [[p.role for p in layer.parts] for layer in plan.layers] == [["q", "v"]]
    # "q" is a module's name here, and in a list names come first.
    assert [layer.name for layer in la.plan(fused_net(), rank=2, targets=["q"]).layers] == ["blocks.3.q"]


def test_exclude_takes_a_part_out():
    plan = la.plan(fused_net(), rank=2, targets="q+k+v", exclude=["k"])
    assert [[p.role for p in layer.parts] for layer in plan.layers if layer.parts] == [["q", "v"]] * 3
    assert "blocks.3.k" not in {layer.name for layer in plan.layers}
    assert [layer.name for layer in la.plan(fused_net(), rank=2, targets="q", exclude=["qkv"]).layers] == ["blocks.3.q"]


@pytest.mark.parametrize(
    "given", [{"alpha": 32, "rank": 4}, {"targets": {"q": {"rank": 4, "alpha": 8}, "v": {"rank": 8, "alpha": 16}}}]
)
def test_parts_keep_the_scale_that_was_asked_for(given):
    given = {"targets": "q+v", **given}
    plan = la.plan(fused_net(), **given)
    scale = 8 if "alpha" in given else 2
    assert {layer.scaling for layer in plan.layers} == {scale}
    rslora = la.plan(fused_net(), rank=4, alpha=8, targets="q+v", use_rslora=True)
    assert {round(layer.scaling, 12) for layer in rslora.layers} == {4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"targets": {"q": {"rank": 4, "alpha": 8}, "v": {"rank": 4, "alpha": 4}}},
            "alpha / rank differs .q: 2, v: 1.",
        ),
        ({"targets": {"q": 4, "v": 8}, "alpha": 16}, "alpha / rank differs"),
        ({"targets": {"attention": 4, "q": 8}}, "targets ask for all of 'blocks.0.qkv' and for its 'q' alone"),
        ({"targets": "qkv+q"}, "'qkv.q' asks for all of 'blocks.0.qkv'"),
        ({"targets": "attention", "exclude": ["k"]}, "adapted whole: ask for the other parts instead, 'q.v'"),
        ({"targets": "q", "rank": 17}, "'q' in layer 'blocks.0.qkv', which is 16 x 64: its rank is at most 16"),
        ({"targets": "q+v", "rank_pattern": {"qkv": 4}}, "rank_pattern key 'qkv' matches 'blocks.0.qkv'.*in parts"),
    ],
)
def test_what_can_not_be_one_lora_is_refused(arguments, message):
    model = fused_net()
    before = state(model)
    with pytest.raises(RequestError, match=message):
        la.attach(model, **arguments)
    assert_same(model, before)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}])
def test_what_peft_does_by_itself_is_not_done_in_parts(fields):
    model = fused_net(layouts=("contiguous",))
    before = state(model)
    with pytest.raises(NoTargetError, match=f"in parts it can't have {next(iter(fields))}"):
        la.attach(model, rank=2, targets="q", **fields)
    assert_same(model, before)


def test_a_backend_without_rows_says_what_to_ask_for(monkeypatch):
    monkeypatch.setattr(FusedBackend, "knows_rows", False)
    with pytest.raises(NoTargetError, match=r"no separate 'q'.*Ask for 'qkv'"):
        la.plan(fused_net(layouts=("contiguous",)), targets="q")


# ---- what it computes -----------------------------------------------------------------------------------------------


def split_copy(model, adapter):
    """The slow reference: y = base(x) + for each part, its own rows of B_p A_p x, by plain matrix products."""
    reference = copy.deepcopy(model)

    def hook(planned, layer):
        a, b = (p.detach().clone().requires_grad_() for p in layer.factor_parameters(adapter.name))
        base = layer.get_base_layer()

        def forward(x):
            y = base(x)
            flat = x.movedim(1, -1) if planned.kind == "conv2d" else x
            start = 0
            for part in planned.parts or [Part("", planned.rank, ((0, planned.shape[0]),))]:
                ranks = slice(start, start + part.rank)
                low = F.linear(flat, a.flatten(1)[ranks])
                for first, end in part.rows:
                    update = F.linear(low, b.flatten(1)[first:end, ranks]) * planned.scaling
                    padded = F.pad(update, (first, planned.shape[0] - end))
                    y = y + (padded.movedim(-1, 1) if planned.kind == "conv2d" else padded)
                start += part.rank
            return y

        layer.forward = forward
        return a, b

    factors = {}
    for planned in adapter.plan.layers:
        factors[planned.name] = hook(planned, reference.get_submodule(planned.name))
    return reference, factors


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("fused", ["auto", False])
def test_equals_separate_layers_forward_and_every_gradient(fused, quantization):
    model = fused_net()
    adapter = la.attach(
        model, targets={"q": 3, "v": 5}, alpha=None, quantization=quantization, fused=fused, modules_to_save=[]
    )
    perturb(model)
    reference, factors = split_copy(model, adapter)
    x, x2 = images().requires_grad_(), images().requires_grad_()
    y, y2 = adapter.model(x), reference(x2)
    assert torch.allclose(y, y2, atol=1e-5)
    y.square().sum().backward()
    y2.square().sum().backward()
    assert torch.allclose(x.grad, x2.grad, rtol=1e-4, atol=1e-4)
    for name, layer in adapter.layers.items():
        for mine, theirs in zip(layer.factor_parameters("default"), factors[name], strict=True):
            assert mine.grad.abs().max() > 0
            assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3), name


def test_both_forwards_agree_in_float64_and_with_two_adapters():
    outputs = []
    for fused in ("auto", False):
        model = fused_net().double()
        la.attach(model, targets={"q": 3, "v": 5}, fused=fused, seed=1)
        second = la.attach(model, targets="k+v", rank=2, adapter_name="second", fused=fused, seed=2)
        perturb(model)
        second.model.base_model.set_adapter("default")
        perturb(model, seed=4)
        # PEFT's tuner can run both at once; the head trained whole is one of them only.
        for layer in (m for m in model.modules() if hasattr(m, "lora_A")):
            layer.set_adapter([n for n in ("default", "second") if n in layer.lora_A])
        outputs.append(model(images().double()))
    assert torch.allclose(*outputs, atol=1e-10)
    assert outputs[0].dtype == torch.float64


def test_dropout_acts_on_the_input():
    model = fused_net()
    adapter = la.attach(model, targets="q+v", rank=4, dropout=0.5)
    perturb(model)
    model.eval()
    assert torch.equal(adapter.model(images()), adapter.model(images()))
    model.train()
    outputs = []
    for fused in (True, False):
        for layer in adapter.layers.values():
            layer.fused = fused
        torch.manual_seed(7)
        outputs.append(adapter.model(images()))
    assert torch.allclose(*outputs, atol=1e-5)
    torch.manual_seed(8)
    assert not torch.allclose(adapter.model(images()), outputs[0], atol=1e-3)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_merge_unmerge_and_detach(quantization):
    model = fused_net()
    before = state(model)
    adapter = la.attach(model, targets="q+v", rank=4, quantization=quantization)
    perturb(model)
    y = adapter.model(images())
    adapter.merge()
    assert torch.allclose(model(images()), y, rtol=1e-4, atol=1e-4)
    adapter.unmerge()
    assert torch.equal(adapter.model(images()), y)
    adapter.detach()
    if quantization is None:
        assert_same(model, before)


# ---- zero stays zero ------------------------------------------------------------------------------------------------


class Noisy(torch.optim.Optimizer):
    """An optimizer that writes everywhere, whatever the gradient is."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(0.1 + torch.rand_like(parameter))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        Noisy,
    ],
)
@pytest.mark.parametrize(
    "carry", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["same", "copy", "pickle"]
)
def test_other_rows_never_change(make, carry):
    model = fused_net()
    adapter = la.attach(model, targets="q+v", rank=4)
    trained = carry(adapter.model)
    base = trained.get_base_model()
    optimizer = make([p for p in trained.parameters() if p.requires_grad])
    for seed in range(3):
        trained(images(seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for index, layout in enumerate(FUSED):
        update = base.get_submodule(f"blocks.{index}.qkv").get_delta_weight("default").flatten(1)
        mask = row_mask(layout, "q", "v")
        assert not update[~mask].any()
        assert update[mask].abs().sum(1).min() > 0


# ---- initial values -------------------------------------------------------------------------------------------------


def test_each_part_starts_as_a_layer_of_its_own():
    adapter = la.attach(fused_net(), targets={"q": 8, "v": 16}, seed=5, init_lora_weights="gaussian")
    a = adapter.layers["blocks.0.qkv"].lora_A["default"].weight
    assert a[:8].std().item() == pytest.approx(1 / 8, rel=0.15)
    assert a[8:].std().item() == pytest.approx(1 / 16, rel=0.15)
    alone = la.attach(fused_net(), targets={"v": 16}, seed=5, init_lora_weights="gaussian")
    assert torch.equal(a[8:], alone.layers["blocks.0.qkv"].lora_A["default"].weight)
    random = la.attach(fused_net(), targets={"q": 8, "v": 16}, init_lora_weights=False)
    update = effective(random, "blocks.1.qkv")
    assert update[row_mask("interleaved", "q", "v")].all()
    assert not update[row_mask("interleaved", "k")].any()


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_saved_adapter_is_restored_with_its_parts(tmp_path, quantization):
    model = fused_net()
    adapter = la.attach(model, targets={"q": 3, "v": 5}, alpha=None, quantization=quantization)
    perturb(model)  # writes into the masked places too
    y = adapter.model(images())
    adapter.save(tmp_path)
    for index, layout in enumerate(FUSED):
        b = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.blocks.{index}.qkv.lora_B.weight"]
        assert not b[row_mask(layout, "k")].any()
        assert not b[row_mask(layout, "q"), 3:].any()
    other = fused_net()
    if quantization is not None:
        la.attach(other, targets={"q": 3, "v": 5}, quantization=quantization).detach()
    back = la.restore(other, tmp_path)
    assert torch.equal(back.model(images()), y)
    assert back.plan.layers == adapter.plan.layers
    optimizer = Noisy(list(back.parameters()))
    optimizer.step()
    assert not effective(back, "blocks.0.qkv")[row_mask("contiguous", "k")].any()


def test_stock_peft_loads_it_with_equal_outputs(tmp_path):
    model = fused_net()
    adapter = la.attach(model, targets={"q": 3, "v": 5, "proj": 2})
    perturb(model)
    adapter.save(tmp_path)
    stock = PeftModel.from_pretrained(fused_net(), tmp_path)
    assert torch.allclose(stock(images()), adapter.model(images()), atol=1e-5)
    adapter.model.save_pretrained(tmp_path / "stock")
    again = PeftModel.from_pretrained(fused_net(), tmp_path / "stock")
    assert torch.allclose(again(images()), adapter.model(images()), atol=1e-5)


def rewrite(folder, change):
    """Write the weights file again with another metadata entry and without digests."""
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if "digest" not in k}
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def saved(folder):
    adapter = la.attach(fused_net(), targets={"q": 3, "v": 5})
    perturb(adapter.base)
    adapter.save(folder)
    return adapter


def test_without_the_entry_it_is_plain_lora(tmp_path):
    adapter = saved(tmp_path)
    rewrite(tmp_path, lambda tensors, metadata: metadata.pop(PARTS_ENTRY))
    back = la.restore(fused_net(), tmp_path)
    assert all(layer.parts == () for layer in back.plan.layers)
    assert torch.allclose(back.model(images()), adapter.model(images()), atol=1e-5)


def _entry(change):
    def apply(tensors, metadata):
        entry = json.loads(metadata[PARTS_ENTRY])
        change(entry)
        metadata[PARTS_ENTRY] = json.dumps(entry)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: m.update({PARTS_ENTRY: "{"}),
        lambda t, m: m.update({PARTS_ENTRY: "[1]"}),
        _entry(lambda e: e["blocks.0.qkv"].pop()),
        _entry(lambda e: e["blocks.0.qkv"][0].__setitem__(0, "x")),
        _entry(lambda e: e["blocks.0.qkv"][0].__setitem__(1, 3.0)),
        _entry(lambda e: e["blocks.0.qkv"][0].__setitem__(2, [[0, 65]])),
        _entry(lambda e: e["blocks.0.qkv"][0].__setitem__(2, [[9, 4]])),
        _entry(lambda e: e["blocks.0.qkv"][0].__setitem__(2, [[0, 4], [2, 8]])),
        _entry(lambda e: e.update({"elsewhere": e["blocks.0.qkv"]})),
        _entry(lambda e: e["blocks.0.qkv"][0].__setitem__(2, [[0, 4]])),
        lambda t, m: t["base_model.model.blocks.1.qkv.lora_B.weight"].fill_(1.0),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(tmp_path, change):
    saved(tmp_path)
    rewrite(tmp_path, change)
    model = fused_net()
    before = state(model)
    with pytest.raises(CheckpointError, match=r"damaged"):
        la.restore(model, tmp_path)
    assert_same(model, before)


# ---- the rest of the core -------------------------------------------------------------------------------------------


def test_memory_is_predicted_from_the_same_layers(monkeypatch):
    monkeypatch.setattr(
        FusedBackend, "example_inputs", lambda self, m, b, s, device: {"x": torch.randn(b, s, 64)}, raising=False
    )
    plan = la.plan(fused_net(), targets="q+v", rank=4)
    step = plan.memory(2, 8)
    attached = la.attach(fused_net(), targets="q+v", rank=4)
    trainable = sum(p.numel() for p in attached.parameters())
    assert trainable == plan.trainable_parameters
    assert step.gradients == 4 * trainable


def test_it_compiles():
    model = fused_net(layouts=("interleaved", "conv"))
    adapter = la.attach(model, targets="q+v", rank=4)
    perturb(model)
    compiled = torch.compile(adapter.model, backend="aot_eager")
    x, x2 = images().requires_grad_(), images().requires_grad_()
    y, y2 = compiled(x), adapter.model(x2)
    assert torch.allclose(y, y2, atol=1e-5)
    y.sum().backward()
    y2.sum().backward()
    assert torch.allclose(x.grad, x2.grad, atol=1e-4)


def test_a_plugin_may_skip_such_a_layer_but_not_edit_its_rank():
    edits = [PlanEdit(r"blocks\.0\.qkv", skip="not this one")]

    class Editor:
        @hookimpl
        def lora_adapters_edit_plan(self, plan):
            return edits

    plugins().register(Editor(), "editor")
    assert "blocks.0.qkv" not in [layer.name for layer in la.plan(fused_net(), targets="q", rank=4).layers]
    edits.append(PlanEdit(r"blocks\.1\.qkv", rank=2))
    with pytest.raises(PluginError, match="adapted in parts"):
        la.plan(fused_net(), targets="q", rank=4)

"""plan -> apply -> verify on plain PyTorch models: what is adapted, what is refused, and that nothing else changes."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import Net, assert_same, llama, net, perturb, state, tokens
from peft import LoraConfig, PeftModel
from torch import nn

import lora_adapters as la
from lora_adapters.errors import (
    LoraAdaptersError,
    MergeError,
    NoTargetError,
    RequestError,
    StateError,
    UnsupportedError,
)


def test_the_untrained_adapter_changes_nothing_and_detach_gives_everything_back():
    model, x = net(), tokens()
    before, output = state(model), model(x)
    adapter = la.attach(model, rank=4)
    torch.testing.assert_close(model(x), output)
    assert isinstance(adapter.model, PeftModel)
    perturb(model)
    assert not torch.allclose(model(x), output)
    assert adapter.detach() is model
    assert_same(model, before)


def test_only_the_adapter_is_trained():
    model = net()
    adapter = la.attach(model, rank=4)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.plan.trainable_parameters


def test_values_depend_on_the_seed_and_the_name_alone():
    def weights(model, **options):
        la.attach(model, rank=4, **options)
        return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}

    first = weights(net(), seed=1, targets=["0", "2"])
    only = weights(net(), seed=1, targets=["2"])
    assert only
    for name, value in only.items():
        assert torch.equal(first[name], value)
    other = weights(net(), seed=2, targets=["0", "2"])
    assert not any(torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(7)
    implicit = weights(net(), targets=["0"])
    torch.manual_seed(7)
    torch.rand(100)
    again = weights(net(), targets=["0"])
    assert all(torch.equal(implicit[name], again[name]) for name in implicit)


def test_initial_values_have_pefts_distribution():
    model = nn.Sequential(nn.Linear(400, 300))
    la.attach(model, rank=64, seed=0)
    a = model[0].lora_A["default"].weight
    assert a.abs().max() <= 1 / 20
    assert abs(a.std().item() - (1 / 20) / 3**0.5) < 0.001
    model = nn.Sequential(nn.Linear(400, 300))
    la.attach(model, rank=64, seed=0, init_lora_weights="gaussian")
    assert abs(model[0].lora_A["default"].weight.std().item() - 1 / 64) < 0.001


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", 7),
        ("conv", 1),
        ("embedding+conv", 2),
        (["0", "head"], 4),
        ("re:blocks.[01].2$", 2),
        ({"all-linear": 4, "re:^head": {"rank": 2, "alpha": 8}}, 7),
    ],
)
def test_targets(targets, expected):
    plan = la.plan(net(), rank=4, targets=targets)
    assert len(plan.layers) == expected
    assert len(plan.layers) + len(plan.skipped) == 9
    assert all(layer.reason for layer in plan.skipped)


def test_ranks_alphas_and_scales():
    plan = la.plan(net(), rank=8, targets={"all-linear": 4, "conv": {"rank": 2}, "head": {"rank": 5, "alpha": 20}})
    by_name = {layer.name: layer for layer in plan.layers}
    assert (by_name["blocks.0.0"].rank, by_name["blocks.0.0"].scaling) == (4, 1.0)
    assert (by_name["head"].rank, by_name["head"].scaling) == (5, 4.0)
    assert la.plan(net(), rank=4, alpha=16, use_rslora=True).layers[0].scaling == 8.0
    by_name = {x.name: x for x in la.plan(net(), r=4, rank_pattern={"0": 2}, alpha_pattern={"head": 12}).layers}
    assert (by_name["blocks.1.0"].rank, by_name["blocks.1.2"].rank, by_name["head"].alpha) == (2, 4, 12)


def test_layer_subsets():
    assert {x.name.split(".")[1] for x in la.plan(net(), rank=4, layers=[0, -1]).layers} == {"0", "2"}
    assert len(la.plan(net(), rank=4, layers=range(2)).layers) == 4
    assert len(la.plan(net(), r=4, layers_to_transform=1, layers_pattern="blocks").layers) == 2
    with pytest.raises(RequestError, match=r"layers \[7\]"):
        la.plan(net(), rank=4, layers=[7])


def test_exclude():
    plan = la.plan(net(), rank=4, exclude=["head", "re:blocks.0"])
    assert {x.name for x in plan.layers} == {"blocks.1.0", "blocks.1.2", "blocks.2.0", "blocks.2.2"}
    with pytest.raises(NoTargetError, match="exclude 'heda'"):
        la.plan(net(), rank=4, exclude="heda")


def test_modules_to_save_means_what_it_means_to_peft():
    """The ends of names, as text; the plan counts them all and a checkpoint brings them all back."""
    model = llama()
    adapter = la.attach(model, rank=2, modules_to_save=["norm"])
    trained = {n.split(".modules_to_save")[0] for n, p in model.named_parameters() if p.requires_grad and "norm" in n}
    assert trained == {n for n, _ in llama().named_modules() if n.endswith("norm")}
    assert len(trained) == 5
    assert adapter.plan.trained_parameters == 5 * 32


def test_a_quantized_module_cannot_be_trained_whole():
    model = llama()
    la.attach(model, rank=2, quantization="nf4").detach()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(UnsupportedError, match=r"mlp' can't be trained whole: it is quantized.*llm_int8_skip_modules"):
        la.attach(model, rank=2, modules_to_save=["layers.1.mlp"])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    adapter = la.attach(llama(), rank=2, quantization="nf4", modules_to_save=["layers.1.mlp"])
    assert "model.layers.1.mlp.up_proj" not in adapter.plan.quantize
    assert "model.layers.0.mlp.up_proj" in adapter.plan.quantize


def test_modules_to_save_bias_and_dropout():
    model = net()
    adapter = la.attach(model, rank=4, targets=["0"], modules_to_save=["head", "norm"], bias="lora_only", dropout=0.25)
    names = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert names == {
        *(f"head.modules_to_save.default.{p}" for p in ("weight", "bias")),
        *(f"norm.modules_to_save.default.{p}" for p in ("weight", "bias")),
        *(f"blocks.{i}.0.base_layer.bias" for i in range(3)),
    }
    assert model.blocks[0][0].lora_dropout["default"].p == 0.25
    before = net()
    perturb(model)
    adapter.detach()
    assert torch.equal(model.blocks[0][0].bias, before.blocks[0][0].bias)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_saved(bias, tmp_path):
    model, x = net(), tokens()
    adapter = la.attach(model, rank=4, targets=["0"], bias=bias)
    perturb(model)
    output = model(x)
    adapter.save(tmp_path / "a")
    fresh = net()
    la.restore(fresh, tmp_path / "a")
    torch.testing.assert_close(fresh(x), output, rtol=0, atol=0)


def test_lora_bias(tmp_path):
    model, x = net(), tokens()
    adapter = la.attach(model, rank=4, lora_bias=True)
    perturb(model)
    output = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), output, rtol=1e-5, atol=1e-5)
    adapter.unmerge()
    adapter.save(tmp_path / "a")
    fresh = net()
    la.restore(fresh, tmp_path / "a")
    torch.testing.assert_close(fresh(x), output, rtol=0, atol=0)


def test_works_on_a_meta_device_model():
    with torch.device("meta"):
        model = Net()
    plan = la.plan(model, rank=4)
    real = la.plan(net(), rank=4)
    assert plan.layers == real.layers
    adapter = la.attach(model, rank=4)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert "all-linear" not in str(plan)
    assert adapter.plan.trainable_parameters == real.trainable_parameters


def test_printing_a_plan_names_everything():
    text = str(la.plan(net(), rank=4, targets="conv"))
    for word in ("conv", "not in targets", "generic PyTorch backend", "blocks.*.*", "trainable of"):
        assert word in text


def test_a_second_adapter_stands_beside_the_first():
    model, x = net(), tokens()
    base = model(x)
    first = la.attach(model, rank=4, adapter_name="first")
    perturb(model, 1)
    with_first = model(x)
    second = la.attach(model, rank=2, targets=["0", "head"], adapter_name="second")
    torch.testing.assert_close(model(x), base)
    assert second.model is first.model
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("second" in n for n in trainable)
    first.model.set_adapter("first")
    torch.testing.assert_close(model(x), with_first)
    second.detach()
    torch.testing.assert_close(model(x), with_first)
    first.detach()
    torch.testing.assert_close(model(x), base)
    assert not [m for m in model.modules() if hasattr(m, "lora_A")]


def test_detaching_the_second_wakes_what_the_first_trains_whole():
    model, x = net(), tokens()
    la.attach(model, rank=4, modules_to_save=["head"], adapter_name="first")
    perturb(model, 1)
    with_first = model(x)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    second = la.attach(model, rank=2, adapter_name="second", targets=["0"])
    second.detach()
    torch.testing.assert_close(model(x), with_first, rtol=0, atol=0)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_attach_to_a_users_own_peft_model():
    from peft import get_peft_model

    model, x = net(), tokens()
    output = model(x)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=r"blocks\.\d\.0"), adapter_name="theirs")
    adapter = la.attach(peft_model, rank=4, adapter_name="ours")
    assert adapter.model is peft_model
    assert set(peft_model.peft_config) == {"theirs", "ours"}
    torch.testing.assert_close(peft_model(x), output)


def test_prompt_learning_stands_beside_lora():
    """LoRA attached to a model that prompt tuning also uses: both train."""
    from peft import PromptTuningConfig, get_peft_model

    model = llama()
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    adapter = la.attach(prompted, rank=2, targets=["q_proj"])
    ids = torch.arange(6)[None]
    prompted(input_ids=ids, labels=ids).loss.backward()
    assert prompted.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0
    assert adapter.layers["model.layers.0.self_attn.q_proj"].lora_B["default"].weight.grad.abs().sum() > 0


def test_ia3_is_refused_with_the_reason():
    from peft import IA3Config, get_peft_model

    model = net()
    get_peft_model(model, IA3Config(target_modules=r"blocks\.\d\.0", feedforward_modules=[]))
    before = state(model)
    with pytest.raises(UnsupportedError, match="ia3"):
        la.attach(model, rank=4, targets=["2"])
    assert_same(model, before)


# ---- PEFT's own options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"use_dora": True}, {"init_lora_weights": "olora"}, {"init_lora_weights": "pissa"}])
def test_pefts_variants_run_save_restore_and_merge(option, tmp_path):
    model, x = net(), tokens()
    before, output = state(model), model(x)
    adapter = la.attach(model, rank=4, targets=["0"], **option)
    torch.testing.assert_close(model(x), output, rtol=1e-4, atol=1e-4)
    assert adapter.plan.engine == "peft"
    assert "PEFT's injection" in str(adapter.plan)
    # Once they have started, those that only start otherwise are plain LoRA.
    assert ("PEFT's DoraLinearVariant" if "use_dora" in option else "split") in adapter.summary()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, 0.1)
    model(x).square().mean().backward()
    optimizer.step()
    trained = model(x)
    adapter.save(tmp_path / "a")
    adapter.merge()
    torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    adapter.detach()
    assert_same(model, before)
    la.restore(model, tmp_path / "a")
    torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-5)


def test_loraplus_and_eva_take_our_model():
    from peft import EvaConfig, initialize_lora_eva_weights
    from peft.optimizers import create_loraplus_optimizer

    model = net()
    adapter = la.attach(model, rank=4, targets=["0"])
    optimizer = create_loraplus_optimizer(adapter.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert {g["lr"] for g in optimizer.param_groups} >= {1e-3, 16e-3}
    model = llama()
    ids = torch.randint(0, 32, (4, 8))
    output = model(input_ids=ids).logits
    adapter = la.attach(model, rank=2, targets=["q_proj"], init_lora_weights="eva", eva_config=EvaConfig())
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        for ids in torch.randint(0, 32, (4, 8, 8))
    ]
    before = adapter.layers["model.layers.0.self_attn.q_proj"].lora_A["default"].weight.clone()
    initialize_lora_eva_weights(adapter.model, batches, show_progress_bar=False)
    assert not torch.equal(adapter.layers["model.layers.0.self_attn.q_proj"].lora_A["default"].weight, before)
    torch.testing.assert_close(model(input_ids=ids).logits, output)


def test_a_whole_lora_config():
    config = LoraConfig(r=3, lora_alpha=9, target_modules=["0"], lora_dropout=0.1, use_rslora=True)
    plan = la.plan(net(), config=config)
    assert {x.name for x in plan.layers} == {f"blocks.{i}.0" for i in range(3)}
    assert plan.layers[0].scaling == pytest.approx(9 / 3**0.5)
    assert plan.request.dropout == 0.1


# ---- bad input: an error, and the model is bit-identical -----------------------------------------------------------------

BAD = {
    "no layer matched": (dict(rank=4, targets=["query"]), NoTargetError, "match no layer"),
    "a misspelt role": (dict(rank=4, targets="atention"), NoTargetError, "attention"),
    "a role the model lacks": (dict(rank=4, targets="q+v"), NoTargetError, "no module with role 'q'"),
    "rank 0": (dict(rank=0), RequestError, "rank must be in 1"),
    "a negative rank": (dict(rank=-4), RequestError, "rank must be in 1"),
    "a rank that is no number": (dict(rank="8"), RequestError, "whole number"),
    "a huge rank": (dict(rank=10**8), RequestError, "rank must be in 1"),
    "a rank larger than the layer": (dict(rank=33, targets=["0"]), RequestError, "larger than layer 'blocks.0.0'"),
    "alpha NaN": (dict(rank=4, alpha=float("nan")), RequestError, "finite"),
    "alpha infinite": (dict(rank=4, alpha=float("inf")), RequestError, "finite"),
    "dropout 1": (dict(rank=4, dropout=1.0), RequestError, "dropout"),
    "one thing under two names": (dict(rank=4, r=4), RequestError, "rank and r"),
    "config and argument": (dict(rank=4, config=LoraConfig(r=4)), RequestError, "config.r"),
    "an unknown argument": (dict(rank=4, lora_dropuot=0.1), RequestError, "lora_dropout"),
    "a broken pattern": (dict(rank=4, targets="re:("), RequestError, "regular expression"),
    "no targets": (dict(rank=4, targets=[]), RequestError, "empty"),
    "an unknown module to save": (dict(rank=4, modules_to_save=["haed"]), NoTargetError, "haed"),
    "a bad name": (dict(rank=4, adapter_name="../up"), RequestError, "adapter_name"),
    "an unknown quantizer": (dict(rank=4, quantization="nf5x"), RequestError, "nf4"),
    "a quantization of no role": (dict(rank=4, quantization={"atention": "nf4"}), RequestError, "no role"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_the_model_bit_identical(case):
    options, error, message = BAD[case]
    model = net()
    before = state(model)
    with pytest.raises(error, match=message) as caught:
        la.attach(model, **options)
    assert isinstance(caught.value, LoraAdaptersError)
    assert_same(model, before)


def test_attaching_twice_under_one_name():
    model = net()
    la.attach(model, rank=4)
    before = state(model)
    with pytest.raises(RequestError, match="already carries an adapter named 'default'"):
        la.attach(model, rank=4)
    assert_same(model, before)


def test_a_failure_midway_rolls_back(monkeypatch):
    from lora_adapters.layers.linear import Linear

    model = net()
    before = state(model)
    calls = []

    def third_fails(self, name, factors):
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return original(self, name, factors)

    original = Linear.add_factors
    monkeypatch.setattr(Linear, "add_factors", third_fails)
    with pytest.raises(MemoryError):
        la.attach(model, rank=4)
    assert len(calls) == 3
    assert_same(model, before)
    monkeypatch.undo()
    la.attach(model, rank=4)


def test_missing_bitsandbytes_names_the_extra(monkeypatch):
    import lora_adapters.hooks.manager as manager

    real = manager.find_spec
    monkeypatch.setattr(manager, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    model = net()
    before = state(model)
    with pytest.raises(la.LoraAdaptersError, match=r"lora-adapters\[bnb\]"):
        la.attach(model, rank=4, quantization="nf4")
    assert_same(model, before)


# ---- merging ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merge_unmerge_and_unload(dtype):
    model, x = net().to(dtype), tokens()
    adapter = la.attach(model, rank=4, targets="all-linear+conv+embedding")
    perturb(model)
    before, output = state(model), model(x)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    for _ in range(3):
        adapter.merge()
        assert adapter.merged
        torch.testing.assert_close(model(x), output, rtol=tolerance, atol=tolerance)
        adapter.unmerge()
        assert_same(model, before)
    adapter.merge(unload=True)
    torch.testing.assert_close(model(x), output, rtol=tolerance, atol=tolerance)
    assert {type(m) for m in model.modules()} == {type(m) for m in net().modules()}
    with pytest.raises(StateError, match="merged into its base"):
        adapter.save("anywhere")


def test_a_broken_adapter_is_not_merged():
    model = net()
    adapter = la.attach(model, rank=4)
    perturb(model)
    with torch.no_grad():
        model.blocks[2][0].lora_B["default"].weight[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(MergeError, match=r"blocks\.2\.0"):
        adapter.merge()
    assert_same(model, before)


def test_an_overflow_while_merging_unmerges_what_was_merged():
    model = net().half()
    adapter = la.attach(model, rank=4, targets=["0", "2"])
    with torch.no_grad():
        model.blocks[2][2].lora_A["default"].weight.fill_(300.0)
        model.blocks[2][2].lora_B["default"].weight.fill_(300.0)
    before = state(model)
    with pytest.raises(MergeError, match="not finite"):
        adapter.merge()
    assert_same(model, before)


def test_merging_a_tied_embedding_changes_one_end_only():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(12, 8)
            self.out = nn.Linear(8, 12, bias=False)
            self.out.weight = self.emb.weight

        def forward(self, x):
            return self.out(self.emb(x))

    model, x = Tied(), torch.arange(12)
    adapter = la.attach(model, rank=2, targets=["emb"])
    perturb(model)
    output = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), output)
    adapter.unmerge()
    assert model.out.weight is model.emb.base_layer.weight


def test_disabled_and_scale():
    model, x = net(), tokens()
    base = model(x)
    adapter = la.attach(model, rank=4, targets=["head"])
    perturb(model)
    full = model(x)
    with adapter.disabled():
        torch.testing.assert_close(model(x), base)
    adapter.scale(0.5)
    torch.testing.assert_close(model(x), (base + full) / 2)


def test_grouped_convolution_is_a_low_rank_update_of_its_kernel():
    for groups, rank in ((1, 3), (2, 3), (4, 1), (8, 2)):
        conv = nn.Conv2d(8, 16, 3, padding=2, dilation=2, stride=2, groups=groups, padding_mode="reflect")
        model, x = nn.Sequential(conv), torch.randn(2, 8, 9, 9)
        la.attach(model, rank=rank, targets="conv")
        perturb(model)
        a, b = model[0].factor_parameters("default")
        explicit = copy.deepcopy(conv)
        with torch.no_grad():
            explicit.weight += (b.flatten(1) @ a.flatten(1)).view_as(explicit.weight)
        torch.testing.assert_close(model(x), explicit(x), rtol=1e-4, atol=1e-5)


def test_norms_are_those_of_the_product():
    model = net()
    adapter = la.attach(model, rank=4, alpha=8)
    perturb(model)
    products = [layer.get_delta_weight("default").norm() for layer in adapter.layers.values()]
    assert adapter.norms()["mean"] == pytest.approx(torch.stack(products).mean().item(), rel=1e-4)
    assert adapter.norms()["max"] == pytest.approx(max(products).item(), rel=1e-4)


def test_a_model_goes_with_its_last_reference():
    model = net()
    watched = weakref.ref(model)
    adapter = la.attach(model, rank=2)
    copied = copy.deepcopy(model)
    del model, adapter
    gc.collect()
    assert watched() is None
    assert copied.blocks[0][0].lora_A


def test_base_values_are_counted_as_values_in_4_bits_too():
    def small():
        return nn.Sequential(nn.Conv2d(3, 17, 3), nn.Conv2d(17, 9, 3), nn.Flatten(), nn.Linear(9, 65))

    expected = sum(parameter.numel() for parameter in small().parameters())
    assert la.plan(small(), rank=2, targets=["1", "3"]).total_parameters == expected
    model = small()
    adapter = la.attach(model, rank=2, targets=["1", "3"], quantization="nf4")
    assert adapter.plan.total_parameters == expected
    adapter.detach()
    assert la.plan(model, rank=2, targets=["1", "3"]).total_parameters == expected

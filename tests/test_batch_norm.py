"""BatchNorm under an adapter: kept in evaluation mode, or trained and saved with it; the base's own never changes."""

import copy
import pickle

import pytest
import torch
from helpers import assert_same, perturb, state
from peft import PeftModel
from torch import nn

import lora_adapters as la
from lora_adapters.adapter_file import NORM_ENTRY
from lora_adapters.batch_norm import batch_norms
from lora_adapters.checkpoint import inspect_adapter
from lora_adapters.errors import CheckpointError, RequestError, UnsupportedError
from lora_adapters.memory import predict_step

MODES = ("eval", "train", "affine")


class ActNorm(nn.BatchNorm2d):
    """A BatchNorm with children that follow the mode, as timm's BatchNormAct2d."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.act = nn.Dropout(0.1), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Cnn(nn.Module):
    """Convolutions with BatchNorms of several kinds, and a head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer = nn.Sequential(nn.Conv2d(8, 12, 3, bias=False), ActNorm(12))
        self.plain = nn.BatchNorm2d(12, affine=False)
        self.stateless = nn.BatchNorm2d(12, track_running_stats=False)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.layer(self.bn1(self.conv1(x)).relu())
        return self.head(self.stateless(self.plain(x)).mean((2, 3)))


def cnn(seed=0):
    """A network whose statistics are not those of a new one."""
    torch.manual_seed(seed)
    model = Cnn()
    for _ in range(3):
        model(2 * torch.randn(8, 3, 8, 8) + 1)
    return model.eval()


def pictures(seed=0):
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 3 - 1


def train(model, steps=4):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(pictures(step)), torch.arange(8) % 3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def attach(model, **options):
    return la.attach(model, rank=2, targets="conv", modules_to_save=["head"], **options)


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "batches" in k}


def test_the_problem_is_real(tmp_path):
    """What PEFT alone does: the reloaded adapter computes something else."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(cnn(), LoraConfig(r=2, target_modules=["conv1"], modules_to_save=["head"]))
    y = train(model)(pictures(9))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(cnn(), tmp_path).eval()(pictures(9))
    assert (again - y).norm() / y.norm() > 0.01


@pytest.mark.parametrize("norm", MODES)
def test_save_and_restore_after_training(tmp_path, norm):
    model = cnn()
    adapter = attach(model, norm=norm)
    y = train(adapter.model)(pictures(9))
    adapter.save(tmp_path)
    back = la.restore(cnn(), tmp_path)
    back.model.eval()
    assert torch.equal(back.model(pictures(9)), y)
    assert back.plan.request.norm == norm
    assert back.plan.norms == adapter.plan.norms
    assert back.plan.trained_parameters == adapter.plan.trained_parameters
    stock = PeftModel.from_pretrained(cnn(), tmp_path).eval()
    assert torch.allclose(stock(pictures(9)), y, atol=1e-5)
    again = train(back.model)(pictures(9))
    assert not torch.equal(again, y)


@pytest.mark.parametrize("norm", MODES)
def test_the_base_keeps_its_own_statistics_bit_for_bit(norm):
    model = cnn()
    before, y = state(model), model(pictures(9))
    adapter = attach(model, norm=norm)
    train(adapter.model)
    with adapter.disabled() as disabled:
        assert torch.equal(disabled(pictures(9)), y)
        disabled.train()
        disabled(pictures(1))
    adapter.model.eval()
    with adapter.disabled() as disabled:
        assert torch.equal(disabled(pictures(9)), y)
    adapter.detach()
    assert_same(model, before)
    assert not any("train" in vars(module) for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())
    model(pictures(1))
    assert not torch.equal(model.bn1.running_mean, before["tensors"]["bn1.running_mean"])


def test_eval_freezes_what_keeps_statistics_and_nothing_else():
    model = cnn()
    before = statistics(model)
    adapter = attach(model)
    assert adapter.plan.norms == ()
    train(adapter.model)
    assert all(torch.equal(value, before[key]) for key, value in statistics(model).items())
    adapter.model.train()
    modes = {name: m.training for name, m in model.named_modules() if "lora" not in name}
    off = {"bn1", "layer.1", "plain"}
    assert {name for name, on in modes.items() if not on} == off
    assert modes["layer.1.drop"]
    assert modes["stateless"]
    assert not model.bn1.weight.requires_grad
    assert any("3 BatchNorm layers stay in evaluation mode" in note for note in adapter.plan.notes)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("norm", MODES)
def test_copies_and_pickles_behave_alike(norm, carry):
    adapter = attach(cnn(), norm=norm)
    twin = carry(adapter.model)
    before = statistics(adapter.model)
    torch.manual_seed(1)
    train(twin)
    assert all(torch.equal(value, before[key]) for key, value in statistics(adapter.model).items())
    changed = {k for k, v in statistics(twin).items() if not torch.equal(v, before[k])}
    assert bool(changed) == (norm != "eval")
    assert all("modules_to_save.default" in key for key in changed)
    torch.manual_seed(1)
    assert torch.equal(train(adapter.model)(pictures(9)), twin(pictures(9)))


@pytest.mark.parametrize(("norm", "extra"), [("eval", 0), ("train", 0), ("affine", 2 * 8 + 2 * 12)])
def test_what_is_trained(norm, extra):
    adapter = attach(cnn(), norm=norm)
    names = {n for n, p in adapter.base.named_parameters() if p.requires_grad}
    assert adapter.plan.trained_parameters == 12 * 3 + 3 + extra
    assert sum(p.numel() for p in adapter.parameters()) == adapter.plan.trainable_parameters
    assert ("bn1.modules_to_save.default.weight" in names) == (norm == "affine")
    with adapter.disabled():
        pass
    assert sum(p.numel() for p in adapter.parameters()) == adapter.plan.trainable_parameters
    weight = adapter.base.bn1.weight.clone()
    train(adapter.model)
    assert torch.equal(adapter.base.bn1.weight, weight) == (norm != "affine")
    said = "\n".join(adapter.plan.notes)
    assert f"norm={norm!r}" in said
    assert la.plan(cnn(), rank=2, targets="conv", norm=norm, modules_to_save=["head"]).notes == adapter.plan.notes


@pytest.mark.parametrize("norm", MODES)
def test_merged_and_unloaded_it_is_a_plain_model_with_the_trained_statistics(norm):
    model = cnn()
    adapter = attach(model, norm=norm)
    y = train(adapter.model)(pictures(9))
    plain = adapter.merge(unload=True)
    assert torch.allclose(plain(pictures(9)), y, atol=1e-5)
    fresh = Cnn().eval()
    assert list(fresh.state_dict()) == list(plain.state_dict())
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh(pictures(9)), plain(pictures(9)))
    assert {n for n, _ in fresh.named_parameters()} == {n for n, _ in plain.named_parameters()}
    assert {type(m) for m in plain.modules()} == {type(m) for m in fresh.modules()}
    assert not any("train" in vars(module) for module in plain.modules())
    assert plain.train().bn1.training


def test_unmerge_gives_the_same_output_back():
    adapter = attach(cnn(), norm="train")
    y = train(adapter.model)(pictures(9))
    adapter.merge()
    assert torch.allclose(adapter.model(pictures(9)), y, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(adapter.model(pictures(9)), y)


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_a_second_adapter_starts_from_the_base(first, second):
    model = cnn()
    before, y = state(model), model(pictures(9))
    one = attach(model, norm=first)
    y1 = train(one.model)(pictures(9))
    one.model.train()
    two = la.attach(model, rank=2, targets="conv", adapter_name="second", modules_to_save=["head"], norm=second)
    assert sum(p.numel() for p in two.parameters()) == two.plan.trainable_parameters
    two.model.eval()
    assert torch.allclose(two.model(pictures(9)), y, atol=1e-6)
    y2 = train(two.model)(pictures(9))
    one.model.set_adapter("default")
    assert torch.equal(one.model(pictures(9)), y1)
    two.model.set_adapter("second")
    assert torch.equal(two.model(pictures(9)), y2)
    two.detach()
    assert torch.equal(one.model(pictures(9)), y1)
    one.model.train()
    assert not any(module.training for module in batch_norms(model).values())
    one.model.eval()
    one.detach()
    assert_same(model, before)


def test_peft_s_own_injection_has_the_modes_too(tmp_path):
    adapter = attach(cnn(), norm="train", use_dora=True)
    assert adapter.plan.engine == "peft"
    y = train(adapter.model)(pictures(9))
    adapter.save(tmp_path)
    back = la.restore(cnn(), tmp_path)
    back.model.eval()
    assert torch.allclose(back.model(pictures(9)), y, atol=1e-6)


def test_a_file_says_its_mode_and_stock_files_are_taken_as_they_are(tmp_path):
    attach(cnn(), norm="train").save(tmp_path / "ours")
    assert inspect_adapter(tmp_path / "ours").metadata[NORM_ENTRY] == "train"
    adapter = la.attach(cnn(), rank=2, targets="conv", modules_to_save=["head", "bn1"])
    y = train(adapter.model)(pictures(9))
    adapter.model.save_pretrained(tmp_path / "stock")
    back = la.restore(cnn(), tmp_path / "stock")
    back.model.eval()
    assert torch.equal(back.model(pictures(9)), y)
    assert back.plan.trained == ("head", "bn1")
    assert back.base.bn1.modules_to_save["default"].weight.requires_grad
    back.model.train()
    assert back.base.bn1.modules_to_save["default"].training
    assert not back.base.plain.training


def test_a_file_with_an_unknown_mode_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    attach(cnn(), norm="train").save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | {NORM_ENTRY: "odd"}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(CheckpointError, match="norm='odd', which is no mode"):
        la.restore(cnn(), tmp_path)


def test_wrong_words_and_models_without_batch_norm():
    with pytest.raises(RequestError, match="norm must be 'eval', 'train' or 'affine', got 'Train'"):
        la.plan(cnn(), norm="Train")
    with pytest.raises(RequestError, match="norm must be"):
        la.plan(cnn(), norm=["eval"])
    plain = nn.Sequential(nn.Linear(8, 8))
    assert any("norm='train' has no effect" in note for note in la.plan(plain, rank=2, norm="train").notes)
    assert not any("norm" in note.lower() for note in la.plan(plain, rank=2).notes)


def test_names_that_peft_could_not_tell_apart_are_refused():
    class Ambiguous(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.block = nn.ModuleDict({"norm": nn.LayerNorm(8), "fc": nn.Linear(8, 8)})

    model = Ambiguous()
    before = state(model)
    with pytest.raises(UnsupportedError, match=r"'norm' can't be trained.*'block.norm' too. Use norm='eval'"):
        la.attach(model, rank=2, norm="train")
    assert_same(model, before)
    la.attach(model, rank=2)
    model = Ambiguous()
    model.block["norm"] = nn.Identity()
    before = state(model)
    adapter = la.attach(model, rank=2, norm="train")
    assert adapter.plan.norms == ("norm",)
    adapter.detach()
    assert_same(model, before)
    shared = nn.BatchNorm1d(8)
    with pytest.raises(UnsupportedError, match="several places"):
        la.attach(nn.Sequential(nn.Linear(8, 8), shared, nn.Linear(8, 8), shared), rank=2, norm="affine")


def test_attaching_that_fails_leaves_the_modes_alone(monkeypatch):
    from lora_adapters import inject

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(inject, "verify", broken)
    model = cnn().train()
    before = state(model)
    with pytest.raises(RuntimeError, match="broken"):
        attach(model, norm="affine")
    assert_same(model, before)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("norm", MODES)
def test_memory_is_predicted_in_the_same_mode(norm):
    model = cnn()
    adapter = attach(model, norm=norm)
    before = statistics(model)
    step = predict_step(adapter.model, {"x": pictures()}, device="cpu")
    assert all(torch.equal(value, before[key]) for key, value in statistics(model).items())
    assert step.gradients == 4 * adapter.plan.trainable_parameters
    perturb(model)

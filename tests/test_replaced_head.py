"""A head that the model replaced after attaching: noticed at saving, and brought under the adapter again."""

import pytest
import torch
from helpers import assert_same, state
from peft import PeftModel
from torch import nn

import lora_adapters as la
from lora_adapters.errors import LoraAdaptersWarning, StateError


class Classifier(nn.Module):
    """A model with reset_classifier, as timm's."""

    def __init__(self, classes=5):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))

    def reset_classifier(self, classes):
        self.head = nn.Linear(16, classes) if classes else nn.Identity()


def classifier(classes=5):
    torch.manual_seed(0)
    return Classifier(classes).eval()


def rows(seed=0):
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def attach(model, **options):
    return la.attach(
        model, **{"rank": 2, "targets": ["body.0", "body.2"], "modules_to_save": ["head", "norm"], **options}
    )


def train(adapter, classes):
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for seed in range(4):
        nn.functional.cross_entropy(adapter.model(rows(seed)), torch.arange(6) % classes).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_saving_without_it_is_refused(tmp_path):
    model = classifier()
    adapter = attach(model)
    model.reset_classifier(3)
    with pytest.raises(StateError, match=r"'head' was replaced after attaching.*adapter.rewrap_trained\(\)"):
        adapter.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    adapter.rewrap_trained()
    adapter.save(tmp_path / "a")


def test_it_is_trained_saved_and_restored(tmp_path):
    model = classifier()
    adapter = attach(model)
    assert adapter.rewrap_trained() == ()
    model.reset_classifier(3)
    new = model.head
    assert adapter.rewrap_trained() == ("head",)
    assert model.head.modules_to_save["default"] is new
    assert adapter.plan.trained_parameters == 2 * 16 + 16 * 3 + 3
    assert sum(p.numel() for p in adapter.parameters()) == adapter.plan.trainable_parameters
    weight = new.weight.detach().clone()
    train(adapter, 3)
    assert not torch.equal(new.weight, weight)
    y = adapter.model(rows())
    assert y.shape == (6, 3)
    adapter.save(tmp_path)
    fresh = classifier()
    fresh.reset_classifier(3)
    back = la.restore(fresh, tmp_path)
    assert torch.equal(back.model(rows()), y)
    stock = classifier()
    stock.reset_classifier(3)
    assert torch.allclose(PeftModel.from_pretrained(stock, tmp_path)(rows()), y, atol=1e-6)


def test_without_the_adapter_the_base_is_what_it_was():
    model = classifier()
    before, y = state(model), model(rows())
    adapter = attach(model)
    model.reset_classifier(3)
    adapter.rewrap_trained()
    train(adapter, 3)
    with adapter.disabled() as disabled:
        assert torch.equal(disabled(rows()), y)
    assert adapter.model(rows()).shape == (6, 3)
    adapter.detach()
    assert_same(model, before)


def test_detaching_without_rewrapping_gives_the_original_too():
    model = classifier()
    before = state(model)
    adapter = attach(model)
    model.reset_classifier(3)
    adapter.detach()
    assert_same(model, before)


def test_merged_and_unloaded_the_new_head_is_in_the_model():
    model = classifier()
    adapter = attach(model)
    model.reset_classifier(3)
    adapter.rewrap_trained()
    train(adapter, 3)
    y = adapter.model(rows())
    plain = adapter.merge(unload=True)
    assert type(plain.head) is nn.Linear
    assert torch.allclose(plain(rows()), y, atol=1e-5)


def test_twice_and_to_no_head_at_all(tmp_path):
    model = classifier()
    before = state(model)
    adapter = attach(model)
    model.reset_classifier(3)
    adapter.rewrap_trained()
    model.reset_classifier(0)
    assert adapter.rewrap_trained() == ("head",)
    assert adapter.plan.trained_parameters == 2 * 16
    y = adapter.model(rows())
    assert y.shape == (6, 16)
    adapter.save(tmp_path)
    fresh = classifier()
    fresh.reset_classifier(0)
    assert torch.equal(la.restore(fresh, tmp_path).model(rows()), y)
    adapter.detach()
    assert_same(model, before)


def test_every_adapter_that_trains_it_gets_one():
    model = classifier()
    before = state(model)
    one = attach(model)
    two = attach(model, adapter_name="two")
    three = attach(model, adapter_name="three", modules_to_save=["norm"])
    two.model.set_adapter("two")
    model.reset_classifier(3)
    new = model.head
    assert one.rewrap_trained() == ("head",)
    assert two.rewrap_trained() == ()
    assert model.head.modules_to_save["two"] is new
    assert set(model.head.modules_to_save) == {"default", "two"}
    assert new.weight.requires_grad
    assert not model.head.modules_to_save["default"].weight.requires_grad
    assert one.plan.trained_parameters == two.plan.trained_parameters == 2 * 16 + 16 * 3 + 3
    assert three.plan.trained_parameters == 2 * 16
    train(two, 3)
    one.model.set_adapter("default")
    assert model(rows()).shape == (6, 3)
    train(one, 3)
    assert sum(p.numel() for p in one.parameters()) == one.plan.trainable_parameters
    two.detach()
    three.detach()
    one.model.set_adapter("default")
    assert model(rows()).shape == (6, 3)
    one.detach()
    assert_same(model, before)


def test_biases_stay_counted():
    model = classifier()
    adapter = attach(model, bias="lora_only")
    assert adapter.plan.trained_parameters == 2 * 16 + 16 * 5 + 5 + 32
    model.reset_classifier(2)
    adapter.rewrap_trained()
    assert adapter.plan.trained_parameters == 2 * 16 + 16 * 2 + 2 + 32


def test_a_restored_adapter_can_do_it_too(tmp_path):
    attach(classifier()).save(tmp_path)
    model = classifier()
    back = la.restore(model, tmp_path)
    model.reset_classifier(4)
    assert back.rewrap_trained() == ("head",)
    assert back.model(rows()).shape == (6, 4)


def test_an_adapted_layer_that_is_gone_is_noticed(tmp_path):
    model = classifier()
    before = state(model)
    adapter = attach(model)
    model.body[0] = nn.Linear(8, 16)
    with pytest.raises(StateError, match=r"'body.0' was replaced after attaching.*detach and attach again"):
        adapter.save(tmp_path)
    adapter.detach()
    assert_same(model, before)
    adapter = attach(model)
    del model.norm
    with pytest.raises(StateError, match="'norm', which adapter 'default' trains, is no longer in the model"):
        adapter.save(tmp_path)


def test_while_merged_it_is_refused():
    model = classifier()
    adapter = attach(model)
    adapter.merge()
    model.reset_classifier(3)
    with pytest.raises(StateError, match="unmerge it first"):
        adapter.rewrap_trained()


def test_another_adapter_can_only_come_once_that_is_settled():
    model = classifier()
    before = state(model)
    one = attach(model)
    model.reset_classifier(3)
    with pytest.raises(StateError, match=r"rewrap_trained"):
        attach(model, adapter_name="two")
    one.rewrap_trained()
    two = attach(model, adapter_name="two")
    assert sum(p.numel() for p in two.parameters()) == two.plan.trainable_parameters
    two.detach()
    one.detach()
    assert_same(model, before)


def test_while_another_adapter_without_a_head_is_active_the_base_s_own_computes():
    model = classifier()
    one = attach(model)
    attach(model, adapter_name="two", modules_to_save=[])
    y = model(rows())
    model.reset_classifier(3)
    assert one.rewrap_trained() == ("head",)
    assert torch.equal(model(rows()), y)
    one.model.set_adapter("default")
    assert model(rows()).shape == (6, 3)
    train(one, 3)


class Head(nn.Module):
    """A head that holds a head: PEFT, going by the ends of names, wraps both."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(x))


def doubled():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.body, model.head = nn.Linear(8, 16), Head()
    return model.eval()


def test_a_head_within_a_head_is_trained_and_saved(tmp_path):
    model = doubled()
    before = state(model)
    one = la.attach(model, rank=2, targets=["body"], modules_to_save=["head"])
    assert sum(p.numel() for p in one.parameters()) == one.plan.trainable_parameters
    weight = model.head.modules_to_save["default"].head.weight
    assert type(weight) is nn.Parameter
    old = weight.detach().clone()
    one.model.train()
    train(one, 3)
    assert not torch.equal(weight, old)
    one.model.eval()
    y = model(rows())
    with pytest.warns(LoraAdaptersWarning, match="'head.head' is inside a module that is trained whole"):
        one.save(tmp_path)
    back = la.restore(doubled(), tmp_path)
    assert torch.equal(back.model(rows()), y)
    two = la.attach(model, rank=2, targets=["body"], modules_to_save=["head"], adapter_name="two")
    assert sum(p.numel() for p in two.parameters()) == two.plan.trainable_parameters
    two.model.train()
    train(two, 3)
    two.model.eval()
    one.model.set_adapter("default")
    assert torch.equal(model(rows()), y)
    two.detach()
    assert torch.equal(model(rows()), y)
    one.detach()
    assert_same(model, before)

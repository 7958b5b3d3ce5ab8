"""AdapterEma against the formula written out, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn

import lora_adapters as la
from lora_adapters.ema import AdapterEma
from lora_adapters.errors import RequestError, StateError


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, dtype=dtype)
        self.norm = nn.BatchNorm2d(5, dtype=dtype)
        self.out = nn.Linear(5, 4, dtype=dtype)

    def forward(self, x):
        return self.out(self.norm(self.conv(x)).mean((2, 3)))


def adapted(dtype=torch.float32):
    torch.manual_seed(0)
    net = Net(dtype)
    adapter = la.attach(net, rank=2, targets=["out"])
    return net, adapter


def train_step(net, seed, dtype=torch.float32):
    trained = [p for p in net.parameters() if p.requires_grad]
    x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    net.train()
    net(x).square().sum().backward()
    with torch.no_grad():
        for p in trained:
            p.sub_(p.grad, alpha=0.01)
            p.grad = None


def values(net):
    return {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"warmup": True, "warmup_power": 0.75}, {"update_after_step": 3}])
def test_the_average_is_the_formula_at_every_step(options):
    net, _ = adapted()
    ema = AdapterEma(net, decay=0.9, **options)
    expected = values(net)
    for step in range(1, 9):
        train_step(net, step)
        ema.update(net, step)
        counted = step - options.get("update_after_step", 0) - 1
        decay = min(0.9, 1 - (1 + counted) ** -options["warmup_power"]) if options.get("warmup") else 0.9
        decay = 0.0 if counted <= 0 else decay
        expected = {n: decay * expected[n] + (1 - decay) * v for n, v in values(net).items()}
        for name, want in expected.items():
            torch.testing.assert_close(ema.state_dict()["averages"][name], want, rtol=1e-5, atol=1e-7)


def test_the_decay_of_timms_ema_is_ours():
    timm_ema = pytest.importorskip("timm.utils").ModelEmaV3
    net, _ = adapted()
    for options in ({}, {"warmup_gamma": 2.0, "warmup_power": 0.7, "min_decay": 0.2, "update_after_step": 2}):
        for warmup in (False, True):
            theirs = timm_ema(net, decay=0.99, use_warmup=warmup, **options)
            ours = AdapterEma(net, decay=0.99, warmup=warmup, **options)
            for step in range(20):
                assert ours.decay_at(step) == theirs.get_decay(step)


def test_calls_are_counted_where_no_step_is_given():
    net, _ = adapted()
    one, two = AdapterEma(net, decay=0.9), AdapterEma(net, decay=0.9)
    for step in range(1, 4):
        train_step(net, step)
        one.update(net)
        two.update(net, step)
    for name, average in one.state_dict()["averages"].items():
        assert torch.equal(average, two.state_dict()["averages"][name])


def test_only_what_trains_is_kept_in_float32():
    net, _ = adapted(torch.bfloat16)
    ema = AdapterEma(net)
    kept = ema.state_dict()["averages"]
    statistics = {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained < set(kept) <= trained | statistics
    assert all(average.dtype == torch.float32 for average in kept.values() if average.is_floating_point())
    assert not any(net.get_parameter(n).data_ptr() == kept[n].data_ptr() for n in trained)


def test_float64_stays_float64():
    net, _ = adapted(torch.float64)
    ema = AdapterEma(net, 0.5)
    train_step(net, 1, torch.float64)
    ema.update(net, 2)
    assert ema.state_dict()["averages"]["out.lora_A.default.weight"].dtype == torch.float64


def test_batch_norm_statistics_are_averaged_where_they_train():
    net = Net()
    ema = AdapterEma(net, decay=0.75)
    start, count = net.norm.running_mean.clone(), net.norm.num_batches_tracked.clone()
    train_step(net, 1)
    ema.update(net, 2)
    kept = ema.state_dict()["averages"]
    torch.testing.assert_close(kept["norm.running_mean"], 0.75 * start + 0.25 * net.norm.running_mean)
    assert kept["norm.num_batches_tracked"] == count + 1


def test_frozen_batch_norm_is_not_kept_and_modes_stay():
    net = Net().eval()
    net.out.train()
    net.norm.train = lambda mode=True: net.norm  # as code that freezes it does
    modes = [m.training for m in net.modules()]
    ema = AdapterEma(net)
    assert not any("running" in name for name in ema.state_dict()["averages"])
    assert [m.training for m in net.modules()] == modes


def test_applied_swaps_values_in_and_back_bit_for_bit():
    net, adapter = adapted()
    ema = AdapterEma(net, decay=0.5)
    for step in range(1, 5):
        train_step(net, step)
        ema.update(net, step)
    net.eval()
    x = torch.randn(2, 3, 5, 5)
    before, own = copy.deepcopy(net.state_dict()), net(x)
    twin = copy.deepcopy(net)
    for name, p in twin.named_parameters():
        if p.requires_grad:
            p.data.copy_(ema.state_dict()["averages"][name])
    for name in ema._statistics:
        twin.get_buffer(name).copy_(ema.state_dict()["averages"][name])
    with ema.applied(adapter.model):
        assert torch.equal(net(x), twin(x))
        assert not torch.equal(net(x), own)
    with pytest.raises(ZeroDivisionError), ema.applied(net):
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(x), own)


def test_going_on_from_a_state_dict_is_exact(tmp_path):
    net, _ = adapted()
    whole = AdapterEma(net, decay=0.9, warmup=True)
    first = AdapterEma(net, decay=0.9, warmup=True)
    for step in range(1, 4):
        train_step(net, step)
        whole.update(net)
        first.update(net)
    torch.save(first.state_dict(), tmp_path / "ema.pt")
    second = AdapterEma(net, decay=0.9, warmup=True)
    second.load_state_dict(torch.load(tmp_path / "ema.pt"))
    for step in range(4, 7):
        train_step(net, step)
        whole.update(net)
        second.update(net)
    assert second.step == whole.step == 6
    for name, average in whole.state_dict()["averages"].items():
        assert torch.equal(average, second.state_dict()["averages"][name])


def test_wrappers_are_looked_through():
    net, _ = adapted()
    ema = AdapterEma(torch.nn.DataParallel(net))
    ema.update(torch.compile(net), 1)
    assert set(ema.state_dict()["averages"]) == set(AdapterEma(net).state_dict()["averages"])


def test_errors_say_what_to_do():
    net, adapter = adapted()
    with pytest.raises(RequestError, match="decay"):
        AdapterEma(net, decay=1.5)
    with pytest.raises(RequestError, match="warmup_gamma"):
        AdapterEma(net, warmup_gamma=0)
    ema = AdapterEma(net)
    other = Net()
    with pytest.raises(StateError, match="another model"):
        ema.load_state_dict(AdapterEma(other).state_dict())
    state = ema.state_dict()
    state["averages"]["out.lora_A.default.weight"] = torch.zeros(3, 3)
    with pytest.raises(StateError, match="another shape"):
        ema.load_state_dict(state)
    adapter.detach()
    with pytest.raises(StateError, match="new AdapterEma"):
        ema.update(net)
    with pytest.raises(RequestError, match="no trainable"):
        AdapterEma(nn.ReLU())

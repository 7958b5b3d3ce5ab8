"""Gradient checkpointing, threads, sharded models: the gradients are those of a plain, serial run."""

import copy
import threading

import pytest
import torch
from helpers import llama, perturb
from layer_checks import adapted, assert_like, no_parent, outcome
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_adapters as la
from lora_adapters.layers.routes import route


def data(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "linear": (lambda: nn.Linear(24, 40), data(3, 7, 24), None),
    "nf4": (lambda: nn.Linear(64, 40), data(3, 7, 64), "nf4"),
    "conv": (lambda: nn.Conv2d(8, 12, 3), data(2, 8, 9, 7), None),
    "nf4 conv": (lambda: nn.Conv2d(8, 12, 3), data(2, 8, 9, 7), "nf4"),
}


class Repeated(nn.Module):
    def __init__(self, inner, use_reentrant):
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_draws_the_same_masks(name, use_reentrant):
    module, x, quantization = KINDS[name]
    model, layer = adapted(module(), (0.4, 0.2), quantization=quantization)
    with no_parent(layer):
        want = outcome(model, x)
        got = outcome(Repeated(model, use_reentrant), x)
    # Without gradients few rows on a 4-bit base take its own kernel: rounded otherwise.
    assert_like({k.removeprefix("inner."): v for k, v in got.items()}, want, 1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_of_a_model(quantization, dropout, use_reentrant):
    x = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    model = llama()
    la.attach(model, rank=4, dropout=dropout, quantization=quantization)
    perturb(model)
    model.train()
    model.enable_input_require_grads()
    found = []
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for _ in range(2):  # a group of siblings decides after the first
            model.zero_grad()
            torch.manual_seed(4)
            model(x, labels=x).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert_like(found[1], found[0], 1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_threads_share_a_layer(name):
    """Four threads, forward and backward, ten times each: what one of them keeps is not another's."""
    module, x, quantization = KINDS[name]
    model, layer = adapted(module(), quantization=quantization)
    factors = [p for p in layer.parameters() if p.requires_grad]

    def step(seed):
        own = (x + seed).requires_grad_()
        return torch.autograd.grad(model(own).square().sum(), [own, *factors])

    with no_parent(layer):
        serial = [step(seed) for seed in range(4)]
        results, problems = [[] for _ in range(4)], []

        def work(seed):
            try:
                results[seed].extend(step(seed) for _ in range(10))
            except Exception as problem:  # shown below: a thread's own exception would be lost
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems
    for want, found in zip(serial, results, strict=True):
        assert len(found) == 10
        for got in found:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_dropout_in_threads_has_one_mask_in_both_directions(name):
    """The generator is shared by all threads; forward and backward of one call must still use one mask.

    With A = B = identity and W = 0 the output is the mask times x, and the input's gradient the mask.
    """
    torch.manual_seed(0)
    width = 16
    if name == "linear":
        model, layer = adapted(nn.Linear(width, width, bias=False), (0.5,), (width,), values=False)
        shape, eye = (40, width), torch.eye(width)
    else:
        model, layer = adapted(nn.Conv1d(width, width, 1, bias=False), (0.5,), (width,), values=False)
        shape, eye = (2, width, 20), torch.eye(width)[:, :, None]
    layer.scaling["default"] = 1.0
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        for factor in layer.factor_parameters("default"):
            factor.copy_(eye)
    model.train()
    wrong = []

    def work():
        for _ in range(60):
            x = torch.ones(shape, requires_grad=True)
            y = model(x)
            torch.rand(3)
            (dx,) = torch.autograd.grad(y.sum(), x)
            if not torch.equal(dx, y.detach()) or not set(y.unique().tolist()) <= {0.0, 2.0}:
                wrong.append(1)

    with no_parent(layer):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# ---- FSDP2 on one process ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def fsdp_cases():
    layer_of = lambda m: m.model.layers[0].self_attn.q_proj  # noqa: E731
    return {
        "blocks": (lambda m: m.model.layers, "split"),
        "layers": (lambda m: [layer_of(m)], "split"),
        "base layers": (lambda m: [layer_of(m).base_layer], "beside"),
        "factors": (lambda m: [layer_of(m).lora_A["default"], layer_of(m).lora_B["default"]], "parent"),
        "dropouts": (lambda m: [layer_of(m).lora_dropout["default"]], "parent"),
    }


@pytest.mark.parametrize("case", fsdp_cases().values(), ids=fsdp_cases())
def test_fsdp2(mesh, case):
    from torch.distributed.fsdp import fully_shard

    pick, path = case
    x = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    plain = llama()
    la.attach(plain, rank=4)
    perturb(plain)
    sharded = copy.deepcopy(plain)
    for module in pick(sharded):
        if list(module.parameters()):
            fully_shard(module, mesh=mesh)
        else:
            module.register_forward_pre_hook(lambda *_: None)
    fully_shard(sharded, mesh=mesh)
    layer = sharded.model.layers[0].self_attn.q_proj
    seen = []
    # A layer that is sharded itself gets its weights by its own hook, before its forward.
    plain_forward = type(layer).forward
    type(layer).forward = lambda self, *args: seen.append((self, route(self).path)) or plain_forward(self, *args)
    try:
        for _ in range(2):
            sharded.zero_grad()
            sharded(x, labels=x).loss.backward()
    finally:
        type(layer).forward = plain_forward
    assert {p for module, p in seen if module is layer} == {path}
    plain(x, labels=x).loss.backward()
    for (name, want), (_, got) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
        if want.requires_grad:
            torch.testing.assert_close(got.grad.full_tensor(), want.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_sharded_weight_outside_its_forward_is_no_plain_tensor(mesh):
    from torch.distributed.fsdp import fully_shard

    model, layer = adapted(nn.Linear(24, 40))
    fully_shard(model, mesh=mesh)
    assert route(layer).path == "parent"
    assert "an adapter weight is a DTensor" in route(layer).reason

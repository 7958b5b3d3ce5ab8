"""What is not exactly plain LoRA is left to PEFT's forward, the base is called where it must be; route says why."""

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from helpers import perturb
from layer_checks import adapted, assert_like, no_parent, outcome, stock_class
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn.modules.module import register_module_full_backward_hook, register_module_full_backward_pre_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import lora_adapters as la
from lora_adapters.errors import MergeError
from lora_adapters.layers.routes import route
from lora_adapters.weights import Bnb4bit


def data(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


MODULES = {
    "linear": (lambda: nn.Linear(24, 40), data(3, 7, 24), None),
    "nf4": (lambda: nn.Linear(64, 40), data(3, 7, 64), "nf4"),
    "conv": (lambda: nn.Conv2d(8, 12, 3), data(2, 8, 9, 7), None),
    "nf4 conv": (lambda: nn.Conv2d(8, 12, 3), data(2, 8, 9, 7), "nf4"),
    "embedding": (lambda: nn.Embedding(24, 40), torch.arange(24).view(3, 8), None),
}


def make(name="linear", dropouts=(0.0,), **options):
    module, x, quantization = MODULES[name]
    torch.manual_seed(0)
    model, layer = adapted(module(), dropouts, quantization=quantization, **options)
    return model, layer, x


@contextmanager
def parent_runs(layer):
    """Fail unless PEFT's own forward runs."""
    plain = stock_class(layer).forward
    with mock.patch.object(stock_class(layer), "forward", autospec=True, side_effect=plain) as called:
        yield
    assert called.called


def assert_parent(model, layer, x, reason):
    """Assert that route names the reason and that PEFT's forward gives the result."""
    assert route(layer).path == "parent"
    assert reason in route(layer).reason
    with parent_runs(layer):
        got = outcome(model, x)
    layer.fused, want = False, outcome(model, x)
    layer.fused = True
    assert_like(got, want, 0)


def assert_beside(model, layer, x, reason, tolerance=1e-5):
    """Assert that the base module is called, and the result is PEFT's."""
    assert route(layer).path == "beside"
    assert reason in route(layer).reason
    plain = type(layer.base_layer).__call__
    with no_parent(layer), mock.patch.object(type(layer.base_layer), "__call__", autospec=True) as called:
        called.side_effect = plain
        got = outcome(model, x)
    assert called.called
    layer.fused, want = False, outcome(model, x)
    layer.fused = True
    assert_like(got, want, tolerance)


# ---- what the adapter is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv", "embedding"])
def test_dora(name):
    model, layer, x = make(name, use_dora=True)
    assert_parent(model, layer, x, "PEFT's Dora")


def test_alora():
    """The variant reads which rows it applies to from a keyword."""
    _, layer, x = make(alora_invocation_tokens=[1, 2])
    assert "PEFT's ALora" in route(layer).reason
    with parent_runs(layer), torch.no_grad():
        some, all_ = layer(x, alora_offsets=[2, None, 4]), layer(x)
    assert not torch.allclose(some[0], all_[0])


def test_keywords_go_to_peft():
    model, layer, x = make(dropouts=(0.0, 0.0))
    model.eval()
    with parent_runs(layer), torch.no_grad():
        mixed = layer(x, adapter_names=["default", "__base__", "second"])
    assert torch.equal(mixed[1], layer.base_layer(x)[1])
    layer.set_adapter(["second"])
    with no_parent(layer), torch.no_grad():
        torch.testing.assert_close(mixed[2], layer(x)[2])
    with parent_runs(layer), pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(x, adapter_names=["default"])


@pytest.mark.parametrize("name", MODULES)
def test_a_scaling_that_is_a_tensor(name):
    model, layer, x = make(name)
    layer.scaling["default"] = torch.tensor(0.7)
    assert_parent(model, layer, x, "the scaling is a Tensor")


@pytest.mark.parametrize("scaling", [0, 0.0, -2, 3.5])
@pytest.mark.parametrize("name", MODULES)
def test_scalings_that_change(name, scaling):
    """Each call reads them: they are no part of the decision."""
    model, layer, x = make(name)
    outcome(model, x)
    layer.scaling["default"] = scaling
    with no_parent(layer):
        got = outcome(model, x)
    layer.fused = False
    assert_like(got, outcome(model, x))


def test_adapters_of_different_dtypes():
    model, layer, x = make(dropouts=(0.0, 0.0))
    layer.lora_A["second"].double()
    layer.lora_B["second"].double()
    assert_parent(model, layer, x, "different dtypes")


class Quiet(nn.Dropout):
    pass


@pytest.mark.parametrize("name", ["linear", "nf4", "conv"])
@pytest.mark.parametrize("other", [Quiet(0.5), nn.AlphaDropout(0.5), nn.Dropout(0.5, inplace=True), nn.Linear(24, 24)])
def test_another_dropout(name, other):
    model, layer, x = make(name)
    layer.lora_dropout["default"] = copy.deepcopy(other)
    assert route(layer).path == "parent"
    if not isinstance(other, nn.Linear) and not getattr(other, "inplace", False):
        assert_parent(model, layer, x, "the adapter's dropout is a")


def test_another_a():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for module, reason in (
        (Own(24, 5, bias=False), "the adapter holds a Own"),
        (nn.Linear(24, 5), "lora_A has a bias"),
    ):
        model, layer, x = make()
        layer.lora_A["default"] = module
        assert_parent(model, layer, x, reason)


@pytest.mark.parametrize("name", ["linear", "nf4", "conv"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_parametrizations_of_the_factors(name, part):
    model, layer, x = make(name)
    parametrizations.weight_norm(getattr(layer, part)["default"])
    assert_parent(model, layer, x, "the adapter holds a Parametrized")


def test_pruned_factors():
    model, layer, x = make()
    prune.random_unstructured(layer.lora_A["default"], "weight", 0.5)
    assert_parent(model, layer, x, "hooks")


def test_casting_switched_off():
    model, layer, x = make()
    with disable_input_dtype_casting(model):
        assert_parent(model, layer, x, "casting of inputs is switched off")
    assert route(layer).path == "split"


@pytest.mark.parametrize("name", ["linear", "conv", "embedding"])
def test_replicas_of_data_parallel(name):
    """Their tensors are plain attributes, and no parameters."""
    model, layer, x = make(name)
    want = outcome(model, x)["y"]

    def replica(module):
        twin = module._replicate_for_data_parallel()
        for key, parameter in module._parameters.items():
            twin.__dict__[key] = None if parameter is None else parameter * 1
        twin._modules = {key: replica(child) for key, child in module._modules.items()}
        return twin

    twin = replica(layer)
    assert "is not among its module's parameters" in route(twin).reason
    if name != "embedding":  # PEFT's own forward can't: torch does not replicate a ParameterDict
        torch.testing.assert_close(twin(x), want)


# ---- hooks -------------------------------------------------------------------------------------------------------------

HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(lambda *a: f()),
    "forward_pre": lambda m, f: m.register_forward_pre_hook(lambda *a: f()),
    "full_backward": lambda m, f: m.register_full_backward_hook(lambda *a: f()),
    "full_backward_pre": lambda m, f: m.register_full_backward_pre_hook(lambda *a: f()),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("name", ["linear", "nf4", "conv"])
def test_hooks_on_the_adapters_modules_fire(name, part, kind):
    model, layer, x = make(name, dropouts=(0.2,))
    fired = []
    handle = HOOKS[kind](getattr(layer, part)["default"], lambda: fired.append(1))
    assert_parent(model, layer, x, "has hooks")
    assert fired
    handle.remove()
    assert route(layer).path in ("split", "merged")


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", MODULES)
def test_hooks_on_the_base_fire(name, kind):
    if name == "embedding" and kind == "full_backward":
        return  # torch gives such a hook no call where the input has no gradient
    model, layer, x = make(name)
    layer.base_layer.weight.requires_grad_(layer.base_layer.weight.is_floating_point())
    fired = []
    HOOKS[kind](layer.base_layer, lambda: fired.append(1))
    assert_beside(model, layer, x, "hooks")
    assert fired


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", MODULES)
def test_hooks_on_the_layer_fire_and_change_nothing(name, kind):
    model, layer, x = make(name)
    want, fired = outcome(model, x), []
    HOOKS[kind](layer, lambda: fired.append(1))
    with no_parent(layer):
        assert_like(outcome(model, x), want, 0)
    assert fired


def test_hooks_that_change_values_count():
    model, layer, x = make()
    plain = outcome(model, x)["y"]
    layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    assert_beside(model, layer, x, "hooks")
    torch.testing.assert_close(outcome(model, x)["y"] - plain, layer.base_layer(x) / 2)


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        register_module_full_backward_hook,
        register_module_full_backward_pre_hook,
    ],
)
@pytest.mark.parametrize("name", ["linear", "nf4 conv"])
def test_hooks_on_all_modules_see_the_adapters_modules(name, register):
    model, layer, x = make(name)
    seen = set()
    handle = register(lambda module, *_: seen.add(module) and None)
    try:
        assert_parent(model, layer, x, "a hook is registered on all modules")
    finally:
        handle.remove()
    assert {layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]} <= seen
    assert route(layer).path != "parent"


def test_hooks_on_parameters_fire():
    model, layer, x = make()
    seen = {}
    for key, parameter in layer.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda g, key=key: seen.setdefault(key, g.clone()) * 2)
            parameter.register_post_accumulate_grad_hook(lambda p, key=key: seen.update({key + " after": p.grad}))
    with no_parent(layer):
        got = outcome(model, x)
    assert len(seen) == 4
    assert all(torch.equal(got["0." + key], 2 * seen[key]) for key in seen if not key.endswith("after"))


@pytest.mark.parametrize("part", ["base_layer", "lora_A"])
def test_a_forward_put_on_an_instance(part):
    model, layer, x = make()
    module = layer.base_layer if part == "base_layer" else layer.lora_A["default"]
    plain = module.forward
    module.forward = lambda x: 3 * plain(x)
    (assert_beside if part == "base_layer" else assert_parent)(model, layer, x, "a forward put on it")


def test_accelerates_offload():
    """Its hooks bring the weights from the CPU (here from a map) for each call, and put the module on meta after it."""
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, layer, x = make()
    with torch.no_grad():
        want = model(x)
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        assert layer.base_layer.weight.device.type == "meta"
        assert route(layer).path == "parent"
        torch.testing.assert_close(model(x), want)
    model, layer, x = make()
    add_hook_to_module(layer.base_layer, AlignDevicesHook(execution_device="cpu", offload=True))
    with torch.no_grad():
        assert layer.base_layer.weight.device.type == "meta"
        assert route(layer).path == "beside"
        with no_parent(layer):
            torch.testing.assert_close(model(x), want)


def test_merging_under_accelerates_hooks():
    """A copy of the base must not compute with the old one's weight, and the layer has no hooks of its own."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model, layer, x = make()
    with torch.no_grad():
        want = model(x)
        add_hook_to_module(layer.base_layer, AlignDevicesHook(execution_device="cpu"))
        assert not hasattr(layer, "_hf_hook")
        layer.merge()
        torch.testing.assert_close(model(x), want)
        layer.unmerge()
        remove_hook_from_module(model, recurse=True)
        layer.merge()  # removing hooks leaves a bound forward behind
        torch.testing.assert_close(model(x), want)
        layer.unmerge()
        layer.base_layer.forward = lambda x: 0 * x
        with pytest.raises(MergeError, match="old weight"):
            layer.merge()


# ---- what the base is --------------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Called(nn.Linear):
    def __call__(self, *args):
        return 2 * super().__call__(*args)


class Computed(nn.Linear):
    """Its weight is not the parameter of that name."""

    weight = property(lambda self: 2 * self._parameters["weight"], lambda self, value: None)

    def __init__(self, *sizes):
        nn.Module.__init__(self)
        self.in_features, self.out_features = sizes
        self._parameters["weight"] = nn.Parameter(torch.randn(sizes[1], sizes[0]))
        self.bias = None


class Shifted(nn.Embedding):
    def forward(self, input):
        return super().forward((input + 1) % self.num_embeddings)


@pytest.mark.parametrize("base", [Doubled(24, 40), Called(24, 40)], ids=str)
def test_a_class_with_a_forward_of_its_own(base):
    """Under PEFT's own layer: what it computes stays. (What `attach` builds is in test_own_forward.)"""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), LoraConfig(r=3, target_modules=["0"]))
    perturb(model)
    la.optimize(model)
    layer = model.get_base_model()[0]
    assert_beside(model.get_base_model(), layer, data(3, 7, 24), "a forward of its own")


def test_an_embedding_with_a_forward_of_its_own():
    model, layer = adapted(Shifted(24, 40))
    assert_beside(model, layer, torch.arange(24), "rows are gathered")


def test_a_class_whose_weight_is_computed():
    model, layer, x = make()
    layer.base_layer = Computed(24, 40).requires_grad_(False)
    assert_beside(model, layer, x, "a forward of its own")


def test_a_class_patched_after_it_was_imported(monkeypatch):
    class Plain(nn.Linear):
        pass

    def doubled(self, input):
        return 2 * nn.functional.linear(input, self.weight, self.bias)

    model, layer = adapted(Plain(24, 40))
    assert route(layer).path == "split"
    plain = outcome(model, data(3, 24))
    with monkeypatch.context() as patch:
        patch.setattr(Plain, "forward", doubled)
        assert_beside(model, layer, data(3, 24), "a forward of its own")
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", doubled)
        assert_parent(model, layer, data(3, 24), "the adapter holds a")
    assert_like(outcome(model, data(3, 24)), plain, 0)


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_parametrizations_of_the_base(name, what):
    class Twice(nn.Module):
        def forward(self, value):
            return 2 * value

    model, layer, x = make(name)
    parametrize.register_parametrization(layer.base_layer, what, Twice())
    assert_beside(model, layer, x, "")


def test_a_subclass_of_tensor_as_weight():
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            args = [
                a.as_subclass(torch.Tensor) * 2 if isinstance(a, cls) and func is nn.functional.linear else a
                for a in args
            ]
            return super().__torch_function__(func, types, args, kwargs)

    model, layer, x = make()
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().as_subclass(Own), requires_grad=False)
    assert_beside(model, layer, x, "not a plain tensor")
    model, layer, x = make()
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.detach().as_subclass(Own))
    assert_parent(model, layer, x, "an adapter weight is a")


def test_a_4_bit_weight_that_bitsandbytes_repacked():
    """A forward in eval mode changes its layout on CPUs with AVX512-BF16. What PEFT computes then is computed here."""
    torch.manual_seed(0)
    model, layer = adapted(nn.Linear(64, 32), quantization="nf4")
    layer.base_layer.support_avx512bf16_for_cpu = has_avx512bf16()
    x = data(3, 7, 64)
    model.eval()
    with torch.no_grad():
        layer(x)
    state = layer.base_layer.weight.quant_state
    assert getattr(state, "packing_format_for_cpu", False) == has_avx512bf16()
    assert route(layer).path == ("beside" if has_avx512bf16() else "merged")
    with torch.no_grad():
        got, layer.fused = layer(x), False
        torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-5)


def test_a_4_bit_weight_quantized_from_its_transpose():
    _, layer, _ = make("nf4")
    state = layer.base_layer.weight.quant_state
    state.shape = torch.Size((64, 40))
    assert route(layer).path == "beside"
    state.shape = torch.Size((40, 64))
    assert route(layer).path == "merged"
    state.state2.blocksize = 128
    assert route(layer).path == "beside"


def test_int8_is_left_to_bitsandbytes():
    torch.manual_seed(0)
    model, layer = adapted(nn.Linear(64, 40), quantization="int8")
    assert_beside(model, layer, data(3, 7, 64), "a forward of its own")


@pytest.mark.parametrize("rows", [1, 64, 65])
@pytest.mark.parametrize("quantizer", [Bnb4bit("nf4", 64, True), Bnb4bit("fp4", 64, False)], ids=str)
def test_few_rows_without_gradients_on_a_4_bit_base(rows, quantizer):
    torch.manual_seed(0)
    model, layer = adapted(nn.Linear(64, 40), (0.0, 0.5), quantization=quantizer)
    x = data(rows, 64)
    for context in (torch.no_grad, torch.inference_mode):
        for train in (False, True):
            model.train(train)
            with context():
                layer.fused = True
                torch.manual_seed(0)
                with no_parent(layer), mock.patch.object(type(layer.base_layer), "forward", autospec=True) as called:
                    called.side_effect = type(layer.base_layer).forward
                    if rows > 64:
                        got = layer(x)
                if rows <= 64:
                    with no_parent(layer):
                        torch.manual_seed(0)
                        got = layer(x)
                layer.fused = False
                torch.manual_seed(0)
                torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-5)


# ---- what looks at the operations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "nf4", "conv", "embedding"])
def test_transforms_of_functions(name):
    """Vmap, grad and jvp over the model's parameters give what they give for PEFT's forward."""
    model, layer, x = make(name)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rows = torch.stack([x, x + 1 if x.is_floating_point() else x.flip(0)])

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    results = {}
    for layer.fused in (False, True):
        found = [torch.func.grad(loss)(parameters, x)]
        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, rows) if name != "nf4" else {})
        found.append({"jvp": torch.func.jvp(lambda p: loss(p, x), (parameters,), (parameters,))[1]})
        results[layer.fused] = found
    for got, want in zip(results[True], results[False], strict=True):
        assert_like(got, want)


def test_functional_call_without_a_transform_is_fused():
    model, layer, x = make()
    other = {n: torch.randn_like(p).requires_grad_() for n, p in model.named_parameters() if "lora" in n}
    with no_parent(layer):
        y = torch.func.functional_call(model, other, (x,))
    got = torch.autograd.grad(y.sum(), list(other.values()))
    layer.fused = False
    want = torch.autograd.grad(torch.func.functional_call(model, other, (x,)).sum(), list(other.values()))
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine, expected)


def test_forward_derivatives():
    from torch.autograd import forward_ad

    model, layer, x = make("conv")
    tangents = []
    for layer.fused in (False, True):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent)
    assert torch.equal(*tangents)


@pytest.mark.parametrize("name", ["linear", "conv", "embedding"])
def test_traced_and_exported_models(name):
    model, _, x = make(name)
    model.eval()
    want = model(x)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), want)
    assert "PythonOp" not in str(traced.inlined_graph)
    for strict in (True, False):
        exported = torch.export.export(model, (x,), strict=strict)
        names = {str(node.target) for node in exported.graph.nodes}
        assert not any("autograd" in n or "_Linear" in n for n in names), names
        torch.testing.assert_close(exported.module()(x), want)


def test_dispatch_modes_see_every_product():
    from torch.utils.flop_counter import FlopCounterMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    model, _, x = make()
    names = []
    with Seen():
        model(x).sum().backward()
    assert sum("mm" in name for name in names) == 6
    with FlopCounterMode(display=False) as flops:
        outcome(model, x)
    assert flops.get_total_flops() >= 2 * 21 * (2 * 24 * 40 + 5 * (24 + 40) * 3)


@pytest.mark.parametrize("kind", ["nested", "sparse"])
def test_inputs_that_are_not_strided(kind):
    model, layer, _ = make()
    dense = data(2, 24)
    x = torch.nested.nested_tensor([dense, dense[:1]]) if kind == "nested" else dense.to_sparse()
    with parent_runs(layer), torch.no_grad():
        y = model(x)
    want = layer(dense)
    torch.testing.assert_close(y.unbind()[0] if kind == "nested" else y.to_dense(), want)


def test_a_subclass_of_tensor_as_input():
    class Own(torch.Tensor):
        pass

    model, layer, x = make()
    with parent_runs(layer):
        y = model(x.as_subclass(Own))
    assert type(y) is Own


def test_values_kept_elsewhere():
    """torch.autograd.graph.save_on_cpu copies what is saved, and its copies have strides of their own."""
    for name, x in (("linear", data(24, 3, 7).movedim(0, -1)), ("conv", data(2, 9, 7, 8).movedim(-1, 1))):
        for dropouts in ((0.0,), (0.5, 0.2)):
            model, layer, _ = make(name, dropouts)
            want = outcome(model, x)
            with no_parent(layer), torch.autograd.graph.save_on_cpu():
                assert_like(outcome(model, x), want, 1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_a_second_derivative_raises(name):
    """PEFT's forward could; a wrong result would be worse than none."""
    model, layer, x = make(name)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    first = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in first).backward()


@pytest.mark.parametrize("what", ["x", "weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("name", ["linear", "nf4", "conv", "nf4 conv"])
def test_writing_between_forward_and_backward_raises(name, what):
    model, layer, x = make(name)
    x = x.clone().requires_grad_() * 1
    tensors = {"x": x, "weight": layer.base_layer.weight}
    tensors |= {part: getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B")}
    y = model(x)
    with torch.no_grad():
        tensors[what].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_plugins_weight_written_between_forward_and_backward_raises():
    torch.manual_seed(0)
    model, layer = adapted(nn.Linear(25, 40), quantization="int4-rows")
    assert route(layer).path == "merged"
    y = model(data(3, 25).requires_grad_())
    with torch.no_grad():
        layer.base_layer.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name, context):
    model, layer, x = make(name)
    with context():
        with no_parent(layer):
            got = model(x)
        layer.fused = False
        torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)
    assert not got.requires_grad


@pytest.mark.parametrize("name", MODULES)
def test_an_activation_in_place_may_follow(name):
    model, layer, x = make(name)
    together = nn.Sequential(model, nn.ReLU(inplace=True))
    with no_parent(layer):
        got = outcome(together, x)
    layer.fused = False
    assert_like(got, outcome(together, x))


@pytest.mark.parametrize("name", ["linear", "nf4"])
def test_many_gradients_at_once(name):
    model, layer, x = make(name)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    found = []
    for layer.fused in (False, True):
        y = model(x)
        dys = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(2))
        found.append(torch.autograd.grad(y, parameters, dys, is_grads_batched=True))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_stock_peft_variants_by_config():
    """Velora, BdLoRA and the like: whatever registers a variant is PEFT's business."""
    for options in ({"use_dora": True}, {"alora_invocation_tokens": [1]}):
        model = get_peft_model(nn.Sequential(nn.Linear(24, 40)), LoraConfig(target_modules=["0"], **options))
        la.optimize(model)
        assert route(model.base_model.model[0]).path == "parent"

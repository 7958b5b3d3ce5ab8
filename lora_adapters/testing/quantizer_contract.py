"""What every quantizer must do, as tests a plugin author inherits."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..api import attach, restore
from ..hooks.manager import plugins
from ..hooks.specs import QuantizerSpec
from ..weights import BUILTIN_QUANTIZERS, Quantizer, WeightStore, layer_kind, quantizer_for, store_for
from .checks import difference, meta_copy, refused, relative_error, state_of, train
from .models import TinyConv, TinyMLP


class QuantizerContract:
    """Subclass it in a test file, name the subclass Test..., and say how to make your quantizer and how exact it is.

    The plugin must be installed (or registered with `lora_adapters.hooks.manager.plugins().register(module, name)`),
    since `attach(model, quantization=name)` has to find it.

    Attributes:
        max_relative_error: largest |stored - original| a weight may have, relative to the layer's largest |weight|.
        requantize_error: the same, for quantizing values that are already quantized. 0 means the same bytes.
        forward_tolerance: largest difference of an output or gradient from the dense layer that holds the dequantized
            weight, relative to the largest value. More than rounding only if the format also quantizes its input.
    """

    max_relative_error: float
    requantize_error: float = 0.0
    forward_tolerance: float = 1e-5

    def make_quantizer(self) -> Quantizer:
        """Return your quantizer."""
        raise NotImplementedError("QuantizerContract: define make_quantizer(self) and return your quantizer.")

    def make_layers(self) -> list[nn.Module]:
        """Return dense layers to quantize, at least one of each kind in the spec; override it for sizes of yours."""
        return [
            nn.Linear(64, 48),
            nn.Linear(96, 33, bias=False),
            nn.Linear(10, 7),
            nn.Conv1d(8, 12, 3, padding=1),
            nn.Conv2d(4, 6, 3, stride=2, groups=2),
        ]

    # ---- what it says --------------------------------------------------------------------------------------------

    def test_it_is_found_by_name(self) -> None:
        """The name leads to the quantizer, and the spec's kinds and bits are true."""
        quantizer, spec = self.make_quantizer(), self._spec()
        found = quantizer_for(quantizer.name, plugins().quantizers())
        assert type(found) is type(quantizer), f"The name {quantizer.name!r} leads to a {type(found).__name__}."
        kinds = {layer_kind(layer) for layer, _ in self._quantized()}
        assert kinds == set(spec.kinds), f"The spec says {spec.kinds}, supports() takes {sorted(map(str, kinds))}."
        bits = 8 * quantizer.nbytes(torch.Size((256, 256))) / 256**2
        assert spec.bits <= bits <= spec.bits + 2, f"The spec says {spec.bits} bits; a value takes {bits:.2f}."

    def test_what_supports_refuses_is_refused(self) -> None:
        """quantize refuses what supports refuses, and what replacing would break is refused."""

        class Scaled(nn.Linear):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(input)

        quantizer = self.make_quantizer()
        lost = [nn.LayerNorm(8), Scaled(64, 64), next(self._quantized())[1]]
        for layer in [*self.make_layers(), *lost]:
            what, reason = f"Quantizing a {type(layer).__name__}", quantizer.supports(layer)
            assert isinstance(reason, str), f"supports() must return a str, got {reason!r}."
            if reason:
                with refused(f"{what} ({reason})"):
                    quantizer.quantize(layer, torch.float32)
            else:
                assert not any(layer is other for other in lost), f"{what} loses what the layer does: refuse it."

    def test_store_knows_its_own_modules_only(self) -> None:
        """store answers for this format's modules and for nothing else."""
        quantizer = self.make_quantizer()
        for layer, module in self._quantized():
            store = quantizer.store(module)
            assert isinstance(store, WeightStore), f"{store!r} lacks part of lora_adapters.weights.WeightStore."
            assert store.format == quantizer.name, f"The store's format is {store.format!r}."
            assert store.module is module, "store.module must be the module that was asked about."
            assert quantizer.store(layer) is None, f"store() must return None for a dense {type(layer).__name__}."
            general = store_for(module)
            assert general is not None, "Nobody knows the store of the quantized module: is the plugin installed?"
            assert general.format == quantizer.name, f"Without its quantizer the module counts as {general.format!r}."

    # ---- the stored weight ---------------------------------------------------------------------------------------

    def test_quantize_leaves_the_dense_module_alone(self) -> None:
        """The dense module keeps its values and shares none."""
        for layer in self._supported():
            layer.eval()
            before = state_of(layer)
            module = self.make_quantizer().quantize(layer, torch.float32)
            assert not module.training, "The new module must take over training=False."
            bias = getattr(module, "bias", None)
            if bias is not None:
                with torch.no_grad():
                    bias.add_(1)
            assert not (what := difference(before, state_of(layer))), f"Quantizing changed the dense module's {what}."

    def test_sizes(self) -> None:
        """Shape, dtype and bytes are exact."""
        quantizer = self.make_quantizer()
        for layer, module in self._quantized():
            store = self._store(module)
            assert store.shape == layer.weight.shape, f"store.shape is {store.shape}, not {layer.weight.shape}."
            assert store.dtype == torch.float32, f"store.dtype is {store.dtype}, not the compute dtype float32."
            said = quantizer.nbytes(store.shape)
            assert store.nbytes == said, f"{tuple(store.shape)} takes {store.nbytes} bytes; nbytes() says {said}."

    def test_meta_modules(self) -> None:
        """A meta module gives a meta module of the same class and sizes."""
        quantizer = self.make_quantizer()
        for layer, module in self._quantized():
            empty = quantizer.quantize(meta_copy(layer), torch.float32)
            assert type(empty) is type(module), f"On the meta device it becomes a {type(empty).__name__}."
            sizes = {n: (p.shape, p.dtype) for n, p in (*module.named_parameters(), *module.named_buffers())}
            for name, tensor in (*empty.named_parameters(), *empty.named_buffers()):
                assert tensor.device.type == "meta", f"{name} of a meta module is on {tensor.device}."
                assert sizes.pop(name) == (tensor.shape, tensor.dtype), f"{name} of a meta module has another size."
            assert not sizes, f"A meta module lacks {sorted(sizes)}."
            store = self._store(empty)
            assert (store.shape, store.nbytes) == (layer.weight.shape, quantizer.nbytes(layer.weight.shape))

    def test_read(self) -> None:
        """read returns a fresh, stable tensor within the stated error."""
        for layer, module in self._quantized():
            store = self._store(module)
            first = store.read()
            assert (first.shape, first.dtype) == (store.shape, store.dtype), "read() must return store.shape and dtype."
            assert not first.requires_grad, "read() must return a detached tensor."
            kept = first.clone()
            first.zero_()
            assert torch.equal(store.read(), kept), "Changing what read() returned changed the stored weight."
            assert store.read(torch.bfloat16).dtype == torch.bfloat16, "read(dtype) must return that dtype."
            error = relative_error(kept, layer.weight)
            assert error <= self.max_relative_error, f"{tuple(store.shape)} is off by {error:.4f}."

    def test_write(self) -> None:
        """write stores another weight in place within the stated error."""
        for layer, module in self._quantized():
            store, other = self._store(module), torch.randn_like(layer.weight)
            store.write(other)
            error = relative_error(store.read(), other)
            assert error <= self.max_relative_error, f"A weight that was written is off by {error:.4f}."
            with refused("Writing a weight of another shape"):
                store.write(torch.zeros(1, 1, 1))

    def test_quantizing_again_changes_nothing(self) -> None:
        """Quantized values are stored as they are."""
        for _, module in self._quantized():
            store, before = self._store(module), state_of(module)
            values = store.read(torch.float32)
            store.write(values)
            error = relative_error(store.read(torch.float32), values)
            assert error <= self.requantize_error, f"Quantizing quantized values moves them by {error:g}."
            if not self.requantize_error:
                assert not (what := difference(before, state_of(module))), f"Quantizing again changes {what}."

    def test_dense_module(self) -> None:
        """dense_module gives the framework's own layer and leaves the module alone."""
        for layer, module in self._quantized():
            store, before = self._store(module), state_of(module)
            dense = store.dense_module(store.read())
            weight, bias = dense._parameters["weight"], dense._parameters["bias"]
            assert weight is not None
            assert type(dense) is type(layer), (
                f"dense_module() makes a {type(dense).__name__} of a {type(layer).__name__}."
            )
            assert torch.equal(weight, store.read()), "dense_module() must hold the weight it was given."
            if layer.bias is not None:
                assert bias is not None, "dense_module() must keep the bias."
                assert torch.equal(bias, layer.bias), "dense_module() must keep the bias."
            assert not (what := difference(before, state_of(module))), f"dense_module() changed the module's {what}."

    # ---- the module ----------------------------------------------------------------------------------------------

    def test_forward_and_gradient_are_those_of_the_dequantized_weight(self) -> None:
        """Output and input gradient equal the dense layer's, in train and eval."""
        for _, module in self._quantized():
            store = self._store(module)
            dense = store.dense_module(store.read())
            for training in (True, False):
                results = []
                for one in (module.train(training), dense.train(training)):
                    x = self._input(dense).requires_grad_()
                    y = one(x)
                    y.square().sum().backward()
                    assert x.grad is not None, f"No gradient reaches the input (training={training})."
                    results += [y, x.grad]
                for what, got, wanted in (("output", *results[::2]), ("input's gradient", *results[1::2])):
                    error = relative_error(got, wanted)
                    message = f"{tuple(store.shape)}, training={training}: the {what} is off by {error:g}."
                    assert error <= self.forward_tolerance, message

    def test_state_dict_round_trip(self) -> None:
        """The state dict survives safetensors and loads into another module."""
        for layer, module in self._quantized():
            fresh = self.make_quantizer().quantize(copy.deepcopy(layer).apply(_fill), torch.float32)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "layer.safetensors"
                save_file({k: v.clone().contiguous() for k, v in module.state_dict().items()}, file)
                self.load_state(fresh, load_file(file))
            assert not (what := difference(state_of(module), state_of(fresh))), f"After loading {what} differs."
            assert torch.equal(self._store(fresh).read(), self._store(module).read()), "The loaded weight differs."

    def load_state(self, module: nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Load a state dict into a quantized module. Override it only for classes that are loaded another way."""
        module.load_state_dict(state, strict=True)

    def test_deepcopy(self) -> None:
        """A deep copy is equal and independent."""
        for _, module in self._quantized():
            before, twin = state_of(module), copy.deepcopy(module)
            assert not (what := difference(before, state_of(twin))), f"In a deep copy {what} differs."
            store = self._store(twin)
            store.write(torch.randn(store.shape))
            assert not (what := difference(before, state_of(module))), f"Writing to a deep copy changed {what}."

    def test_casting_keeps_the_stored_bytes(self) -> None:
        """.to(bfloat16) leaves the stored weight alone and the module usable."""
        for _, module in self._quantized():
            before, values = state_of(module, skip=("bias",)), self._store(module).read(torch.float32)
            module.to(torch.bfloat16)
            assert not (what := difference(before, state_of(module, skip=("bias",)))), f".to(bfloat16) changed {what}."
            assert torch.equal(self._store(module).read(torch.float32), values), ".to(bfloat16) changed the weight."
            y = module(self._input(module).bfloat16())
            assert y.dtype == torch.bfloat16, f"A bf16 input gives a {y.dtype} output."
            assert torch.isfinite(y).all(), "The output after .to(bfloat16) is not finite."

    # ---- in a model ------------------------------------------------------------------------------------------------

    def test_a_quantized_model_trains(self) -> None:
        """attach(quantization=name) trains the adapter through the frozen weight."""
        for model, inputs, targets in self._models():
            adapter = self._attach(model, targets)
            packed = {name: self._store(layer.get_base_layer()).read() for name, layer in adapter.layers.items()}
            losses = train(adapter.model, inputs, _loss, steps=8)
            assert losses[-1] < losses[0], f"Training does not lower the loss: {losses[0]:g} to {losses[-1]:g}."
            for name, layer in adapter.layers.items():
                assert torch.count_nonzero(layer.lora_B["default"].weight), f"No gradient reached {name!r}."  # type: ignore[arg-type]
                same = torch.equal(packed[name], self._store(layer.get_base_layer()).read())
                assert same, f"Training changed the quantized weight of {name!r}."

    def test_merging_and_unmerging(self) -> None:
        """Merging keeps the output, unmerging gives every bit back."""
        for model, inputs, targets in self._models():
            adapter = self._attach(model, targets)
            train(adapter.model, inputs, _loss, steps=8)
            before, output = state_of(model), adapter.model(**inputs)
            adapter.merge()
            error = relative_error(adapter.model(**inputs), output)
            assert error <= 10 * self.forward_tolerance, f"Merging moves the output by {error:g}."
            adapter.unmerge()
            assert not (what := difference(before, state_of(model))), f"After unmerge {what} differs."
            assert torch.equal(adapter.model(**inputs), output), "After unmerge the output differs."
            plain = adapter.merge(unload=True)
            error = relative_error(plain(**inputs), output)
            assert error <= 10 * self.forward_tolerance, f"Merging with unload=True moves the output by {error:g}."

    def test_an_adapter_is_restored_on_a_quantized_model(self) -> None:
        """A saved adapter is restored on a model that is quantized already."""
        for model, inputs, targets in self._models():
            twin = self._attach(copy.deepcopy(model), targets).detach()
            adapter = self._attach(model, targets)
            train(adapter.model, inputs, _loss, steps=2)
            with tempfile.TemporaryDirectory() as folder:
                adapter.save(folder)
                restored = restore(twin, folder)
            same = torch.equal(restored.model(**inputs), adapter.model(**inputs))
            assert same, "The restored adapter computes something else."

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _spec(self) -> QuantizerSpec:
        name = self.make_quantizer().name
        known = {**plugins().quantizers(), **BUILTIN_QUANTIZERS}
        assert name in known, f"No installed plugin offers {name!r}; there are {', '.join(sorted(known))}."
        return known[name]

    def _supported(self) -> list[Any]:
        torch.manual_seed(0)
        layers = [layer for layer in self.make_layers() if not self.make_quantizer().supports(layer)]
        assert layers, "supports() takes none of make_layers()."
        return layers

    def _quantized(self) -> Iterator[tuple[Any, Any]]:
        """Yield (dense layer, its quantized module) pairs, computing in float32."""
        for layer in self._supported():
            yield layer, self.make_quantizer().quantize(layer, torch.float32)

    def _store(self, module: Any) -> WeightStore:
        store = self.make_quantizer().store(module)
        assert store is not None, f"store() returned None for a {type(module).__name__} that quantize() made."
        return store

    def _input(self, module: nn.Module) -> torch.Tensor:
        """Return an input: (2, 3, in) for linear layers, (2, channels, 9[, 9]) for convolutions."""
        store = store_for(module)
        assert store is not None
        shape = store.shape
        torch.manual_seed(1)
        groups = getattr(module, "groups", 1)
        if len(shape) == 2:
            return torch.randn(2, 3, shape[1])
        return torch.randn(2, shape[1] * groups, *[9] * (len(shape) - 2))

    def _models(self) -> Iterator[tuple[nn.Module, dict[str, torch.Tensor], str]]:
        kinds = self._spec().kinds
        wanted: list[tuple[type[TinyMLP] | type[TinyConv], str]] = []
        if "linear" in kinds:
            wanted.append((TinyMLP, "all-linear"))
        if {"conv1d", "conv2d"} <= set(kinds):
            wanted.append((TinyConv, "conv"))
        for cls, targets in wanted:
            torch.manual_seed(0)
            model = cls().eval()
            yield model, model.example_inputs(), targets

    def _attach(self, model: nn.Module, targets: str) -> Any:
        name = self.make_quantizer().name
        adapter = attach(model, rank=4, targets=targets, quantization=name, seed=0)
        for layer in adapter.plan.layers:
            assert layer.format == name, f"{layer.name!r} is stored as {layer.format!r}."
            store = self._store(adapter.layers[layer.name].get_base_layer())
            assert store.nbytes == layer.weight_bytes, f"The plan's bytes for {layer.name!r} are not those stored."
        return adapter


def _fill(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter)


def _loss(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()

"""The fast forwards of LoRA layers: what `routes` decides, carried out by `ops`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from packaging.version import Version
from torch import nn
from torch.autograd import forward_ad

from ..ops.autocast import autocast_dtype
from ..ops.choice import linear_layers
from ..ops.conv import Geometry, Layer, lora_conv
from ..ops.embedding import lora_embedding
from ..ops.frozen import Dense, FrozenWeight, Packed, Stored
from ..ops.linear import Dtypes, Member
from ..weights import primitives, store_for
from ..weights.conv4bit import Conv4bit, with_padding
from ..weights.dense import is_transposed
from .conv_parts import SharedConv1d, SharedConv2d
from .groups import SiblingGroup
from .part_factors import MaskedConv1d, MaskedConv2d, MaskedLinear, effective_weight
from .routes import PLAIN_TENSORS, Route, active, base_route, why_parent

_transforms: Any = torch._C._functorch.get_dynamic_layer_stack_depth  # type: ignore[attr-defined]
#: The compiler of older torch can't look at transforms; there torch itself refuses a function of ours inside one.
_UNTRACED = Version(torch.__version__.split("+")[0]) < Version("2.15")

#: Without gradients, the rows up to which a 4-bit base runs its own kernel, which multiplies the packed weight directly.
FEW_ROWS = 64


# It is an nn.Module, as PEFT's layers are first of all: Python then finds the same memory layout in both.
class FusedForward(nn.Module):
    """Mixin before a PEFT LoRA layer class: forward takes the fastest exact way, else the parent's; see `routes`.

    Attributes:
        fused: False sends every call to PEFT's own forward.
        factor_names: the children that hold A and B.
        plain_parts: classes that A and B may have, with their forwards: a patch of torch's class is noticed.
    """

    fused = True
    factor_names: tuple[str, str] = ("lora_A", "lora_B")
    plain_parts: Mapping[type[nn.Module], Any] = {cls: cls.forward for cls in (nn.Linear, MaskedLinear)}

    if TYPE_CHECKING:

        def _fused_forward(self, x: torch.Tensor, names: list[str]) -> torch.Tensor | None: ...

    def forward(self: Any, x: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what PEFT's layer returns for the same arguments.

        x may come by the name that torch's layers have for it, `input`, which PEFT's layers don't know.
        """
        if x is None and "input" in kwargs:
            x = kwargs.pop("input")
        if not (args or kwargs) and (names := self.ready_names(x)):
            y = self._fused_forward(x, names)
            if y is not None:
                return y
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def ready_names(self: Any, x: torch.Tensor) -> list[str]:
        """Return the active adapters if they can be computed here for x, nothing where only PEFT's forward is exact."""
        if not self.fused or self._disable_adapters or self.merged_adapters:
            return []
        names = active(self)
        return [] if not names or why_parent(self, names) or self._why_not(x, names) else names

    def parts(self: Any, name: str) -> list[Any]:
        """Return what PEFT's forward uses of one adapter: A, B and its dropout."""
        modules = self._modules
        kept = [modules[factor]._modules[name] for factor in self.factor_names]
        return [*kept, modules["lora_dropout"]._modules[name]]

    def why_not_exact(self, names: list[str]) -> str:
        """Return what else about this layer only PEFT's forward does, "" if nothing."""
        return ""

    def _why_not(self, x: torch.Tensor, names: list[str]) -> str:
        """Return what about this very call only PEFT's forward does, "" if nothing."""
        if type(x) not in PLAIN_TENSORS:
            return f"the input is a {type(x).__name__}"
        if x.layout is not torch.strided or x.is_nested or x.is_complex():
            return "the input is sparse, nested or complex"
        compiling = torch.compiler.is_compiling()
        if not (compiling and _UNTRACED) and _transforms():
            return "a transform of torch.func looks at each operation"
        if compiling:
            if torch.compiler.is_exporting():
                return "the model is being exported"
            return "the compiler draws and keeps dropout's masks itself" if self._dropouts(names) else ""
        if torch._C._get_tracing_state() is not None:
            return "torch.jit looks at each operation"
        if forward_ad._current_level >= 0:
            return "derivatives are taken forward"
        if x.device.type not in ("cpu", "cuda", "meta") and self._dropouts(names):
            return f"dropout's random numbers on {x.device.type} can't be drawn again"
        return ""

    def _dropouts(self: Any, names: list[str]) -> tuple[float, ...]:
        """Return each adapter's probability of dropping an input now; nothing if none drops any."""
        layers = [self._modules["lora_dropout"]._modules[name] for name in names]
        probabilities = tuple(float(d.p) if type(d) is nn.Dropout and d.training else 0.0 for d in layers)
        return probabilities if any(probabilities) else ()

    def factor_tensors(self: Any, names: list[str]) -> list[torch.Tensor]:
        """Return A and B of every adapter, in order, as they count."""
        return [effective_weight(part) for name in names for part in self.parts(name)[:2]]

    def scalings(self: Any, names: list[str]) -> tuple[float, ...]:
        """Return each adapter's factor."""
        return tuple(self.scaling[name] for name in names)

    def _own_bias(self: Any, names: list[str]) -> torch.Tensor | None:
        """Return the sum of the lora_B's biases times their scalings (lora_bias=True)."""
        total = None
        for name in names:
            bias = self._modules["lora_B"]._modules[name]._parameters["bias"]
            if bias is not None:
                total = bias * self.scaling[name] if total is None else total + bias * self.scaling[name]
        return total


class Prepared(NamedTuple):
    """A call of a linear layer, ready for `lora_linear`."""

    member: Member
    addend: torch.Tensor | None
    factors: list[torch.Tensor]
    dtypes: Dtypes


class FusedLinear(FusedForward):
    """Linear layers, dense or in any format.

    Attributes:
        siblings: the group of layers with which it may share its input, or None.
    """

    siblings: SiblingGroup | None = None

    def _fused_forward(self, x: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        # Without gradients nothing is saved by computing together.
        if self.siblings is None or not torch.is_grad_enabled() or not self._shares(x):
            return self.alone(x, names)
        return self.siblings.call(self, x, names)

    def _shares(self: Any, x: torch.Tensor) -> bool:
        """Return True if computing with siblings could save anything: not in compiled code, which joins what it can.

        Off the CPU dense layers are computed by torch's operations, and share no more than a cast of x.
        """
        if torch.compiler.is_compiling():
            return False
        weight = self._modules["base_layer"]._parameters.get("weight")
        return x.device.type == "cpu" or weight is None or weight.dtype is not x.dtype

    def alone(self: Any, x: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        """Return the layer's output for x, None where only PEFT's forward is exact."""
        call = self.prepare(x, names)
        if call is None:
            return self._beside(x, names)
        return linear_layers(x, (call.member,), (call.addend,), call.factors, call.dtypes)[0]

    def prepare(self: Any, x: torch.Tensor, names: list[str]) -> Prepared | None:
        """Return the arguments of `lora_linear` for x, None if the base module has to be called."""
        base = self._modules["base_layer"]
        auto, chosen = autocast_dtype(x.device.type), base_route(base)
        if chosen.reads == "4bit" and not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * x.shape[-1]:
            return None
        read = None if auto is not None and x.dtype not in (torch.float32, auto) else frozen_read(base, chosen, x, auto)
        if read is None:
            return None
        weight, compute, output = read
        factors, dropouts, bias = self.factor_tensors(names), self._dropouts(names), self._own_bias(names)
        own = base._parameters["bias"]
        addend = own if bias is None else bias if own is None else own + bias
        merged = chosen.path == "merged" and not dropouts
        member = Member(weight, merged, self.scalings(names), output, dropouts)
        return Prepared(member, addend, factors, Dtypes(compute, auto or factors[0].dtype))

    def _beside(self: Any, x: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        auto = autocast_dtype(x.device.type)
        if auto is not None and x.dtype not in (torch.float32, auto):
            return None
        result, bias, factors = self._modules["base_layer"](x), self._own_bias(names), self.factor_tensors(names)
        member = Member(None, False, self.scalings(names), result.dtype, self._dropouts(names))
        addend = result if bias is None else (result + bias).to(result.dtype)
        low = auto or factors[0].dtype
        return linear_layers(x, (member,), (addend,), factors, Dtypes(low, low))[0]


def frozen_read(
    base: Any, chosen: Route, x: torch.Tensor, auto: torch.dtype | None
) -> tuple[FrozenWeight, torch.dtype, torch.dtype] | None:
    """Return how to read a layer's weight, and the dtypes it computes in and returns for this input.

    None if only the layer itself knows: it then runs, or says what does not fit.
    """
    weight = frozen_weight(base, chosen.reads)
    dtypes = None if weight is None else product_dtypes(base, chosen.reads, weight_dtype(base, chosen.reads), x, auto)
    return None if weight is None or dtypes is None else (weight, *dtypes)


def frozen_weight(base: Any, reads: str) -> FrozenWeight | None:
    """Return a base module's weight as it is read ("dense", "4bit", "store"); None if it is not."""
    if reads == "dense":
        return Dense(base._parameters["weight"], is_transposed(base))
    if reads == "4bit" and isinstance(base, Conv4bit):
        tensors, nested = base.statistics, None
        if base.nested:
            nested = (tensors["nested_absmax"], tensors["nested_quant_map"], tensors["nested_offset"])
        settings = (nested, base.blocksize, base.quant_type, base.dense_shape)
        return Packed(base.weight, tensors["absmax"], tensors["quant_map"], *settings)
    if reads == "4bit":
        packed, state = base._parameters["weight"], base._parameters["weight"].quant_state
        nested, shape = primitives.nested_of(state), torch.Size((base.out_features, base.in_features))
        return Packed(packed.detach(), state.absmax, state.code, nested, state.blocksize, state.quant_type, shape)
    store = store_for(base) if reads == "store" else None
    return None if store is None else Stored(store)


def weight_dtype(base: Any, reads: str) -> torch.dtype:
    """Return the dtype that the weight has for those who multiply by it, whatever it is stored in."""
    if reads == "dense":
        return base._parameters["weight"].dtype
    if reads == "4bit":
        return base.compute_dtype or base._parameters["weight"].quant_state.dtype
    store = store_for(base)
    return torch.get_default_dtype() if store is None else store.dtype


def product_dtypes(
    base: Any, reads: str, own: torch.dtype, x: torch.Tensor, auto: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype] | None:
    """Return the dtypes that a product of x and the weight, whose own dtype is `own`, is computed and returned in.

    None if they don't fit.
    """
    if reads == "dense":
        return None if auto is None and x.dtype != own else (auto or own, auto or own)
    if reads == "4bit":
        if not isinstance(base, Conv4bit) and not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True
        return base.compute_dtype or x.dtype, x.dtype
    return (own, own) if reads == "store" and auto is None and own == x.dtype else None


class FusedConv(FusedForward):
    """1-d and 2-d convolutions, dense or in any format."""

    plain_parts = {
        cls: cls.forward for cls in (nn.Conv1d, nn.Conv2d, SharedConv1d, SharedConv2d, MaskedConv1d, MaskedConv2d)
    }

    def why_not_exact(self: Any, names: list[str]) -> str:
        """Return what in the adapters' own geometry `ops.conv` does not know."""
        kinds = {(type(a), a.groups, a.padding_mode, a.padding, b.groups) for a, b, _ in map(self.parts, names)}
        if len(kinds) > 1:
            return "adapters of different geometry"
        ((kind, down_groups, mode, padding, up_groups),) = kinds
        if kind not in (SharedConv1d, SharedConv2d) and (down_groups > 1 or (up_groups > 1 and len(names) > 1)):
            return "several adapters on a grouped convolution, or grouped factors"
        if mode != "zeros" or isinstance(padding, str):
            base = self.get_base_layer()
            if (mode, padding) != (base.padding_mode, base.padding):
                return "the adapter pads in another way than the base"
        return ""

    def _fused_forward(self: Any, x: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        base: Any = self._modules["base_layer"]
        auto = autocast_dtype(x.device.type)
        factors, scalings, dropouts = self.factor_tensors(names), self.scalings(names), self._dropouts(names)
        low = auto or factors[0].dtype
        if (auto is not None and x.dtype not in (torch.float32, auto)) or x.dim() != factors[0].dim():
            return None
        a, b, _ = self.parts(names[0])
        plain: Any = self.get_base_layer()
        shared = isinstance(a, SharedConv1d | SharedConv2d) or a.groups == b.groups == 1
        same = all(getattr(a, f) == getattr(plain, f) for f in ("stride", "padding", "dilation", "padding_mode"))
        chosen, bias = base_route(base), self._own_bias(names)
        read = frozen_read(base, chosen, x, auto) if same and chosen.reads != "store" else None
        padded, padding = with_padding(plain if same else a, x)
        if padded is not x and dropouts:
            return None  # PEFT drops before it pads
        down = Geometry(tuple(a.stride), padding, tuple(a.dilation), a.groups)
        kind: dict[str, Any] = dict(
            geometry=down, down=down, up_groups=b.groups, shared=shared, scalings=scalings, dropouts=dropouts
        )
        if read is None:
            result = base(x)
            addend = result if bias is None else (result + bias.view(-1, *[1] * (x.dim() - 2))).to(result.dtype)
            layer = Layer(None, False, output=result.dtype, **kind)
            return lora_conv(padded, layer, addend, factors, Dtypes(low, low))
        weight, compute, output = read
        own = base._parameters["bias"]
        addend = own if bias is None else bias if own is None else own + bias
        kind["geometry"] = Geometry(tuple(base.stride), padding, tuple(base.dilation), base.groups)
        layer = Layer(weight, chosen.path == "merged" and shared and not dropouts, output=output, **kind)
        return lora_conv(padded, layer, addend, factors, Dtypes(compute, low))


class FusedEmbedding(FusedForward):
    """Embeddings: the base gathers its rows, and the update's are added."""

    factor_names = ("lora_embedding_A", "lora_embedding_B")

    def parts(self: Any, name: str) -> list[Any]:
        """Return A and B, which are bare parameters here. PEFT applies no dropout to an embedding's rows."""
        return [self._modules[factor]._parameters.get(name) for factor in self.factor_names]

    def why_not_exact(self: Any, names: list[str]) -> str:
        """Return what else PEFT's forward does: scales the rows, renormalises them, or counts them."""
        base = self.get_base_layer()
        if self._get_embed_scale() is not None:
            return "the embedding scales its rows"
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
            return "the embedding has max_norm, scale_grad_by_freq or sparse gradients"
        if any(self.input_fns.get(name) or self.output_fns.get(name) for name in names):
            return "the adapter is spread over devices (tensor parallelism)"
        return ""

    def factor_tensors(self: Any, names: list[str]) -> list[torch.Tensor]:
        """Return A and B of every adapter, in order."""
        return [part for name in names for part in self.parts(name)]

    def _dropouts(self, names: list[str]) -> tuple[float, ...]:
        return ()

    def _fused_forward(self: Any, x: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        base: Any = self._modules["base_layer"]
        result, factors = base(x), self.factor_tensors(names)
        low = autocast_dtype(result.device.type) or factors[0].dtype
        y = lora_embedding(result, x, factors, self.scalings(names), low, self.get_base_layer().padding_idx)
        return y.to(result.dtype)

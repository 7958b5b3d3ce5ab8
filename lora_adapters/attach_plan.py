"""AttachPlan: pure data about what attaching will do, every skip explained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .backends import backend_for
from .request import AttachRequest
from .targets import Part

if TYPE_CHECKING:
    from .memory import StepMemory
    from .weights import Quantizer


@dataclass(frozen=True)
class PlannedLayer:
    """One module that will carry the adapter.

    Attributes:
        name: dotted module name.
        role: see `lora_adapters.hooks.specs.ROLES`.
        kind: "linear", "conv1d", "conv2d" or "embedding".
        shape: logical shape of the base weight.
        rank, alpha, scaling: of the adapter here; scaling is the factor of B @ A.
        format: how the base weight will be stored: "dense", "nf4", ...
        weight_bytes: bytes the base weight will take.
        parameters: values of A and B. B of a layer adapted in parts has every row, so its fixed zeros count: they take
            memory like the others, in the optimizer and in the file too.
        layer: "package.module:Class" of the adapter layer.
        engine: "direct" if this package builds the layer, "peft" if PEFT's own injection does.
        parts: the parts of a fused projection that are adapted, each by ranks of its own; empty where all of it is.
        read_by: who reads the weight without calling the module; "" if nobody does.
    """

    name: str
    role: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    alpha: float
    scaling: float
    format: str
    weight_bytes: int
    parameters: int
    layer: str
    engine: str = "direct"
    parts: tuple[Part, ...] = ()
    read_by: str = ""


@dataclass(frozen=True)
class SkippedLayer:
    """A module that could carry an adapter and will not, with the reason."""

    name: str
    role: str
    reason: str


@dataclass(frozen=True)
class AttachPlan:
    """What `attach` will do. Printing it gives a table.

    Attributes:
        backend: name of the backend that served the model.
        family: the model's type.
        request: what was asked.
        layers: what will be adapted.
        skipped: what could be adapted and will not.
        quantize: module name -> format, of every base module that will be quantized (adapted or not).
        trained: modules that will be trained and saved whole.
        norms: BatchNorm modules whose running statistics are the adapter's own; see `attach`'s argument `norm`.
        task_type: PEFT's task type or None.
        total_parameters: values of the whole base model.
        trained_parameters: values of `trained`, of trained biases and of `norms` where these are trained.
        notes: things worth knowing.
    """

    backend: str
    family: str
    request: AttachRequest
    layers: tuple[PlannedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    quantize: Mapping[str, str]
    trained: tuple[str, ...]
    task_type: str | None
    total_parameters: int
    trained_parameters: int
    notes: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    _model: Any = field(default=None, repr=False, compare=False)
    _quantizers: Mapping[str, Quantizer] = field(default_factory=dict, repr=False, compare=False)

    @property
    def engine(self) -> str:
        """Return "direct", or "peft" if the request needs PEFT's own injection."""
        return self.layers[0].engine

    @property
    def adapter_parameters(self) -> int:
        """Return the number of values in the low-rank factors."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def trainable_parameters(self) -> int:
        """Return the number of values that will be trained."""
        return self.adapter_parameters + self.trained_parameters

    def memory(
        self,
        batch_size: int = 1,
        sequence_length: int = 512,
        *,
        optimizer: str = "adamw",
        autocast: Any = None,
        device: str | None = None,
        checkpointing: bool | None = None,
    ) -> StepMemory:
        """Predict the memory of one training step in bytes, without running it.

        Args:
            batch_size: rows per step.
            sequence_length: tokens per row; text models only.
            optimizer: see `lora_adapters.memory.predict_step`.
            autocast: dtype of mixed precision, such as torch.bfloat16, or None.
            device: where the step will run; None takes the model's device. "cuda" works without CUDA too.
            checkpointing: True turns gradient checkpointing on; None leaves it as the model has it.

        Raises:
            UnsupportedError: the model's forward can't be traced without data; the message says where.
        """
        from .inject import planned_on_meta
        from .memory import predict_step

        backend = backend_for(self._model)[0]
        copy = planned_on_meta(self._model, self)
        # Real inputs: a model that looks at its mask's values then takes the branch it will take in training.
        inputs = backend.example_inputs(self._model, batch_size, sequence_length, "cpu")
        device = device or next((p.device.type for p in self._model.parameters() if p.device.type != "meta"), "cpu")
        return predict_step(
            copy, inputs, optimizer=optimizer, autocast=autocast, device=device, checkpointing=checkpointing
        )

    def __str__(self) -> str:
        from .report.plan_table import render

        return render(self)


def adapter_parameters(kind: str, shape: tuple[int, ...], rank: int, lora_bias: bool = False) -> int:
    """Return the number of values a LoRA of this rank adds to a weight of this shape.

    linear (out, in): r * (out + in); embedding (rows, dim): r * (rows + dim); conv (out, in / groups, *kernel):
    A is (r, in / groups, *kernel) and B (out, r, 1...), so r * (out + in / groups * prod(kernel)).
    """
    return rank * (shape[0] + math.prod(shape[1:])) + (shape[0] if lora_bias else 0)

"""Forward and backward of a loss as CUDA graphs: a step of many small kernels stops waiting for Python to launch them.

A training step of a UNet with adapters launches tens of thousands of kernels, and launching takes longer than running
them. A CUDA graph records the launches once and replays them at once (Gray, "Getting started with CUDA graphs", NVIDIA
2019; torch.cuda.graph). What the loss reads keeps its place in memory, and Python runs only at the recording.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .error_text import first_line
from .errors import RequestError, UnsupportedError
from .garbage import collection_paused

#: (name, shape, dtype) of each input; None for one that is left out.
_Key = tuple[tuple[str, tuple[int, ...] | None, torch.dtype | None], ...]


@dataclass(frozen=True)
class _Recorded:
    """A graph, and where it reads its inputs and leaves its loss."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    loss: Tensor


class GraphedLoss:
    """Runs a loss and its backward pass, each shape of inputs as a CUDA graph of its own.

        def loss(batch):  # any model, any autocast inside; no value may be read on the CPU (.item(), if tensor:)
            with torch.autocast("cuda", torch.bfloat16):
                return F.mse_loss(unet(batch["noisy"], batch["timesteps"], batch["text"]).sample.float(), batch["target"])

        graphed = GraphedLoss(loss, adapter.parameters())
        for batch in batches:
            optimizer.zero_grad()
            value = graphed(batch)  # in place of value = loss(batch); value.backward()
            optimizer.step()

    A call adds the gradients to `.grad` as backward does, and draws dropout from CUDA's generator as usual. The first call
    with a shape runs the loss a few times and records it. Graphs share their memory, which they keep: about the peak of
    one step of the largest shape. A change of the model (adapters set, merged, attached; another dtype or device; train()
    and eval()) is not seen by what is recorded: call `clear` after it.

    Args:
        loss: takes a mapping of tensors, returns a scalar that requires a gradient.
        trained: the parameters, on one CUDA device.
        warmup: runs before recording, in which kernels are chosen and compiled.

    Raises:
        UnsupportedError: no CUDA device. RequestError: nothing to train.
    """

    def __init__(
        self, loss: Callable[[Mapping[str, Tensor | None]], Tensor], trained: Iterable[nn.Parameter], warmup: int = 2
    ) -> None:
        self._trained = [p for p in trained if p.requires_grad]
        if not self._trained:
            raise RequestError("There is nothing to train: attach an adapter first.")
        if any(p.device.type != "cuda" for p in self._trained):
            raise UnsupportedError("CUDA graphs need a model on a CUDA device: call the loss itself elsewhere.")
        self._loss, self._warmup = loss, warmup
        self._device = self._trained[0].device
        # Replayed kernels write to where they were recorded, so that gradients stay where they are.
        self._grads = [torch.zeros_like(p) for p in self._trained]
        self.clear()

    def clear(self) -> None:
        """Forget what is recorded, and free its memory; the next call records anew."""
        self._recorded: dict[_Key, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """Return the loss () without a graph, after adding its gradients to `.grad` of what is trained.

        Args:
            inputs: tensors on any device; None for what this batch has not.

        Raises:
            UnsupportedError: the loss does something that can't be recorded. CUDA is not usable after that: start the
                program again without graphs.
        """
        self._place_grads()
        key: _Key = tuple(
            (name, None, None) if value is None else (name, tuple(value.shape), value.dtype)
            for name, value in sorted(inputs.items(), key=lambda item: item[0])
        )
        if key not in self._recorded:
            self._recorded[key] = self._record(inputs)
        found = self._recorded[key]
        for name, value in found.inputs.items():
            given = inputs[name]
            assert given is not None
            value.copy_(given, non_blocking=True)
        found.graph.replay()
        return found.loss.clone()

    def _place_grads(self) -> None:
        """Make `.grad` of every parameter the tensor that graphs add to, with the value that it has (None is zero)."""
        empty = []
        for parameter, grad in zip(self._trained, self._grads, strict=True):
            if parameter.grad is None:
                empty.append(grad)
            elif parameter.grad is not grad:
                grad.copy_(parameter.grad)
            parameter.grad = grad
        if empty:
            torch._foreach_zero_(empty)

    def _record(self, inputs: Mapping[str, Tensor | None]) -> _Recorded:
        own = {name: value.to(self._device, copy=True) for name, value in inputs.items() if value is not None}
        given: dict[str, Tensor | None] = {name: own.get(name) for name in inputs}
        before = [grad.clone() for grad in self._grads]
        random = torch.cuda.get_rng_state(self._device)
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        torch.cuda.empty_cache()  # what earlier work took is of no use to another stream
        try:
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(self._warmup):
                    self._run(given)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            torch._foreach_copy_(self._grads, before)
            torch.cuda.empty_cache()  # what these runs took is not kept beside what the graph keeps
            torch.cuda.set_rng_state(random, self._device)
            # An old graph that is freed while another is recorded spoils it. Other threads, such as one that pins batches,
            # may go on using CUDA.
            with collection_paused(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss = self._run(given)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("captur", "Offset increment")):
                raise
            raise UnsupportedError(
                f"The loss can't be recorded as a CUDA graph ({first_line(error)}): it must not read values on the "
                "CPU nor keep an earlier step's loss alive. Start again without CUDA graphs."
            ) from error
        return _Recorded(graph, own, loss)

    def _run(self, inputs: Mapping[str, Tensor | None]) -> Tensor:
        loss = self._loss(inputs)
        if loss.numel() != 1 or not loss.requires_grad:
            raise RequestError("The loss must be one number that depends on what is trained.")
        loss.backward()
        return loss.detach()

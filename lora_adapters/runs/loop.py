"""The training loop of tasks that bring none, on accelerate: precision and its loss scaling, several processes, averages.

What a step computes follows from the seed and the step's number: which rows it takes, and, as PyTorch's generators are
seeded anew for each batch, what dropout leaves out. All else that the next step depends on is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from ..cuda_graphs import GraphedLoss
from ..ema import AdapterEma
from .folder import LOGS
from .keeping import keep_checkpoint
from .measured import PeakMemory
from .processes import agreed, same_values, sum_gradients
from .schedule import save_every, steps_of, total_steps
from .showing import Rates, Steps

if TYPE_CHECKING:
    from .gradients import GradientGuard
    from .runner import Run

#: Beside the adapter in a checkpoint: all else that the next step depends on.
_STATE = "training.pt"
#: Among the inputs of a recorded loss: what it is multiplied by.
_FACTOR = "factor"
_PRECISIONS = {None: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Trained(Protocol):
    """What a loop trains: an `Adapter`, or several that belong together."""

    @property
    def model(self) -> nn.Module:
        """Return what goes into training mode, and holds all that is trained."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over what is trained."""
        ...

    def norms(self) -> dict[str, float]:
        """Return the norms of what the adapter adds, "mean" among them."""
        ...

    def save(self, path: Path) -> Any:
        """Write the adapter to a folder."""
        ...


class Batches(Protocol):
    """The training data, in batches of one forward pass."""

    def __len__(self) -> int:
        """Return the number of batches of one pass over the data."""
        ...

    def keys(self, epoch: int) -> list[list[Any]]:
        """Return the batches of one pass as lists of keys, one key for each row."""
        ...

    def read(self, keys: Iterable[list[Any]]) -> Iterator[Any]:
        """Yield the batch of each list of keys."""
        ...


@dataclass
class Parts:
    """What a loop works with.

    Attributes:
        batches: the training data.
        inputs: (batch, step, number of the batch in the step) -> what `loss` takes; None for what this batch has not.
        loss: what `inputs` returned -> mean loss over the rows of the batch, a scalar.
        optimizer: of the adapter's parameters.
        schedule: (steps of the run, steps of one pass over the data) -> what sets the optimizer's learning rates:
            `step_update(n)` those of the step after n steps.
        device, autocast: where, and in which dtype (None: the weights' own).
        measure: returns the metrics of the adapted model; None without eval data.
        after_step: called with the number of each step that is done, with the averages in place, if there are any.
        rows: what a row is called, in the plural.
        graphs: run `loss` and its backward pass as CUDA graphs: see `GraphedLoss` for what it may do then.
    """

    batches: Batches
    inputs: Callable[[Any, int, int], Mapping[str, Tensor | None]]
    loss: Callable[[Mapping[str, Tensor | None]], Tensor]
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int, int], Any]
    device: torch.device
    autocast: torch.dtype | None
    measure: Callable[[], dict[str, float]] | None = None
    after_step: Callable[[int], None] | None = None
    rows: str = "rows"
    graphs: bool = False


class TrainingLoop:
    """Trains one adapter, or a group of them.

    With several processes (torchrun, accelerate launch) each takes its share of every step's batches, and the step is that
    of one process with so many times the gradient accumulation.

    Args:
        run: the run. Its folder is written by the main process alone.
        adapter: what is trained, on its base, which is on the device.
        guard: the NaN policy.
        parts: see `Parts`.
    """

    def __init__(self, run: Run, adapter: Trained, guard: GradientGuard, parts: Parts) -> None:
        self.run, self.adapter, self.guard, self.parts = run, adapter, guard, parts
        self.training: Any = run.recipe.training
        self.trained = list(adapter.parameters())
        # One state, with one precision, serves a whole process: what another Accelerator set comes back after the run.
        self._state_before = dict(AcceleratorState._shared_state)
        AcceleratorState._reset_state()
        self.accelerator = self._accelerator()
        self.per_step = self.training.gradient_accumulation * self.accelerator.num_processes
        self.per_epoch = steps_of(self.training, len(parts.batches), self.accelerator.num_processes)
        self.total = total_steps(self.training, self.per_epoch)
        self.schedule = parts.schedule(self.total, self.per_epoch)
        self.optimizer: Any = self.accelerator.prepare_optimizer(parts.optimizer, device_placement=False)
        self.graphed = GraphedLoss(self._counted_loss, self.trained) if parts.graphs else None
        self.ema = AdapterEma(adapter.model, self.training.ema, warmup=True) if self.training.ema else None
        self.losses: list[float] = []
        self.steps = Steps(run, parts.device, Rates(parts.rows))
        self._epoch: tuple[int, list[list[Any]]] = -1, []
        self._statistics: list[Tensor] = []

    def averaged(self) -> AbstractContextManager[Any]:
        """Within this context the adapter has the values that are measured and saved: the averages, if there are any."""
        return nullcontext() if self.ema is None else self.ema.applied(self.adapter.model)

    def fit(self) -> None:
        """Take the steps that are left; stop where the user or the guard asks for it."""
        try:
            self._fit(self._resume())
        finally:
            AcceleratorState._reset_state()
            AcceleratorState._shared_state.update(self._state_before)
            self.run.progress.stop()

    def _fit(self, first: int) -> None:
        run, facts = self.run, self.run.facts
        same_values(self.accelerator, self.trained)
        memory = PeakMemory(self.parts.device)
        self.steps.begin(first, self.total)
        self._statistics = _running_statistics(self.adapter.model.train())
        mine = (keys for step in range(first + 1, self.total + 1) for _, keys in self._mine(step))
        loader = self.parts.batches.read(mine)
        for step in range(first + 1, self.total + 1):
            norm = self._step(loader, step)
            self.steps.done(step, step / self.per_epoch)
            self._record(step, norm)
            asked = agreed(self.accelerator, run.stop.requested)
            if asked is not None:
                run.stop.requested = asked
            due = asked is not None or step == self.total or step % save_every(self.training, self.total) == 0
            if due and self.guard.holds(self.trained, step):
                self._save(run.folder.checkpoints / f"checkpoint-{step}", step)
            if asked is not None or self.guard.diverged:
                break
        facts.throughput, facts.memory_measured = self.steps.rates.read(), memory.read()
        self.accelerator.end_training()

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _step(self, loader: Iterator[Any], step: int) -> float:
        """Take one step; return the norm of its gradient before clipping."""
        self.schedule.step_update(step - 1)
        self.optimizer.zero_grad()
        before = [value.clone() for value in self._statistics]
        self.losses.append(self._backward(loader, step))
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        scaled = self.accelerator.scaler is not None  # it looks at the gradients itself, and skips
        taken = scaled or self.guard.passes(self.trained, step, self._statistics, norm)
        if taken:
            if self.training.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(self.trained, self.training.max_grad_norm, norm)
            self.optimizer.step()
            taken = not (scaled and self.optimizer.step_was_skipped)
            if scaled:
                self.guard.taken() if taken else self.guard.skipped(step)
        if taken and self.ema is not None:
            self.ema.update(self.adapter.model, step)
        if not taken:  # a step that is skipped leaves nothing behind
            for value, old in zip(self._statistics, before, strict=True):
                value.copy_(old)
        return float(norm)

    def _backward(self, loader: Iterator[Any], step: int) -> float:
        """Add the gradient of the mean loss over all rows of the step, of all processes; return that loss."""
        rows = sum(map(len, self._keys(step)))
        total = torch.zeros((), device=self.parts.device)
        for number, keys in self._mine(step):
            batch = next(loader)
            self._seed(step, number)
            with self.accelerator.autocast():
                inputs = self.parts.inputs(batch, step, number)
            # Not the mean of the batches' means: the last batch of an epoch may be short.
            total += self._add_gradients(inputs, len(keys) / rows).to(total.device)
        self.steps.rates.add(**{self.parts.rows: rows})
        sum_gradients(self.accelerator, self.trained)
        return float(torch.as_tensor(self.accelerator.reduce(total, reduction="sum")))

    def _add_gradients(self, inputs: Mapping[str, Tensor | None], share: float) -> Tensor:
        """Add the gradient of a batch's loss times `share`; return that () without a graph."""
        if self.graphed is None:
            with self.accelerator.autocast():
                loss = self.parts.loss(inputs) * share
            self.accelerator.backward(loss)
            return loss.detach()
        counts = torch.tensor(share, device=self.parts.device)
        scaler = self.accelerator.scaler
        factor = counts if scaler is None else torch.as_tensor(scaler.scale(counts))
        return self.graphed({**inputs, _FACTOR: factor}) / factor * counts

    def _counted_loss(self, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """Return a batch's loss times what it counts, which is among the inputs."""
        with self.accelerator.autocast():
            loss, factor = self.parts.loss(inputs), inputs[_FACTOR]
        assert factor is not None
        return loss * factor

    def _seed(self, step: int, number: int) -> None:
        """Seed PyTorch's generators for one batch: what was drawn before does not matter, nor which process it is."""
        words = numpy.random.SeedSequence((self.training.seed, step, number)).generate_state(1, numpy.uint64)
        torch.manual_seed(int(words[0]))

    def _keys(self, step: int) -> list[list[Any]]:
        """Return the batches of a step, of all processes, as lists of keys."""
        epoch, index = divmod(step - 1, self.per_epoch)
        if epoch != self._epoch[0]:
            self._epoch = epoch, self.parts.batches.keys(epoch)
        return self._epoch[1][index * self.per_step :][: self.per_step]

    def _mine(self, step: int) -> list[tuple[int, list[Any]]]:
        """Return this process's batches of a step, each with its number in the step."""
        return list(enumerate(self._keys(step)))[self.accelerator.process_index :: self.accelerator.num_processes]

    # ---- what is kept and told ---------------------------------------------------------------------------------------

    def _record(self, step: int, norm: float) -> None:
        if step == 1 or step % self.training.log_every == 0:
            groups = self.optimizer.param_groups
            found = {"loss": sum(self.losses) / len(self.losses), "grad_norm": norm}
            found["learning_rate"] = max(group["lr"] for group in groups)
            self._log(step, {**found, "adapter_norm": self.adapter.norms()["mean"], "epoch": step / self.per_epoch})
            self.losses.clear()
        parts, every = self.parts, self.training.eval_every
        if parts.measure is not None and every and step % every == 0:
            with self.averaged():
                metrics = parts.measure()
            self._log(step, {f"eval_{name}": value for name, value in metrics.items()})
        if parts.after_step is not None:
            with self.averaged():
                parts.after_step(step)

    def _log(self, step: int, values: dict[str, float]) -> None:
        self.steps.log(step, values)
        self.accelerator.log(values, step=step)

    def _save(self, folder: Path, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        self.adapter.save(folder)
        scaler = self.accelerator.scaler
        state = {
            "step": step,
            "losses": self.losses,
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        torch.save(state, folder / _STATE)
        keep_checkpoint(self.run, folder)

    def _resume(self) -> int:
        """Take up the checkpoint's state, if there is one; return the steps that are done."""
        if self.run.resume_from is None:
            return 0
        state = torch.load(self.run.resume_from / _STATE, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.losses = state["losses"]
        return int(state["step"])

    def _accelerator(self) -> Accelerator:
        logs = self.run.folder.path / LOGS
        made = Accelerator(
            cpu=self.parts.device.type == "cpu",
            mixed_precision=_PRECISIONS[self.parts.autocast],
            device_placement=False,  # the model is where the recipe says
            log_with=self.training.report_to or None,
            project_dir=str(logs),
        )
        if self.training.report_to and made.is_main_process:
            logs.mkdir(exist_ok=True)
            wandb = {"name": self.run.folder.path.name, "dir": str(logs)}
            made.init_trackers("lora-adapters", init_kwargs={"wandb": wandb})
        return made


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the floating statistics that a forward changes: those of norms in training mode."""
    norms = [m for m in model.modules() if m.training and getattr(m, "running_mean", None) is not None]
    return [value for norm in norms for value in (norm.running_mean, norm.running_var)]  # type: ignore[misc]

"""The training loop of image-classification, on accelerate: precision and its loss scaling, backward, reporting.

Which images a step takes, how they are changed and mixed follows from the seed and the step's number; all else that the next
step depends on is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from lora_adapters.ema import AdapterEma
from lora_adapters.errors import UnsupportedError
from lora_adapters.runs.folder import LOGS
from lora_adapters.runs.keeping import keep_checkpoint
from lora_adapters.runs.measured import PeakMemory
from lora_adapters.runs.random_state import read_state, write_state
from lora_adapters.runs.schedule import save_every, steps_in_all, steps_per_epoch
from lora_adapters.runs.showing import Rates, Steps

from .optimization import make_optimizer, make_schedule

if TYPE_CHECKING:
    from lora_adapters.adapter import Adapter
    from lora_adapters.runs.gradients import GradientGuard
    from lora_adapters.runs.runner import Run

    from ..augmentation import Key, Mixing, Prepared

#: Beside the adapter in a checkpoint: all else that the next step depends on.
_STATE = "training.pt"
_PRECISIONS = {None: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Parts:
    """What a loop works with.

    Attributes:
        prepared: the training images.
        mixing: makes targets, and mixes images.
        place: puts a batch of images where the model is.
        measure: returns the metrics of the adapted model; None without eval data.
        device, autocast: where, and in which dtype (None: the weights' own).
    """

    prepared: Prepared
    mixing: Mixing
    place: Callable[[Tensor], Tensor]
    measure: Callable[[], dict[str, float]] | None
    device: torch.device
    autocast: torch.dtype | None


class TrainingLoop:
    """Trains one adapter.

    Args:
        run: the run.
        adapter: on its base, which is on the device.
        guard: the NaN policy.
        parts: see `Parts`.
    """

    def __init__(self, run: Run, adapter: Adapter, guard: GradientGuard, parts: Parts) -> None:
        self.run, self.adapter, self.guard, self.parts = run, adapter, guard, parts
        self.training: Any = run.recipe.training
        self.total = steps_in_all(self.training, len(parts.prepared))
        self.per_epoch = steps_per_epoch(self.training, len(parts.prepared))
        self.trained = list(adapter.parameters())
        self.accelerator = self._accelerator()
        optimizer = make_optimizer(self.training, adapter.base)
        self.schedule = make_schedule(self.training, optimizer, self.total, self.per_epoch)
        self.optimizer: Any = self.accelerator.prepare_optimizer(optimizer, device_placement=False)
        self.ema = AdapterEma(adapter.model, self.training.ema, warmup=True) if self.training.ema else None
        self.losses: list[float] = []
        self.steps = Steps(run, parts.device, Rates("images"))

    def averaged(self) -> AbstractContextManager[None]:
        """Within this context the adapter has the values that are measured and saved: the averages, if there are any."""
        return nullcontext() if self.ema is None else self.ema.applied(self.adapter.model)

    def fit(self) -> None:
        """Take the steps that are left; stop where the user or the guard asks for it."""
        run, facts, model = self.run, self.run.facts, self.adapter.model
        first = self._resume()
        forward = torch.compile(model) if self.training.compile else model
        memory = PeakMemory(self.parts.device)
        self.steps.begin(first, self.total)
        model.train()
        loader = self._batches(first)
        for step in range(first + 1, self.total + 1):
            norm = self._step(forward, loader, step)
            self.steps.done(step, step / self.per_epoch)
            self._record(step, norm)
            asked = run.stop.requested is not None
            due = asked or step == self.total or step % save_every(self.training, self.total) == 0
            if due and self.guard.holds(self.trained, step):
                self._save(run.folder.checkpoints / f"checkpoint-{step}", step)
            if asked or self.guard.diverged:
                break
        facts.throughput, facts.memory_measured = self.steps.rates.read(), memory.read()
        self.accelerator.end_training()
        run.progress.stop()

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _step(self, forward: Any, loader: Iterator[tuple[Tensor, Tensor]], step: int) -> float:
        """Take one step; return the norm of its gradient before clipping."""
        self.schedule.step_update(step - 1)
        self.optimizer.zero_grad()
        statistics = _running_statistics(self.adapter.model)
        before = [value.clone() for value in statistics]
        self.losses.append(self._backward(forward, loader, step))
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        scaled = self.accelerator.scaler is not None  # it looks at the gradients itself, and skips
        taken = scaled or self.guard.passes(self.trained, step, statistics)
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
            for value, old in zip(statistics, before, strict=True):
                value.copy_(old)
        return float(norm)

    def _backward(self, forward: Any, loader: Iterator[tuple[Tensor, Tensor]], step: int) -> float:
        """Add the gradient of the mean loss over all images of the step; return that loss."""
        keys = self._keys(step)
        rows, total = sum(map(len, keys)), 0.0
        for number, batch in enumerate(keys):
            images, labels = next(loader)
            images, targets = self.parts.mixing(images, labels, step, number)
            with self.accelerator.autocast():
                logits = forward(self.parts.place(images))
            # Not the mean of the batches' means: the last batch of an epoch may be short.
            loss = F.cross_entropy(logits.float(), targets.to(logits.device)) * (len(batch) / rows)
            self.accelerator.backward(loss)
            total += loss.item()
            self.steps.rates.add(images=len(batch))
        return total

    def _keys(self, step: int) -> list[list[Key]]:
        """Return the batches of a step, as (epoch, number) of their images."""
        epoch, index = divmod(step - 1, self.per_epoch)
        if epoch != getattr(self, "_shuffled", (None,))[0]:
            generator = torch.Generator().manual_seed(self.training.seed + epoch)
            self._shuffled = epoch, torch.randperm(len(self.parts.prepared), generator=generator).tolist()
        size, order = self.training.batch_size, self._shuffled[1]
        mine = order[index * size * self.training.gradient_accumulation :][: size * self.training.gradient_accumulation]
        return [[(epoch, row) for row in mine[i : i + size]] for i in range(0, len(mine), size)]

    def _batches(self, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        keys = (batch for step in range(done + 1, self.total + 1) for batch in self._keys(step))
        pin = self.parts.device.type == "cuda"
        return self.parts.prepared.batches(keys, self.run.recipe.data.workers, pin)

    # ---- what is kept and told ---------------------------------------------------------------------------------------

    def _record(self, step: int, norm: float) -> None:
        if step == 1 or step % self.training.log_every == 0:
            groups = self.optimizer.param_groups
            found = {"loss": sum(self.losses) / len(self.losses), "grad_norm": norm}
            found["learning_rate"] = max(group["lr"] for group in groups)
            self._log(step, {**found, "adapter_norm": self.adapter.norms()["mean"], "epoch": step / self.per_epoch})
            self.losses.clear()
        if self.parts.measure is not None and self.training.eval_every and step % self.training.eval_every == 0:
            with self.averaged():
                metrics = self.parts.measure()
            self._log(step, {f"eval_{name}": value for name, value in metrics.items()})

    def _log(self, step: int, values: dict[str, float]) -> None:
        self.steps.log(step, values)
        self.accelerator.log(values, step=step)

    def _save(self, folder: Path, step: int) -> None:
        self.adapter.save(folder)
        scaler = self.accelerator.scaler
        state = {
            "step": step,
            "losses": self.losses,
            "optimizer": self.optimizer.state_dict(),
            "random": read_state(),
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
        write_state(state["random"])
        self.losses = state["losses"]
        return int(state["step"])

    def _accelerator(self) -> Accelerator:
        """Return accelerate's Accelerator for one process.

        Raises:
            UnsupportedError: the command was started as several processes.
        """
        made = Accelerator(
            cpu=self.parts.device.type == "cpu",
            mixed_precision=_PRECISIONS[self.parts.autocast],
            device_placement=False,  # the model is where the recipe says
            log_with=self.training.report_to or None,
            project_dir=str(self.run.folder.path / LOGS),
        )
        if made.num_processes > 1:
            raise UnsupportedError(
                "image-classification trains in one process, on one device: start it without a launcher."
            )
        if self.training.report_to:
            name = self.run.folder.path.name
            (self.run.folder.path / LOGS).mkdir(exist_ok=True)
            wandb = {"name": name, "dir": str(self.run.folder.path / LOGS)}
            made.init_trackers("lora-adapters", init_kwargs={"wandb": wandb})
        return made


def _running_statistics(model: torch.nn.Module) -> list[Tensor]:
    """Return the floating statistics that a forward changes: those of norms in training mode."""
    norms = [m for m in model.modules() if m.training and getattr(m, "running_mean", None) is not None]
    return [value for norm in norms for value in (norm.running_mean, norm.running_var)]

"""The task mixer-classification: a training loop in plain PyTorch that keeps all that `lora-adapters train` promises.

What a run needs whatever it trains comes from `lora_adapters.runs`; what is left is the task.
"""

from functools import cached_property

import torch
import torch.nn.functional as F

import lora_adapters as la
from lora_adapters.api import skeleton
from lora_adapters.device import pick_device
from lora_adapters.errors import RequestError, UnsupportedError
from lora_adapters.recipes.adapting import attach_arguments, check_start
from lora_adapters.report.facts import DataFacts, Sample
from lora_adapters.runs.beginning import record_adapter, record_data, record_memory
from lora_adapters.runs.class_measures import class_measures
from lora_adapters.runs.gradients import GradientGuard
from lora_adapters.runs.keeping import keep_checkpoint, raise_unless_finished, save_adapter
from lora_adapters.runs.measured import PeakMemory
from lora_adapters.runs.measuring import evaluating, record_after, record_before
from lora_adapters.runs.random_state import read_state, seed_all, write_state
from lora_adapters.runs.saved import each_model
from lora_adapters.runs.schedule import learning_rate_share, save_every, steps_in_all, steps_per_epoch
from lora_adapters.runs.showing import Rates, Steps

from .images import divide, read_images

#: Beside the adapter in a checkpoint: all else that the next step depends on.
_STATE = "training.pt"


class MixerRunner:
    """See lora_adapters.runs.runner.Runner."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.train_images = self.eval_images = None

    # ---- before a weight is read ---------------------------------------------------------------------------------

    @cached_property
    def device(self):
        return pick_device(self.recipe.model.device)

    @cached_property
    def made_plan(self):
        return self.plan(self.recipe.model.quantization)

    def check(self, parts=("train", "eval")):
        data, training = self.recipe.data, self.recipe.training
        if "train" not in parts and data.eval is None and not data.eval_fraction:
            raise RequestError("There is no eval data: give --data FILE, or data.eval=FILE.")
        if data.eval is not None and data.eval_fraction:
            raise RequestError("data: eval and eval_fraction are two ways to say the same: give one.")
        _ = self.device, self._settings
        if "train" in parts or data.eval_fraction:
            self.train_images = read_images(data.train, "data.train")
        if data.eval is not None:
            self.eval_images = read_images(data.eval, "data.eval")
        elif data.eval_fraction:
            self.train_images, self.eval_images = divide(self.train_images, data.eval_fraction, training.seed)
        if data.labels is None:
            if "train" not in parts:
                raise RequestError("data.labels: give the names in the order the adapter was trained with.")
            data.labels = sorted(set(self.train_images.labels))  # becomes part of the run's recipe
        for images in filter(None, (self.train_images if "train" in parts else None, self.eval_images)):
            if unknown := sorted(set(images.labels) - set(data.labels)):
                raise RequestError(f"data.labels: {images.source} has the label {unknown[0]!r}, which is not listed.")
            images.patches(self._settings)
        if "train" in parts:
            check_start(self.recipe.adapter, self.recipe.model.quantization)
            _ = self.made_plan

    def accept(self, adapters):
        """A run's recipe holds its labels; other adapters don't say theirs."""

    def shape(self):
        return self.recipe.training.batch_size, 1

    def plan(self, quantization):
        model = self._with_classifier(skeleton(self.recipe.model.name, backend="mixer"))
        return la.plan(model, **attach_arguments(self.recipe.adapter), quantization=quantization)

    def memory(self, plan, batch_size, length, checkpointing, device=None):
        if checkpointing:
            raise UnsupportedError("Mixer has no gradient checkpointing.")
        return plan.memory(batch_size, optimizer=self.recipe.training.optimizer, device=device or self.device.type)

    def _with_classifier(self, model):
        with torch.device(next(model.parameters()).device):
            model.replace_classifier(len(self.recipe.data.labels))
        return model

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self, run):
        parts = {"train": self.train_images, "eval": self.eval_images}
        record_data(run, [DataFacts(name, part.source, len(part)) for name, part in parts.items() if part is not None])
        run.facts.labels, run.facts.higher_is_better = self.recipe.data.labels, ["accuracy", "macro_f1"]
        with run.preparing():
            record_memory(run, self, self.made_plan, self.device)
            model, state = self._load(), None
            if run.resume_from is None:
                adapter = la.attach(model, **attach_arguments(self.recipe.adapter))
            else:
                adapter = la.restore(model, run.resume_from)
                state = torch.load(run.resume_from / _STATE, weights_only=True)
            record_adapter(run, adapter)
            if self.eval_images is not None and not run.facts.before:
                measured = self._measure(adapter.model)
                record_before(run, measured, self._samples(measured, self.recipe.samples))
        guard = GradientGuard(run)
        self._fit(run, adapter, guard, state)
        save_adapter(run, adapter, guard)
        raise_unless_finished(run, guard)
        with run.measuring():
            if self.eval_images is not None:
                measured = self._measure(adapter.model)
                record_after(run, measured, self._samples(measured, len(run.facts.samples)))

    def _load(self):
        """Return the base, its new classifier the same every time, stored as the recipe says."""
        section = self.recipe.model
        model = la.load(section.name, backend="mixer", dtype=section.dtype, device=str(self.device))
        seed_all(self.recipe.training.seed)
        model = self._with_classifier(model)
        if section.quantization is not None:  # which the backend can't while it loads
            options = attach_arguments(self.recipe.adapter)
            model = la.attach(model, **options, quantization=section.quantization).detach()
        seed_all(self.recipe.training.seed)
        return model

    def _fit(self, run, adapter, guard, state):
        """Take the steps that are left. Which rows a step takes follows from its number and the seed alone."""
        training, trained, rows = self.recipe.training, list(adapter.parameters()), len(self.train_images)
        total, per_epoch = steps_in_all(training, rows), steps_per_epoch(training, rows)
        optimizer = (torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.SGD)(
            trained, lr=training.learning_rate, weight_decay=training.weight_decay
        )
        first, losses = 0, []
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            write_state(state["random"])
            first, losses = state["step"], state["losses"]
        steps, memory = Steps(run, self.device, Rates("rows")), PeakMemory(self.device)
        steps.begin(first, total)
        adapter.model.train()
        for step in range(first + 1, total + 1):
            rate = training.learning_rate * learning_rate_share(training, step - 1, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            epoch, index = divmod(step - 1, per_epoch)
            losses.append(self._backward(adapter.model, self._rows_of(epoch, index), steps.rates))
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            if guard.passes(trained, step):
                if training.max_grad_norm:
                    torch.nn.utils.clip_grads_with_norm_(trained, training.max_grad_norm, norm)
                optimizer.step()
            steps.done(step, step / per_epoch)
            if step == 1 or step % training.log_every == 0:
                found = {"loss": sum(losses) / len(losses), "grad_norm": float(norm), "learning_rate": rate}
                steps.log(step, {**found, "adapter_norm": adapter.norms()["mean"], "epoch": step / per_epoch})
                losses.clear()
            if self.eval_images is not None and training.eval_every and step % training.eval_every == 0:
                metrics = self._measure(adapter.model).metrics
                steps.log(step, {f"eval_{name}": value for name, value in metrics.items()})
            asked = run.stop.requested is not None
            if (asked or step == total or step % save_every(training, total) == 0) and guard.holds(trained, step):
                folder = run.folder.checkpoints / f"checkpoint-{step}"
                adapter.save(folder)
                now = {"step": step, "losses": losses, "optimizer": optimizer.state_dict(), "random": read_state()}
                torch.save(now, folder / _STATE)
                keep_checkpoint(run, folder)
            if asked or guard.diverged:
                break
        run.facts.throughput, run.facts.memory_measured = steps.rates.read(), memory.read()
        run.progress.stop()

    def _rows_of(self, epoch, index):
        """Return the batches of a step, as lists of rows."""
        training, seed = self.recipe.training, self.recipe.training.seed
        order = torch.randperm(len(self.train_images), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        size = training.batch_size * training.gradient_accumulation
        mine = order[index * size : (index + 1) * size]
        return [mine[i : i + training.batch_size] for i in range(0, len(mine), training.batch_size)]

    def _backward(self, model, batches, rates):
        """Add the gradient of the mean loss over all rows of the batches; return that loss."""
        rows, total = sum(map(len, batches)), 0.0
        for batch in batches:
            images, labels = self._inputs(self.train_images.take(batch))
            loss = model(images=images, labels=labels).loss * (len(batch) / rows)
            loss.backward()
            total += loss.item()
            rates.add(rows=len(batch))
        return total

    def _inputs(self, images):
        index = {name: i for i, name in enumerate(self.recipe.data.labels)}
        labels = torch.tensor([index[label] for label in images.labels], device=self.device)
        return images.patches(self._settings).to(self.device), labels

    @cached_property
    def _settings(self):
        return skeleton(self.recipe.model.name, backend="mixer").settings

    # ---- measuring -----------------------------------------------------------------------------------------------

    def _measure(self, model):
        size, scores, wanted = self.recipe.training.batch_size, [], []
        with evaluating(model):
            for start in range(0, len(self.eval_images), size):
                rows = range(start, min(start + size, len(self.eval_images)))
                images, labels = self._inputs(self.eval_images.take(rows))
                scores.append(model(images=images).scores.float())
                wanted.append(labels)
        scores, wanted = torch.cat(scores), torch.cat(wanted)
        loss = F.cross_entropy(scores, wanted).item()
        return class_measures(loss, wanted.tolist(), scores.argmax(1).tolist(), self.recipe.data.labels)

    def _samples(self, measured, count):
        """The last part of a sample is what the model makes of it."""
        images = self.eval_images
        return [
            Sample(
                f"Eval image {i + 1}",
                [("label", images.labels[i]), ("predicted", measured.outputs[i])],
                [("image", images.png(i))],
            )
            for i in range(min(count, len(images)))
        ]

    def evaluate(self, adapters, progress):
        found = {}
        for name, model in each_model(self._load(), adapters):
            progress.say(f"measuring {name} on {len(self.eval_images):,} images")
            found[name] = self._measure(model).metrics
        return found

    def generate(self, adapters, prompts, progress, **options):
        raise UnsupportedError(
            "A Mixer sorts images and writes nothing: measure it with 'lora-adapters eval --data FILE'."
        )

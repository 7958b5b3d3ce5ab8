"""What the demo's parts share: training with transformers' Trainer on the CPU, and telling how far it is."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

#: Called with (stage, steps done, steps in all) as the work goes on.
Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Show nothing."""


class Clock:
    """Times the stages, and passes on how far they are."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.seconds, self.current = progress, {}, ""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens within, under this name."""
        self.current = name
        self.progress(name, 0, 1)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.progress(name, 1, 1)

    def step(self, done: int, total: int) -> None:
        """Pass on that `done` of the current stage's `total` steps are done."""
        if done < total:  # the stage reports its own end
            self.progress(self.current, done, total)


def run_trainer(
    model: Any,
    dataset: Sequence[Any],
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
    folder: Path,
    clock: Clock,
    batch_size: int,
    seed: int,
    **options: Any,
) -> None:
    """Train with transformers' Trainer on the CPU: AdamW, linear warm-up over a tenth of the steps, linear decay."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class Report(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.step(state.global_step, state.max_steps)

    steps = -(-len(dataset) // batch_size) * options["num_train_epochs"]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=batch_size,
        warmup_steps=steps // 10,
        seed=seed,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate, callbacks=[Report()])  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    trainer.train()


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """Hide the bars, warnings and reports of transformers or diffusers, and put its settings back.

    Args:
        library: "transformers" or "diffusers", whose `utils.logging` work alike.
    """
    logging: Any = importlib.import_module(f"{library}.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

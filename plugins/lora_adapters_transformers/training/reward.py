"""The task reward, through TRL's RewardTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from lora_adapters.attach_plan import AttachPlan
from lora_adapters.memory import StepMemory
from lora_adapters.runs.measuring import Measured, evaluating
from lora_adapters.runs.progress import Progress

from ..data.encoding import Encoded
from ..data.preview import preview, show
from ..data.reward import check_reward, encode_reward
from .measures import Collate, preference
from .runner import Measuring, TextRunner
from .writing import chat_prompt


class PreferenceTrainer(Measuring, RewardTrainer):
    """TRL's RewardTrainer with the task's own measure."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run writes its own beside the adapter."""


class RewardRunner(TextRunner):
    """Trains a reward model on pairs of a better and a worse answer."""

    task = "reward"
    higher_is_better = ("accuracy", "margin")
    trainer_class = PreferenceTrainer
    arguments_class = RewardConfig

    def check_columns(self, columns: Sequence[str]) -> None:
        """Check the columns; see `TextRunner.check_columns`."""
        check_reward(self.recipe.data, columns)

    def encode(self, rows: datasets.Dataset, name: str) -> Encoded:
        """Tokenize; see `TextRunner.encode`."""
        return encode_reward(rows, self.recipe.data, self.recipe.training, self.tokenizer, name=name)

    def model_options(self) -> dict[str, Any]:
        """Ask for a head with one output."""
        return {"task": self.task, "num_labels": 1, "ignore_mismatched_sizes": True}

    def more_arguments(self) -> dict[str, Any]:
        """Return RewardConfig's own."""
        training = self.recipe.training
        return {
            "max_length": training.max_length,
            "center_rewards_coefficient": training.center_rewards or None,
            "disable_dropout": self.recipe.adapter.dropout == 0,
        }

    def shape(self) -> tuple[int, int]:
        """Return rows and tokens of one forward pass, in which each pair is two rows."""
        training = self.recipe.training
        longest = training.max_length
        if self.train_rows is not None:
            rows = self.train_rows.rows
            longest = min(longest, max(map(len, [*rows["chosen_ids"], *rows["rejected_ids"]])))
        return training.batch_size, longest

    def memory(
        self, plan: AttachPlan, batch_size: int, length: int, checkpointing: bool, device: str | None = None
    ) -> StepMemory:
        """Predict a step of pairs."""
        return super().memory(plan, 2 * batch_size, length, checkpointing, device)

    def preview(self, progress: Progress) -> None:
        """Show the first pair."""
        assert self.train_rows is not None
        row = self.train_rows.rows[0]
        if progress.quiet:
            return
        for name in ("chosen", "rejected"):
            ids = row[f"{name}_ids"]
            show(preview({"input_ids": ids, "labels": [-100] * len(ids)}, self.tokenizer), f"one example, {name}")

    def collator(self, training: bool) -> Collate:
        """Put the better answers of a batch before the worse ones."""
        pad = DataCollatorForPreference(pad_token_id=self.tokenizer.pad_token_id)
        return lambda rows: pad([{k: row[k] for k in ("chosen_ids", "rejected_ids")} for row in rows])

    def measure(self, model: Any, rows: Any) -> Measured:
        """Return loss, accuracy and margin."""
        return preference(model, rows, self.recipe.training.batch_size, self.collator(False), self.autocast)

    def samples(self, model: Any, count: int, measured: Measured | None) -> list[list[tuple[str, str]]]:
        """Show the first pairs and their rewards."""
        assert self.eval_rows is not None
        assert measured is not None
        return [
            [
                ("chosen", str(self.tokenizer.decode(row["chosen_ids"], skip_special_tokens=True))),
                ("rejected", str(self.tokenizer.decode(row["rejected_ids"], skip_special_tokens=True))),
                ("rewards", measured.outputs[i]),
            ]
            for i, row in enumerate(self.eval_rows.rows.select(range(count)))
        ]

    def respond(self, model: Any, prompt: str, *, raw: bool = False, **_: Any) -> str:
        """Return the reward of one text."""
        ids = chat_prompt(self.tokenizer, prompt, None)[: self.recipe.training.max_length]
        with evaluating(model, self.autocast) as device:
            given = torch.tensor([ids], device=device)
            reward = model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, 0]
        return f"{float(reward):.3f}"

"""What every task of `lora-adapters train` must do, as tests a plugin author inherits."""

from __future__ import annotations

import json
import math
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..recipes.reading import dump, read_recipe, validate
from ..report.facts import RunFacts
from ..runs.checkpoints import checkpoints, is_complete, step_of
from ..runs.folder import ADAPTER, CHECKPOINTS, FACTS, METRICS, RECIPE, REPORT, RunFolder
from .checks import difference
from .commands import Done, run_command

#: Of a line of metrics.jsonl, what depends on the machine and not on the run.
_MACHINE = ("_per_second", "memory")


class TrainerContract:
    """Subclass it in a test file, name the subclass Test..., and return a recipe of your task.

    Every test runs the real commands, each in a process of its own; the plugin must be installed. One run of the recipe,
    left alone, is made first and kept for the other tests.

    Attributes:
        diverging: overrides under which the gradients soon are not finite.
        wrong: overrides, each of which makes the recipe wrong in a way that `check` finds; "{folder}" is an empty one.
    """

    diverging: Sequence[str] = (
        "training.optimizer=sgd",
        "training.learning_rate=1e30",
        "training.max_grad_norm=0",
        "training.warmup=3",
    )
    wrong: Sequence[str] = ("model.name={folder}/missing", "data.train={folder}/missing", "adapter.targets=nowhere")

    _folders: ClassVar[dict[type, tempfile.TemporaryDirectory[str]]] = {}

    def make_recipe(self, folder: Path) -> Mapping[str, Any]:
        """Return a recipe as a mapping, on a base and data that lie in, or are written to, `folder`.

        It should train and evaluate for a second or two, in 20 to 100 steps, with something random (dropout, the order of
        rows) and with gradient accumulation, if the task has it. The contract sets `output`, `log_every` and `save_every`.
        """
        raise NotImplementedError("TrainerContract: define make_recipe(self, folder) and return a recipe of yours.")

    # ---- a run -------------------------------------------------------------------------------------------------------

    def test_a_run_says_all_there_is_to_say(self) -> None:
        """The facts are complete, and agree with the plan, with metrics.jsonl and with what is in the folder."""
        folder, done = self._whole()
        facts, recipe = RunFacts.read(folder / FACTS), read_recipe(folder / RECIPE)
        assert (facts.task, facts.status, facts.reason) == (recipe.task, "finished", "")
        assert facts.recipe == recipe.model_dump(by_alias=True), "The run's recipe.yaml is not the one in its facts."
        assert 0 < facts.steps == facts.total_steps, f"{facts.steps} of {facts.total_steps} steps are reported."
        assert facts.epochs > 0, "The facts hold no epochs."
        parts = {part.name: part.rows for part in facts.data}
        assert {"train", "eval"} <= parts.keys(), f"The facts know the data {list(parts)}: train and eval are needed."
        assert all(rows > 0 for rows in parts.values()), f"A part of the data has no rows: {parts}."
        assert facts.adapted, "The facts don't say what was adapted: call record_adapter."
        assert facts.trainable_parameters > 0, "The facts don't say how much is trained."
        assert facts.memory_measured.get("peak", 0) > 0, "The facts hold no measured memory: see runs.measured."
        assert facts.throughput, "The facts hold no throughput: see runs.showing.Rates."
        assert all(rate > 0 for rate in facts.throughput.values()), f"A rate is not positive: {facts.throughput}."
        assert facts.before, "The facts hold no metrics of the base."
        assert facts.before.keys() == facts.after.keys(), "Base and adapter are measured by other metrics."
        assert facts.before != facts.after, "Training changed no metric: does forward use the adapter?"
        assert set(facts.higher_is_better) <= facts.after.keys(), "higher_is_better names no metric."
        assert facts.adapter_bytes > 0, "The facts don't say how large the adapter is."
        assert "Traceback" not in done.stderr

    def test_metrics_hold_every_step(self) -> None:
        """With log_every=1, metrics.jsonl has a line with a loss, a rate and a gradient norm for each step."""
        folder, _ = self._whole()
        facts = RunFacts.read(folder / FACTS)
        rows = [row for row in RunFolder(folder).history() if "loss" in row]
        assert [row["step"] for row in rows] == [*range(1, facts.steps + 1)], (
            "metrics.jsonl lacks steps, or repeats some."
        )
        for key in ("loss", "learning_rate", "grad_norm", "epoch", "memory"):
            assert all(math.isfinite(row.get(key, math.nan)) for row in rows), f"metrics.jsonl lacks {key!r}."

    def test_the_plan_is_that_of_the_run(self) -> None:
        """`plan` predicts without training what the run's facts say."""
        folder, _ = self._whole()
        done = run_command("plan", str(self._recipe()), "--json")
        assert done.status == 0, done.stderr
        planned, facts = json.loads(done.stdout), RunFacts.read(folder / FACTS)
        assert planned["memory"] == facts.memory_planned, "The run planned other memory than `plan` does."
        assert planned["memory"]["total"] > 0
        assert len(planned["layers"]) == sum(group.count for group in facts.adapted), "The run adapted other layers."
        assert planned["trainable_parameters"] == facts.trainable_parameters, (
            "The run trained another number of values."
        )

    def test_report_and_card_are_written(self) -> None:
        """report.html shows curves and every sample, and the adapter has a model card."""
        folder, _ = self._whole()
        facts, page = RunFacts.read(folder / FACTS), (folder / REPORT).read_text(encoding="utf-8")
        assert "<svg" in page, "report.html has no curve."
        for sample in facts.samples:
            labels = [label for label, _ in (*sample.parts, *sample.images)]
            assert any(label.endswith(", base") for label in labels), f"{sample.title!r} lacks the base: record_before."
            assert any(label.endswith(", adapter") for label in labels), f"{sample.title!r} lacks the adapter."
            assert all(data in page for _, data in sample.images), "An image of a sample is not in the report."
        card = (folder / ADAPTER / "README.md").read_text(encoding="utf-8")
        assert facts.task in card
        assert str(folder) not in card, "The card tells a path of this machine."

    def test_eval_agrees_with_the_run(self) -> None:
        """`eval` of the saved adapter, and of the base, measures what the run measured."""
        folder, _ = self._whole()
        done = run_command("eval", str(folder), "--json")
        assert done.status == 0, done.stderr
        measured, facts = json.loads(done.stdout), RunFacts.read(folder / FACTS)
        for name, expected in (("base", facts.before), (folder.name, facts.after)):
            assert measured[name].keys() == expected.keys(), f"eval measures other metrics of {name}."
            for metric, value in expected.items():
                now = measured[name][metric]
                assert math.isclose(now, value, rel_tol=1e-5, abs_tol=1e-6), (
                    f"eval finds {metric} = {now} for {name}, and the run found {value}."
                )

    def test_eval_takes_other_data(self) -> None:
        """`eval --data` measures on a file of the user's, by the metrics of the run."""
        folder, _ = self._whole()
        data = getattr(read_recipe(folder / RECIPE).data, "train", None)
        if not isinstance(data, str):
            return
        done = run_command("eval", str(folder), "--data", data, "--json")
        assert done.status == 0, done.stderr
        assert json.loads(done.stdout)[folder.name].keys() == RunFacts.read(folder / FACTS).after.keys()

    def test_generate_answers_or_says_why_not(self) -> None:
        """`generate` shows the base and the adapter, or fails with one line."""
        folder, _ = self._whole()
        done = run_command("generate", str(folder), "--prompt", "a word", "--max-new-tokens", "4", "--json")
        if done.status:
            self._one_error(done)
            return
        (sample,) = json.loads(done.stdout)
        assert [label for label, _ in sample["parts"]] == ["base", folder.name], "generate shows base, then adapter."

    # ---- how it ends -------------------------------------------------------------------------------------------------

    def test_wrong_recipes_are_refused_before_anything_is_written(self) -> None:
        """`check` finds what is wrong: one line, no folder."""
        recipe = self._recipe()
        for override in self.wrong:
            with tempfile.TemporaryDirectory() as empty:
                done = run_command("train", str(recipe), override.replace("{folder}", empty), f"output={empty}/run")
                assert done.status == 1, f"{override} should be refused, and ended with {done.status}: {done.stderr}"
                self._one_error(done)
                assert not Path(empty, "run").exists(), f"{override} is found only after the run's folder was made."

    def test_a_run_that_is_killed_and_stopped_goes_on_exactly(self) -> None:
        """Killed, resumed, stopped by Ctrl-C, resumed, stopped by SIGTERM, resumed: the same bits as the run left alone."""
        whole, _ = self._whole()
        total = RunFacts.read(whole / FACTS).steps
        assert total >= 8, f"The recipe takes {total} steps: it needs 8 to be stopped three times."
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, whole.name)
            arguments = ["train", str(self._recipe()), f"output={folder}"]
            killed = run_command(*arguments, signal_at=(getattr(signal, "SIGKILL", signal.SIGTERM), total // 4))
            assert killed.status != 0, "The run ended well although it was killed."
            first = self._newest(folder)
            done = self._stopped(folder, arguments, signal.SIGINT, total // 2)
            resumed = RunFacts.read(folder / FACTS).resumed_from
            assert resumed == [first], (
                f"The killed run was resumed at {resumed} and not at its newest checkpoint, {first}."
            )
            assert f"resuming at step {first}" in done.stderr
            self._stopped(folder, arguments, signal.SIGTERM, 3 * total // 4)
            done = run_command(*arguments, "resume=true")
            assert done.status == 0, done.stderr
            self._same(folder, whole)

    def test_divergence_stops_the_run_and_keeps_a_finite_adapter(self) -> None:
        """`nan: stop` ends at the first gradient that is not finite; what is kept is finite."""
        facts, adapter = self._diverged("stop")
        assert facts.skipped_steps == 1, f"{facts.skipped_steps} steps were skipped; the first one should stop the run."
        assert adapter, "No adapter is kept."

    def test_divergence_can_be_skipped_for_a_while(self) -> None:
        """`nan: skip` passes such steps over, and ends after 25 in a row."""
        facts, adapter = self._diverged("skip", "training.max_steps=60")
        assert facts.skipped_steps == 25, f"{facts.skipped_steps} steps were skipped in a row; 25 should end the run."
        assert adapter, "No adapter is kept."

    def test_divergence_can_raise(self) -> None:
        """`nan: raise` ends at once and saves nothing."""
        assert not self._diverged("raise")[1], "With nan: raise nothing is to be saved."

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _recipe(self) -> Path:
        """Write the recipe, once for each class; return its file."""
        if type(self) not in self._folders:
            self._folders[type(self)] = tempfile.TemporaryDirectory()
        folder = Path(self._folders[type(self)].name)
        path = folder / "recipe.yaml"
        if not path.exists():
            files = folder / "files"
            files.mkdir(exist_ok=True)
            given = dict(self.make_recipe(files))
            given["training"] = {**given.get("training", {}), "log_every": 1, "save_every": 2}
            path.write_text(dump(validate({**given, "output": str(folder / "whole")})), encoding="utf-8")
        return path

    def _whole(self) -> tuple[Path, Done]:
        """Return the folder of the run that was left alone, and what the command did."""
        path = self._recipe()
        folder, kept = path.parent / "whole", path.parent / "done.json"
        if not kept.exists():
            done = run_command("train", str(path), "overwrite=true")
            assert done.status == 0, f"The recipe does not train:\n{done.stderr}"
            kept.write_text(json.dumps(vars(done)), encoding="utf-8")
        return folder, Done(**json.loads(kept.read_text(encoding="utf-8")))

    def _stopped(self, folder: Path, arguments: Sequence[str], number: signal.Signals, step: int) -> Done:
        """Resume a run, stop it by a signal at a step, and check what it leaves."""
        done = run_command(*arguments, "resume=true", signal_at=(number, step))
        assert done.status == 128 + number, f"{number.name} at step {step} ended with {done.status}: {done.stderr}"
        self._one_error(done)
        assert f"Stopped by {number.name}. Step " in done.stderr, done.stderr
        assert "resume=true goes on" in done.stderr, done.stderr
        facts = RunFacts.read(folder / FACTS)
        assert facts.status == "interrupted"
        assert step <= facts.steps <= step + 1, f"The signal came at step {step}, and the run stopped at {facts.steps}."
        assert self._newest(folder) == facts.steps, "A stopped run leaves a whole checkpoint of its last step."
        kept = len(checkpoints(folder / CHECKPOINTS))
        assert kept <= read_recipe(folder / RECIPE).training.keep_checkpoints, f"{kept} checkpoints are kept."
        assert self._tensors(folder), "A stopped run leaves its adapter."
        assert "interrupted" in (folder / REPORT).read_text(encoding="utf-8").lower()
        return done

    def _diverged(self, policy: str, *more: str) -> tuple[RunFacts, dict[str, Any]]:
        """Run a recipe that diverges; return its facts and the adapter's tensors, if one is there."""
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, "run")
            overrides = [f"output={folder}", f"training.nan={policy}", "training.save_every=1", *self.diverging, *more]
            done = run_command("train", str(self._recipe()), *overrides)
            assert done.status == 1, f"A run that diverges should end with 1, not {done.status}: {done.stderr}"
            self._one_error(done)
            facts = RunFacts.read(folder / FACTS)
            assert facts.status == "diverged", f"The run is {facts.status}: {facts.reason}"
            assert "not finite" in facts.reason
            assert facts.reason in done.stderr
            assert "diverged" in (folder / REPORT).read_text(encoding="utf-8").lower()
            tensors = self._tensors(folder)
        broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        assert not broken, f"The adapter that is kept is not finite: {broken[:1]}."
        return facts, tensors

    def _same(self, folder: Path, whole: Path) -> None:
        """Check that two runs are one, to the bit."""
        what = difference(self._tensors(whole), self._tensors(folder))
        assert not what, f"The resumed run gives another adapter: {what} differs."
        for one, other in zip(self._history(folder), self._history(whole), strict=True):
            assert one == other, f"The resumed run recorded {one}, and the run left alone {other}."
        now, then = RunFacts.read(folder / FACTS), RunFacts.read(whole / FACTS)
        for name in ("steps", "epochs", "data", "adapted", "trained", "before", "after", "samples", "tables"):
            assert getattr(now, name) == getattr(then, name), f"After resuming, the facts hold other {name}."

    @staticmethod
    def _history(folder: Path) -> list[dict[str, Any]]:
        assert (folder / METRICS).is_file(), "The run wrote no metrics.jsonl."
        rows = RunFolder(folder).history()
        return [{key: value for key, value in row.items() if not key.endswith(_MACHINE)} for row in rows]

    @staticmethod
    def _newest(folder: Path) -> int:
        whole = [path for path in checkpoints(folder / CHECKPOINTS) if is_complete(path)]
        assert whole, "There is no whole checkpoint: call keep_checkpoint after each."
        return step_of(whole[0])

    @staticmethod
    def _tensors(folder: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        files = sorted((folder / ADAPTER).glob("*.safetensors"))
        return {f"{path.name}: {name}": tensor for path in files for name, tensor in load_file(path).items()}

    @staticmethod
    def _one_error(done: Done) -> None:
        errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1, f"One line should say what is wrong, there are {len(errors)}: {done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr

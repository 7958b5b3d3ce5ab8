"""What is known of a run: the one thing that `--json`, report.html and the model card are made from. Pure data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

#: How a run ended. "running" is what a run that was killed leaves behind.
Status = Literal["running", "finished", "interrupted", "diverged", "failed"]


@dataclass
class DataFacts:
    """One part of the data.

    Attributes:
        name: "train" or "eval".
        source: the file, folder or dataset as the recipe names it.
        rows: rows that are used.
        details: what else there is to say, name -> number or text: tokens, rows too long, rows left out and why.
    """

    name: str
    source: str
    rows: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sample:
    """Something to look at: a prompt and its answers, a picture and what it was taken for.

    Attributes:
        title: what it is.
        parts: (label, text) pairs, shown in this order. Texts are plain, of any content.
        images: (label, PNG bytes as base64) pairs.
    """

    title: str
    parts: list[tuple[str, str]] = field(default_factory=list)
    images: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Table:
    """A table that a task adds to the report, such as a confusion matrix.

    Attributes:
        title: what it shows.
        header: one text per column.
        rows: cells, numbers or texts.
        shaded: colour each number by its share of the numbers in its row, as in a confusion matrix.
    """

    title: str
    header: list[str]
    rows: list[list[Any]]
    shaded: bool = False


@dataclass
class AdaptedGroup:
    """Layers of one role and shape that were adapted; `name` has '*' for the number of the block."""

    role: str
    name: str
    count: int
    shape: list[int]
    rank: int
    scale: float
    base: str
    base_bytes: int
    run_by: str


@dataclass
class SkippedGroup:
    """Modules that were not adapted, and why."""

    role: str
    name: str
    count: int
    reason: str


@dataclass
class RunFacts:
    """Everything about one run.

    Attributes:
        task, base, revision: what was trained, on what.
        status, reason: how it ended; the reason is "" for a run that finished.
        recipe: the resolved recipe, every default written out.
        environment: versions and devices, name -> text; no paths, no tokens.
        started: ISO 8601, UTC. seconds: training time, of all parts of a resumed run.
        steps, total_steps: optimizer steps done and planned. epochs: passes done.
        resumed_from: steps at which the run was resumed.
        data: the parts of the data.
        adapted, skipped, trained, notes: from the plan; `trained` are modules trained and saved whole.
        trainable_parameters, total_parameters: numbers of values.
        memory_planned: bytes of a training step, by part ("weights", "adapter", "gradients", "optimizer",
            "activations", "total"). memory_measured: bytes, by kind ("peak", and on a CPU "before": the process's memory
            before training, which the peak includes).
        before, after: metrics on the eval data, name -> value, of the base and of the adapter.
        higher_is_better: of those metrics, which ones.
        throughput: per second, such as {"tokens": 1200.0, "rows": 3.1}.
        skipped_steps: steps whose gradient was not finite, left out by `nan: skip`.
        labels: of a classifier, names of its classes in the order of its outputs.
        samples, tables: what a task adds.
        adapter_bytes: size of the saved adapter.
    """

    task: str
    base: str
    revision: str | None = None
    status: Status = "running"
    reason: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    started: str = ""
    seconds: float = 0.0
    steps: int = 0
    total_steps: int = 0
    epochs: float = 0.0
    resumed_from: list[int] = field(default_factory=list)
    data: list[DataFacts] = field(default_factory=list)
    adapted: list[AdaptedGroup] = field(default_factory=list)
    skipped: list[SkippedGroup] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trainable_parameters: int = 0
    total_parameters: int = 0
    memory_planned: dict[str, int] = field(default_factory=dict)
    memory_measured: dict[str, int] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    higher_is_better: list[str] = field(default_factory=list)
    throughput: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0
    labels: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    adapter_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> RunFacts:
        """Return the facts that a run wrote to `path`, its facts.json."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(cls)}
        made = cls(**{key: value for key, value in raw.items() if key in known})
        for name in ("before", "after", "throughput"):  # a number that is not finite was written as a text
            setattr(made, name, {key: float(value) for key, value in getattr(made, name).items()})
        made.data = [DataFacts(**item) for item in raw.get("data", [])]
        made.adapted = [AdaptedGroup(**item) for item in raw.get("adapted", [])]
        made.skipped = [SkippedGroup(**item) for item in raw.get("skipped", [])]
        made.samples = [
            Sample(s["title"], [(a, b) for a, b in s["parts"]], [(a, b) for a, b in s["images"]])
            for s in raw.get("samples", [])
        ]
        made.tables = [Table(**item) for item in raw.get("tables", [])]
        return made

"""A run as a task would leave it, for the report's and the card's tests."""

import base64
import math
import random
from io import BytesIO

import pytest

from lora_adapters.report.facts import AdaptedGroup, DataFacts, RunFacts, Sample, SkippedGroup, Table


@pytest.fixture
def make_facts():
    """Return a function that makes the facts of a finished run; keywords replace fields."""
    return _facts


@pytest.fixture
def make_history():
    """Return a function that makes rows of metrics.jsonl."""
    return _history


def _facts(**changed) -> RunFacts:
    settings = dict(
        task="causal-lm",
        base="org/model-1b",
        revision="main",
        status="finished",
        recipe={
            "schema": 1,
            "task": "causal-lm",
            "model": {"name": "org/model-1b", "revision": "main", "quantization": "nf4", "trust_remote_code": False},
            "adapter": {"rank": 16, "alpha": None, "targets": {"attention": 16, "mlp": 8}, "dropout": 0.05},
            "data": {"train": "data/tickets.jsonl", "text": "{question}\n{answer}"},
            "training": {"epochs": 3, "learning_rate": 2e-4, "log_every": 10, "report_to": []},
            "output": "runs/first",
        },
        environment={"python": "3.11.9", "torch": "2.15.0", "device": "a GPU, 16 GiB"},
        started="2026-01-31T12:05:33+00:00",
        seconds=4331.2,
        steps=2000,
        total_steps=2000,
        epochs=3.0,
        data=[
            DataFacts("train", "data/tickets.jsonl", 10666, {"tokens": 4812330, "rows_too_long": "41 cut at 1024"}),
            DataFacts("eval", "data/tickets.jsonl", 561),
        ],
        adapted=[
            AdaptedGroup(
                "q", "model.layers.*.self_attn.q_proj", 24, [2048, 2048], 16, 1.0, "nf4", 50331648, "this package"
            ),
            AdaptedGroup("up", "model.layers.*.mlp.up_proj", 24, [8192, 2048], 8, 1.0, "nf4", 201326592, "PEFT"),
        ],
        skipped=[SkippedGroup("head", "lm_head", 1, "heads are left alone unless targets name them")],
        trained=["model.norm"],
        notes=["q, k and v share one input."],
        trainable_parameters=9437184,
        total_parameters=1245251584,
        memory_planned={"weights": 812000000, "adapter": 38000000, "activations": 1933000000, "total": 2783000000},
        memory_measured={"peak": 3011000000, "before": 500000000},
        before={"loss": 2.4137, "rougeL": 0.2134, "accuracy": 0.75},
        after={"loss": 1.1021, "rougeL": 0.1471, "accuracy": 0.75},
        higher_is_better=["rougeL", "accuracy"],
        throughput={"tokens": 4211.3},
        samples=[
            Sample("Ticket 4711", [("prompt", "for i in x:\n    print(i)"), ("base", "No."), ("adapter", "Yes.")]),
            Sample("A picture", images=[("with adapter", _picture())]),
        ],
        tables=[Table("Confusion matrix", ["true", "billing", "outage"], [["billing", 101, 3], ["outage", 4, 88]])],
        adapter_bytes=37801222,
    )
    return RunFacts(**settings | changed)


def _picture() -> str:
    from matplotlib.figure import Figure

    out = BytesIO()
    Figure(figsize=(1, 1)).savefig(out, format="png")
    return base64.b64encode(out.getvalue()).decode()


def _history(points: int = 200) -> list[dict]:
    noise, rows = random.Random(0), []
    for i in range(1, points + 1):
        part = i / points
        row = {"step": 10 * i, "epoch": 3 * part, "loss": 1 + 1.4 * math.exp(-5 * part) + noise.gauss(0, 0.03)}
        row |= {"learning_rate": 2e-4 * (1 - part), "grad_norm": 0.5 + noise.random(), "adapter_norm": math.sqrt(part)}
        rows.append(row)
        if i % 20 == 0:
            found = {"eval_loss": 1.1 + math.exp(-4 * part), "eval_rougeL": part, "eval_runtime": 3.1}
            rows.append({"step": 10 * i, "epoch": 3 * part, **found})
    return rows

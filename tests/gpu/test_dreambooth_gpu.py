"""DreamBooth on CUDA: steps as CUDA graphs are those without, in mixed precision, on 4-bit bases, with each optimizer."""

import importlib
import signal
from pathlib import Path

import pytest
import torch
from lora_adapters_diffusers import LoraPipeline

from lora_adapters.cuda_graphs import GraphedLoss
from lora_adapters.errors import RequestError
from lora_adapters.runs.showing import Steps
from lora_adapters.runs.stopping import InterruptedRunError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KINDS = ("sd", "sdxl", "flux", "sd3")
OPTIONS = {
    "data": {"resolution": 32, "bucket_step": 16, "min_side": 16},
    "samples": {"count": 1, "steps": 1},
    "rank": 2,
    "learning_rate": 1e-2,
    "quiet": True,
}


@pytest.fixture(scope="module")
def tools():
    """The modules that build tiny pipelines and photos."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "diffusers"))
        yield importlib.import_module("pipelines"), importlib.import_module("photos")


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def teach(tools, kind, dtype=torch.float32, quantized=False, count=4, **options):
    """Return the facts of a run, its losses of each step, and what it trained."""
    pipelines, photos = tools
    pipe = pipelines.build(kind).to("cuda", dtype)
    lora = LoraPipeline(pipe, quantization={pipelines.denoiser_name(pipe): "nf4"} if quantized else None)
    given = {**OPTIONS, "steps": 5, "log_every": 1, **options}
    result = lora.dreambooth(photos.photos(count, square=False), "a sks cat", **given)
    values = [p.detach().clone() for adapter in result.adapters.values() for p in adapter.parameters()]
    assert all(value.isfinite().all() for value in values)
    return result.facts, values


def same(tools, kind, limit=1e-3, **options):
    """Check that a run with CUDA graphs is one without, but for rounding, which AdamW would let grow."""
    options = {"optimizer": "sgd", "learning_rate": 0.3, **options}
    plain, expected = teach(tools, kind, cuda_graphs=False, **options)
    recorded, record = [], GraphedLoss._record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphedLoss, "_record", lambda self, inputs: recorded.append(1) or record(self, inputs))
        graphed, found = teach(tools, kind, cuda_graphs=True, **options)
    assert recorded
    assert graphed.after["loss"] == pytest.approx(plain.after["loss"], rel=limit)
    assert graphed.after != graphed.before
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=limit, atol=limit * other.abs().max().item())


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_every_family(tools, kind, quantized):
    """Several shapes (buckets), two batches a step, gradient checkpointing, averages, and the class beside the subject."""
    limit = 1e-2 if quantized else 1e-3
    same(tools, kind, limit, quantized=quantized, gradient_accumulation=2, gradient_checkpointing=True, ema=0.5)


def test_graphs_with_prior_preservation_and_short_batches(tools, tmp_path):
    prior = {"prompt": "a cat", "images": 2, "steps": 1, "folder": str(tmp_path / "class")}
    same(tools, "sd", prior=prior, batch_size=2, count=5)


def test_graphs_draw_dropout_from_the_seed(tools):
    runs = [teach(tools, "sd", dropout=0.5, cuda_graphs=True, training={"seed": seed})[1] for seed in (0, 0, 1)]
    assert all(torch.equal(one, other) for one, other in zip(runs[0], runs[1], strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision(tools, kind, dtype, graphs):
    """Adapters of 16-bit pipelines are fp32 and learn, with loss scaling where it is float16."""
    precision = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
    facts, values = teach(tools, kind, dtype, precision=precision, cuda_graphs=graphs, steps=12)
    assert {value.dtype for value in values} == {torch.float32}
    assert facts.after["loss"] < facts.before["loss"]
    assert facts.skipped_steps <= 3  # the first scales of the loss are too large for float16


@pytest.mark.parametrize(
    ("optimizer", "rate"), [("adamw", 1e-2), ("adamw_8bit", 1e-2), ("prodigy", 1.0), ("RAdam", 1e-2), ("sgd", 0.3)]
)
def test_optimizers(tools, optimizer, rate):
    facts, _ = teach(tools, "sd", torch.bfloat16, True, optimizer=optimizer, learning_rate=rate, steps=12)
    assert facts.after["loss"] < facts.before["loss"]


@pytest.mark.parametrize("graphs", [False, True])
def test_it_goes_on_where_it_stopped(tools, tmp_path, graphs, monkeypatch):
    """A run in two parts is the run in one, to the bit."""
    options = dict(cuda_graphs=graphs, save_every=3, keep_checkpoints=9)
    _, whole = teach(tools, "sd", torch.bfloat16, steps=6, output=str(tmp_path / "whole"), **options)
    _, again = teach(tools, "sd", torch.bfloat16, steps=6, output=str(tmp_path / "again"), **options)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    done = Steps.done

    def stop_at_three(self, step, epochs):
        done(self, step, epochs)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
        patch.setattr(Steps, "done", stop_at_three)
        teach(tools, "sd", torch.bfloat16, steps=6, output=str(tmp_path / "part"), **options)
    _, resumed = teach(tools, "sd", torch.bfloat16, steps=6, output=str(tmp_path / "part"), resume=True, **options)
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


def test_text_encoders_train_without_graphs(tools):
    facts, _ = teach(tools, "sdxl", torch.bfloat16, text_encoders=True, steps=8)
    assert facts.after["loss"] < facts.before["loss"]
    for options in ({"text_encoders": True}, {"dropout": 0.1, "gradient_checkpointing": True}):
        with pytest.raises(RequestError, match="cuda_graphs"):
            teach(tools, "sd", cuda_graphs=True, **options)

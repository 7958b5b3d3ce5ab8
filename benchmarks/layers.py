"""One layer at a time: forward, backward and peak memory of the frozen base, stock PEFT and ours.

    python benchmarks/layers.py [--cells linear-4096 conv-640] [--weights bf16 nf4] [--markdown docs/layers.md] [--json]

On CUDA every cell runs in turn with the others, without a pause, so that all see the clocks of a GPU under load; each
variant's work is queued behind other products, so that what is timed (CUDA events) is the GPU's work and not Python's.
What Python and launches add where nothing hides them is the column "alone": forward and backward in a loop, by the wall
clock. Numbers are medians; a ratio is the median over rounds of (this variant / the bare product of the same round).

Backward means dX, and dA and dB where there is an adapter. "product" is x @ W.T in 16 bits and dX = dY @ W alone: what
no layer can go below. Peak is what a forward and backward allocate beyond the weights, the input and dY.
Without CUDA (--device cpu) times are the wall clock's and there is no memory column; --tiny is for a smoke test.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from interleaved import table
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_adapters
from lora_adapters.weights import quantize_modules, quantizer_for
from lora_adapters.weights.marking import mark_quantized

RANK = 16


@dataclass(frozen=True)
class Cell:
    """One layer and the shape of its input."""

    kind: str
    make: Callable[[], nn.Module]
    input: tuple[int, ...]


def linear(tokens: int, inputs: int, outputs: int) -> Cell:
    return Cell("linear", lambda: nn.Linear(inputs, outputs, bias=False), (1, tokens, inputs))


def conv(batch: int, channels: int, size: int) -> Cell:
    return Cell("conv", lambda: nn.Conv2d(channels, channels, 3, padding=1), (batch, channels, size, size))


def embedding(tokens: int, rows: int, width: int) -> Cell:
    return Cell("embedding", lambda: nn.Embedding(rows, width), (1, tokens))


CELLS = {
    "linear 4096 -> 4096, 4096 tokens": linear(4096, 4096, 4096),
    "linear 4096 -> 14336, 4096 tokens": linear(4096, 4096, 14336),
    "linear 14336 -> 4096, 4096 tokens": linear(4096, 14336, 4096),
    "linear 1024 -> 1024, 12608 tokens": linear(12608, 1024, 1024),
    "linear 640 -> 640, 8192 tokens": linear(8192, 640, 640),
    "conv 3x3 320 -> 320, 64x64, batch 4": conv(4, 320, 64),
    "conv 3x3 1280 -> 1280, 16x16, batch 4": conv(4, 1280, 16),
    "embedding 32000 x 4096, 4096 tokens": embedding(4096, 32000, 4096),
}
TINY = {
    "linear 64 -> 96, 32 tokens": linear(32, 64, 96),
    "conv 3x3 16 -> 16, 8x8, batch 2": conv(2, 16, 8),
    "embedding 50 x 64, 32 tokens": embedding(32, 50, 64),
}


@dataclass
class Variant:
    """Something to time: a module, its parameters to train, and whether autocast is on in forward."""

    module: Callable[[torch.Tensor], torch.Tensor]
    trained: list[nn.Parameter]
    autocast: bool = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        off: AbstractContextManager[Any] = nullcontext()
        with torch.autocast(x.device.type, dtype=torch.bfloat16) if self.autocast else off:
            return self.module(x)

    def backward(self, y: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> None:
        wanted = [*([x] if x.requires_grad else []), *self.trained]
        if wanted:
            torch.autograd.grad(y, wanted, dy)


def variants(cell: Cell, weights: str, device: str) -> dict[str, Variant]:
    """Return what is compared, all with the same weights."""
    torch.manual_seed(0)
    with torch.device(device):
        dense = cell.make().to(torch.bfloat16).requires_grad_(False)

    def model(quantized: bool) -> Any:
        made = nn.ModuleDict({"layer": copy.deepcopy(dense)})
        if quantized:
            quantizer = quantizer_for("nf4")
            quantize_modules(made, {"layer": quantizer}, torch.bfloat16)
            mark_quantized(made, quantizer)
        return made

    def adapted(kind: str, half: bool) -> Variant:
        base = _Caller(model(weights == "nf4"))
        if weights == "nf4":
            base.is_loaded_in_4bit = True
        if kind == "PEFT":
            get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["model.layer"]))
        else:
            lora_adapters.attach(base, rank=RANK, targets=["model.layer"])
        trained = [p for p in base.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.to(torch.bfloat16 if half else torch.float32)
            nn.init.normal_(parameter, std=0.02)
        return Variant(base, trained, autocast=not half)

    found: dict[str, Variant] = {}
    if cell.kind == "linear":
        found["product"] = Variant(lambda x: x @ dense.weight.t(), [])
    elif cell.kind == "conv":
        found["product"] = Variant(dense, [])
    found["base"] = Variant(_Caller(model(weights == "nf4")), [])
    # Stock PEFT can't begin on a 4-bit convolution: it would draw A as bytes.
    if not (cell.kind == "conv" and weights == "nf4"):
        found["PEFT, fp32 adapters, autocast"] = adapted("PEFT", False)
        found["PEFT, bf16 adapters"] = adapted("PEFT", True)
    found["ours, fp32 adapters, autocast"] = adapted("ours", False)
    found["ours, bf16 adapters"] = adapted("ours", True)
    wide = adapted("ours", False)
    wide.autocast = False
    found["ours, fp32 adapters"] = wide
    return found


class _Caller(nn.Module):
    """A model of one layer."""

    def __init__(self, model: nn.ModuleDict) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model["layer"](x)


def inputs(cell: Cell, device: str) -> torch.Tensor:
    torch.manual_seed(1)
    if cell.kind == "embedding":
        return torch.randint(0, cell.make().num_embeddings, cell.input, device=device)  # type: ignore[arg-type]
    return torch.randn(cell.input, device=device, dtype=torch.bfloat16).requires_grad_()


class Clock:
    """Times of pieces of work: CUDA events behind a filled queue, or the wall clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            self.filler = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def fill(self, milliseconds: float) -> None:
        """Give the GPU this much to do (about 0.25 ms each product), while Python queues what is timed."""
        if self.cuda:
            for _ in range(max(1, round(milliseconds / 0.25))):
                torch.mm(self.filler, self.filler)

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) if self.cuda else (stop - start) * 1000

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def timed(found: dict[str, Variant], x: torch.Tensor, rounds: int, device: str) -> dict[str, list[tuple[float, float]]]:
    """Return for each variant (forward, backward) milliseconds of every round."""
    clock, marks = Clock(device), {name: [] for name in found}
    dys = {}
    for name, variant in found.items():
        y = variant.forward(x)
        dys[name] = torch.randn_like(y)
        del y
    warmup = 5
    for turn in range(warmup + rounds):
        for name in list(found) if turn % 2 else reversed(list(found)):
            clock.fill(8.0)
            start = clock.now()
            y = found[name].forward(x)
            middle = clock.now()
            found[name].backward(y, x, dys[name])
            marks[name].append((start, middle, clock.now()))
            del y
        clock.wait()
    return {
        name: [(clock.milliseconds(a, b), clock.milliseconds(b, c)) for a, b, c in each[warmup:]]
        for name, each in marks.items()
    }


def alone(variant: Variant, x: torch.Tensor, repeats: int, device: str) -> float:
    """Return the wall-clock milliseconds of forward and backward in a loop."""
    clock = Clock(device)
    dy = torch.randn_like(variant.forward(x))
    for turn in range(repeats + 5):
        if turn == 5:
            clock.wait()
            start = time.perf_counter()
        variant.backward(variant.forward(x), x, dy)
    clock.wait()
    return (time.perf_counter() - start) * 1000 / repeats


def peak(variant: Variant, x: torch.Tensor, device: str) -> float | None:
    """Return the MiB that forward and backward allocate at most beyond what is there."""
    if not device.startswith("cuda"):
        return None
    dy = torch.randn_like(variant.forward(x))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant.backward(variant.forward(x), x, dy)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(title: str, cell: Cell, weights: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one cell."""
    found, x = variants(cell, weights, args.device), inputs(cell, args.device)
    times = timed(found, x, args.rounds, args.device)
    floor = times.get("product")
    rows = []
    for name, variant in found.items():
        mine = times[name]

        def against(part: int, mine: list[tuple[float, float]] = mine) -> float | None:
            if floor is None:
                return None
            return statistics.median(a[part] / b[part] for a, b in zip(mine, floor, strict=True))

        rows.append(
            {
                "layer": title,
                "weights": weights,
                "variant": name,
                "forward ms": statistics.median(forward for forward, _ in mine),
                "/ product": against(0),
                "backward ms": statistics.median(backward for _, backward in mine),
                "/ dX product": against(1),
                "alone ms": alone(variant, x, args.rounds, args.device),
                "peak MiB": peak(variant, x, args.device),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cells", nargs="+", help="only layers whose name contains one of these")
    parser.add_argument("--weights", nargs="+", choices=["bf16", "nf4"], default=["bf16", "nf4"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tiny", action="store_true", help="small layers, for a smoke test")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    cells = TINY if args.tiny else CELLS
    wanted = [name for name in cells if not args.cells or any(part in name for part in args.cells)]
    rows: list[dict[str, Any]] = []
    for name in wanted:
        for weights in args.weights:
            if not (cells[name].kind == "embedding" and weights == "nf4"):  # embeddings stay dense
                rows += measure(name, cells[name], weights, args)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    text = (
        f"{where}, torch {torch.__version__}, rank {RANK}, medians of {args.rounds} interleaved rounds.\n\n"
        f"{table(rows, 3)}\n"
    )
    if args.markdown:
        args.markdown.write_text(f"# One layer at a time\n\n{text}", encoding="utf-8")
    print(json.dumps(rows, indent=1) if args.json else text)


if __name__ == "__main__":
    main()

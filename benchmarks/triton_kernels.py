"""Each Triton kernel beside what people use for the same work, on one GPU.

    python benchmarks/triton_kernels.py [--rank 16 64] [--tune]

dequantize_merge stands against bitsandbytes' dequantize_4bit followed by torch.addmm. The skinny products are those of
bf16 activations and fp32 factors, and stand against a cast and torch.mm; up_grads, which also serves bf16 factors, has a
second row. The packed weight is NF4 with nested statistics. A row's GB/s count each operand and result once, whatever a
method really moves; `copy` is what torch reaches on this GPU with a large copy, `fill` writes the result and no more.

How it is timed: all calls of a measurement are captured in one CUDA graph, so Python's time to launch is left out (a
table at the end has it). The calls cycle over so many copies of the operands that none is found in the cache. After 10
replays to warm up follow 60 timed ones; the median counts. --tune also times other tiles and shows the best four.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

SHAPES = [
    (4096, 4096, 4096),
    (4096, 4096, 14336),
    (4096, 14336, 4096),
    (12608, 1024, 1024),
    (12608, 1024, 4096),
    (2048, 640, 640),
]
#: More bytes than any cache holds.
CYCLE_BYTES = 512 << 20
BF16, F32 = torch.bfloat16, torch.float32
Call = Callable[..., Any]


def milliseconds(call: Call, operands: list[tuple]) -> float:
    """Return the median time of one call, each on the next of the operands in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(*operands[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept until the capture ends, so that each call writes to memory of its own.
        results = [call(*arguments) for arguments in operands]
    del results
    times = []
    for index in range(70):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        if index >= 10:
            times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times) / len(operands)


def cycle(make: Callable[[], tuple], size: int) -> list[tuple]:
    """Return copies of the operands of a call that moves `size` bytes: enough to leave the cache, at most 64."""
    return [make() for _ in range(max(2, min(64, -(-CYCLE_BYTES // size))))]


def normal(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


class Work:
    """One kernel at one shape: how to make its operands, the bytes it must move, and what competes."""

    def __init__(self, name: str, make: Callable[[], tuple], size: int, calls: dict[str, Call], tiles: Call) -> None:
        self.name, self.make, self.size, self.calls, self.tiles = name, make, size, calls, tiles


def merge_work(out: int, inn: int, rank: int) -> Work:
    import bitsandbytes.functional as functional

    from lora_adapters.ops import kernels
    from lora_adapters.ops.kernels import dequant_merge as module

    def make() -> tuple:
        packed, state = functional.quantize_4bit(
            normal(out, inn), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        return packed, state, normal(rank, inn), normal(out, rank)

    def ours(packed, state, a, b):
        nested = (state.state2.absmax, state.state2.code, state.offset)
        return kernels.dequantize_merge(
            packed, state.absmax, state.code, nested, 64, "nf4", (out, inn), a, b, 0.5, BF16
        )

    def only_dequantize(packed, state, a, b):
        return functional.dequantize_4bit(packed, state)

    def dequantize_addmm(packed, state, a, b):
        return torch.addmm(functional.dequantize_4bit(packed, state), b, a, alpha=0.5)

    def tiles() -> Iterable[tuple[Any, Call]]:
        usual = module.choose_tile(rank, False, (9, 0))
        for rows, cols, warps in [(32, 128, 4), (32, 128, 8), (16, 128, 4), (64, 128, 4), (64, 128, 8), (32, 256, 8)]:
            for programs in (2, 3, 4, 6, 8, 1 << 20):
                tile = usual._replace(rows=rows, cols=cols, warps=warps, programs=programs)

                def run(packed, state, a, b, tile=tile):
                    second = state.state2
                    statistics_ = (state.absmax, state.code, second.absmax, second.code, state.offset)
                    return module.launch(packed, *statistics_, 64, out, inn, a, b, 0.5, BF16, tile=tile)

                yield tile, run

    size = out * inn // 2 + out * inn // 64 + 2 * out * inn + 2 * rank * (out + inn)
    calls = {"ours": ours, "bnb dequantize only": only_dequantize, "bnb + addmm": dequantize_addmm}
    calls["fill"] = lambda *_: torch.zeros(out, inn, dtype=BF16, device="cuda")
    return Work("dequantize_merge", make, size, calls, tiles)


def lowrank_works(tokens: int, inn: int, out: int, rank: int) -> list[Work]:
    from lora_adapters.ops import kernels
    from lora_adapters.ops.kernels import lowrank as module

    ranks = min(64, max(16, rank))

    def down_tiles():
        for rows, cols, warps, stages in [(64, 128, 4, 4), (64, 64, 4, 4), (32, 128, 4, 4), (128, 64, 8, 4)]:
            for parts in (1, 2, 4):
                tile = module.Tile(rows, cols, ranks, parts, warps, stages)
                yield tile, lambda x, a, tile=tile: module.launch_down(x, a, 1.0, F32, tile=tile)

    def up_tiles():
        for rows, cols, warps in [(32, 128, 4), (64, 128, 4), (64, 128, 8), (64, 256, 8), (128, 128, 8), (16, 256, 4)]:
            tile = module.Tile(rows, cols, min(32, ranks), 1, warps, 1)
            yield tile, lambda h, b, tile=tile: module.launch_up(h, b, None, 0.5, BF16, tile=tile)

    def up_grads_tiles():
        for rows, cols, warps, stages in [(64, 128, 4, 4), (64, 256, 4, 4), (64, 256, 4, 3), (64, 256, 8, 3)]:
            for parts in sorted({max(1, int(n * 132 * cols / out)) for n in (1, 1.5, 2, 3)}):
                if rank <= module.FUSED_RANK:
                    tile = module.Tile(rows, cols, max(16, rank), parts, warps, stages)
                    yield tile, lambda dy, h, b, tile=tile: module.launch_up_grads(dy, h, b, 0.5, tile=tile)

    def grad_tiles():
        for rows, cols, warps, stages in [(64, 128, 4, 4), (64, 64, 4, 3), (128, 64, 4, 3), (64, 128, 8, 3)]:
            for parts in sorted({max(1, int(n * 132 * cols / inn)) for n in (1, 2, 4)}):
                tile = module.Tile(rows, cols, ranks, parts, warps, stages)
                yield tile, lambda dh, x, tile=tile: module.launch_down_grad(dh, x, tile=tile)

    def up_grads(dtype: torch.dtype) -> Work:
        return Work(
            f"up_grads, {str(dtype).removeprefix('torch.')} factors",
            lambda: (normal(tokens, out), normal(tokens, rank, dtype=dtype), normal(out, rank, dtype=dtype)),
            2 * tokens * out + dtype.itemsize * (2 * tokens * rank + out * rank) + 4 * out * rank,
            {
                "ours": lambda dy, h, b: kernels.up_grads(dy, h, b, 0.5),
                "torch.mm": lambda dy, h, b: (torch.mm(dy.to(dtype), b), torch.mm(h.t(), dy.to(dtype))),
            },
            up_grads_tiles,
        )

    return [
        Work(
            "down",
            lambda: (normal(tokens, inn), normal(rank, inn, dtype=F32)),
            2 * tokens * inn + 4 * (rank * inn + tokens * rank),
            {"ours": lambda x, a: kernels.down(x, a, F32), "torch.mm": lambda x, a: torch.mm(x.float(), a.t())},
            down_tiles,
        ),
        Work(
            "up",
            lambda: (normal(tokens, rank, dtype=F32), normal(out, rank, dtype=F32)),
            2 * tokens * out + 4 * (tokens * rank + out * rank),
            {
                "ours": lambda h, b: kernels.up(h, b, None, BF16, 0.5),
                "torch.mm": lambda h, b: torch.mm(h, b.t()).to(BF16),
                "fill": lambda *_: torch.zeros(tokens, out, dtype=BF16, device="cuda"),
            },
            up_tiles,
        ),
        up_grads(F32),
        up_grads(BF16),
        Work(
            "down_grad",
            lambda: (normal(tokens, rank, dtype=F32), normal(tokens, inn)),
            2 * tokens * inn + 4 * (tokens * rank + rank * inn),
            {"ours": kernels.down_grad, "torch.mm": lambda dh, x: torch.mm(dh.t(), x.float())},
            grad_tiles,
        ),
    ]


def copy_speed() -> float:
    """Return the GB/s of a large copy, reading and writing counted."""
    source = torch.empty(CYCLE_BYTES, dtype=torch.uint8, device="cuda")
    return 2 * CYCLE_BYTES / milliseconds(lambda x: x.clone(), [(source,)]) / 1e6


def measure(work: Work, tune: bool, shape: str) -> None:
    operands = cycle(work.make, work.size)
    times = {method: milliseconds(call, operands) for method, call in work.calls.items()}
    if tune:
        tried = {}
        for tile, call in work.tiles():
            try:
                tried[str(tuple(tile))] = milliseconds(call, operands)
            except Exception as error:  # a tile may need more registers or shared memory than there are
                print(f"{work.name} {tuple(tile)}: {type(error).__name__}: {error}", file=sys.stderr)
        times |= dict(sorted(tried.items(), key=lambda entry: entry[1])[:4])
    for method, ms in times.items():
        row = (work.name, shape, method, f"{ms:.4f}", f"{work.size / ms / 1e6:.0f}", f"{ms / times['ours']:.2f}")
        print(f"| {' | '.join(row)} |", flush=True)


def launch_microseconds(call: Call, arguments: tuple) -> float:
    """Return Python's time to launch a call that is so small that the GPU does not keep it waiting."""
    for _ in range(20):
        call(*arguments)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(200):
        call(*arguments)
    return (time.perf_counter() - begin) / 200 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--only", nargs="+", help="names of kernels, default all")
    parser.add_argument("--shapes", type=int, nargs="+", help="places in the list of shapes, default all")
    parser.add_argument("--tune", action="store_true", help="time other tiles too")
    options = parser.parse_args()

    from lora_adapters.ops import kernels

    if not torch.cuda.is_available() or not kernels.available(torch.device("cuda")):
        print("The kernels need a CUDA device of compute capability 7.5 or more, and triton. Nothing was measured.")
        return
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy_speed():.0f} GB/s\n")
    print("| kernel | tokens, in, out, rank | method | ms | GB/s | time / ours |")
    print("|---|---|---|---|---|---|")
    for place, (tokens, inn, out) in enumerate(SHAPES):
        if options.shapes is not None and place not in options.shapes:
            continue
        for rank in options.rank:
            for work in [merge_work(out, inn, rank), *lowrank_works(tokens, inn, out, rank)]:
                if not options.only or work.name in options.only:
                    measure(work, options.tune, f"{tokens}, {inn}, {out}, {rank}")
    print("\n| kernel at 64, 256, 256, 16 | method | microseconds of Python for a call |")
    print("|---|---|---|")
    for work in [merge_work(256, 256, 16), *lowrank_works(64, 256, 256, 16)]:
        for method, call in work.calls.items():
            print(f"| {work.name} | {method} | {launch_microseconds(call, work.make()):.0f} |")


if __name__ == "__main__":
    main()

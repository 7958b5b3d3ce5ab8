"""Each Triton kernel beside what people use for the same work, on one GPU.

    python benchmarks/kernels.py [--rank 16 64] [--tune]

dequantize_merge stands against bitsandbytes' dequantize_4bit followed by torch.addmm; the skinny products stand against
torch.mm. Operands are bf16, the packed weight is NF4 with nested statistics. A row's GB/s count each operand and result
once, whatever a method really moves; `copy` is what torch reaches on this GPU with a large copy.

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
BF16 = torch.bfloat16
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


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


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
        for rows, cols, warps, stages in [
            *((32, 128, 4, s) for s in (1, 2)),
            *((rows, cols, 4, 2) for rows, cols in [(16, 128), (64, 128), (16, 256), (32, 256), (64, 64)]),
            *((rows, cols, 8, 2) for rows, cols in [(32, 256), (64, 128), (64, 256), (128, 128)]),
        ]:
            for ranks in {16, 32, 64} if rank > 32 else {max(16, rank)}:
                tile = module.Tile(rows, cols, ranks, warps, stages)

                def run(packed, state, a, b, tile=tile):
                    second = state.state2
                    statistics_ = (state.absmax, state.code, second.absmax, second.code, state.offset)
                    return module.launch(packed, *statistics_, 64, out, inn, a, b, 0.5, BF16, tile=tile)

                yield tile, run

    size = out * inn // 2 + out * inn // 64 + 2 * out * inn + 2 * rank * (out + inn)
    calls = {"ours": ours, "bnb dequantize only": only_dequantize, "bnb + addmm": dequantize_addmm}
    return Work("dequantize_merge", make, size, calls, tiles)


def lowrank_works(tokens: int, inn: int, out: int, rank: int) -> list[Work]:
    from lora_adapters.ops import kernels
    from lora_adapters.ops.kernels import lowrank as module

    def down_tiles():
        for rows, cols, parts, warps, stages in [
            *((rows, cols, 1, 4, stages) for rows in (16, 32, 64) for cols in (128, 256) for stages in (3, 4)),
            *((rows, 128, parts, 4, 4) for rows in (32, 64, 128) for parts in (2, 4)),
            *((64, 128, parts, 8, 4) for parts in (1, 2, 4)),
        ]:
            tile = module.Tile(rows, cols, min(64, max(16, rank)), parts, warps, stages)
            yield tile, lambda x, a, tile=tile: module.launch_down(x, a, 1.0, BF16, tile=tile)

    def up_tiles():
        for rows, cols, warps, stages in [
            *((rows, cols, 4, 4) for rows in (32, 64) for cols in (128, 256)),
            *((rows, cols, 8, 3) for rows in (32, 64) for cols in (256, 512)),
        ]:
            across = -(-out // cols)
            for parts in sorted({max(1, n * 132 // across) for n in (1, 2, 3, 4)}):
                if rank <= module.FUSED_RANK:
                    tile = module.Tile(rows, cols, max(16, rank), parts, warps, stages)
                    yield tile, lambda dy, h, b, tile=tile: module.launch_up_grads(dy, h, b, 0.5, tile=tile)

    def grad_tiles():
        for rows, cols, warps, stages in [
            *((rows, cols, 4, stages) for rows in (32, 64, 128) for cols in (64, 128) for stages in (3, 4)),
            *((rows, 256, 8, 3) for rows in (32, 64)),
        ]:
            across = -(-inn // cols)
            for parts in sorted({max(1, n * 132 // across) for n in (1, 2, 4)}):
                tile = module.Tile(rows, cols, min(64, max(16, rank)), parts, warps, stages)
                yield tile, lambda dh, x, tile=tile: module.launch_down_grad(dh, x, tile=tile)

    return [
        Work(
            "down",
            lambda: (normal(tokens, inn), normal(rank, inn)),
            2 * (tokens * inn + rank * inn + tokens * rank),
            {"ours": lambda x, a: kernels.down(x, a, BF16), "torch.mm": lambda x, a: torch.mm(x, a.t())},
            down_tiles,
        ),
        Work(
            "up_grads",
            lambda: (normal(tokens, out), normal(tokens, rank), normal(out, rank)),
            2 * (tokens * out + 2 * tokens * rank + out * rank) + 4 * out * rank,
            {
                "ours": lambda dy, h, b: kernels.up_grads(dy, h, b, 0.5),
                "torch.mm": lambda dy, h, b: (torch.mm(dy, b), torch.mm(dy.t(), h)),
            },
            up_tiles,
        ),
        Work(
            "down_grad",
            lambda: (normal(tokens, rank), normal(tokens, inn)),
            2 * (tokens * inn + tokens * rank) + 4 * rank * inn,
            {"ours": kernels.down_grad, "torch.mm": lambda dh, x: torch.mm(dh.t(), x)},
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

"""Peak memory and time of loading a denoiser in NF4: layer by layer while it is read, or dense first.

    python benchmarks/pipeline_loading.py [--models sd1.5] [--device cpu] [--folder KEPT] [--json]

Random weights in fp16 are written to a folder, which each way then loads in a process of its own. "anonymous" is memory that
the process can't give back, "mapped" the file's pages that it has touched and the system may drop. The first way may find
the file in no cache: seconds are for orientation. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from image_weights import DENOISERS, build
from interleaved import table

WAYS = ("layer by layer", "dense first")


def write(name: str, folder: Path) -> None:
    """Write a model with random weights, unless it is there already."""
    if (folder / "config.json").is_file():
        return
    model = build(name).to(torch.float16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder)


class Peak:
    """Highest anonymous and file-backed resident bytes of this process, above what it began with."""

    def __init__(self) -> None:
        self.base, self.anonymous, self.mapped, self._on = self._now(), 0, 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> tuple[int, int]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(1024 * int(lines[key].split()[0]) for key in ("RssAnon", "RssFile"))  # type: ignore[return-value]

    def _watch(self) -> None:
        while self._on:
            anonymous, mapped = self._now()
            self.anonymous = max(self.anonymous, anonymous - self.base[0])
            self.mapped = max(self.mapped, mapped - self.base[1])
            time.sleep(0.002)

    def stop(self) -> None:
        self._on = False
        self._thread.join()


def measure(folder: str, way: str, device: str, dtype: str) -> dict[str, Any]:
    """Load a folder in this process."""
    # What is imported, and made at the first call, is no memory of the load.
    import diffusers
    import lora_adapters_diffusers.layerwise  # noqa: F401
    from lora_adapters_diffusers.loading import quantize

    import lora_adapters

    diffusers.UNet2DConditionModel  # noqa: B018  (imported when it is asked for)
    quantize(diffusers.SD3Transformer2DModel(num_layers=1), "nf4")
    if device != "cpu":
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    settings: dict[str, Any] = dict(backend="diffusers", dtype=dtype, device=device)
    peak, begun = Peak(), time.perf_counter()
    if way == "layer by layer":
        lora_adapters.load(folder, quantization="nf4", **settings)
    else:
        quantize(lora_adapters.load(folder, **settings), "nf4")
    seconds = time.perf_counter() - begun
    peak.stop()
    found = {"anonymous, MB": peak.anonymous / 1e6, "mapped, MB": peak.mapped / 1e6, "s": seconds}
    if device != "cpu":
        found["device, MB"] = torch.cuda.max_memory_allocated() / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sd1.5"], choices=list(DENOISERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="bfloat16", help="what is computed in; a cast takes memory, except in 4 bits"
    )
    parser.add_argument("--folder", help="where to keep the weights; a temporary one by default")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child, args.device, args.dtype)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models:
            folder = Path(args.folder or temporary) / name
            write(name, folder)
            for way in WAYS:
                command = [
                    sys.executable,
                    __file__,
                    "--device",
                    args.device,
                    "--dtype",
                    args.dtype,
                    "--child",
                    str(folder),
                    way,
                ]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rows.append({"model": name, "way": way} | json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps(rows, indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()

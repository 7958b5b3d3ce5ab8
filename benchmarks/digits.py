"""Accuracy on new images: LoRA on fp32 and NF4 bases against full fine-tuning, a small ViT and a small ResNet, 5 seeds.

    python benchmarks/digits.py [--families vit resnet] [--seeds 5] [--json]

Each seed pretrains a model on half of scikit-learn's digits and adapts it to the other half (`lora_adapters.cli.demo_images`
has the task and the settings). One seed is good to about half a point (358 held-out images); compare the means.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from statistics import mean
from typing import Any

from interleaved import table

from lora_adapters.cli.demo_images import SETTINGS, ImageResult, run_images

_SHARES = ("pretraining_accuracy", "before_accuracy", "lora_accuracy", "nf4_accuracy", "full_accuracy", "trained_share")


def row(name: str, results: list[ImageResult]) -> dict[str, Any]:
    """Return the means of some results in percent, and how many points full fine-tuning is ahead."""
    means = {key: 100 * mean(getattr(result, key) for result in results) for key in _SHARES}
    return {
        "model": name,
        "before %": means["before_accuracy"],
        "LoRA %": means["lora_accuracy"],
        "LoRA on NF4 %": means["nf4_accuracy"],
        "full %": means["full_accuracy"],
        "full - LoRA": means["full_accuracy"] - means["lora_accuracy"],
        "fp32 - NF4": means["lora_accuracy"] - means["nf4_accuracy"],
        "trained %": means["trained_share"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON list of all results instead of the table")
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    rows, found = [], []
    for family in args.families:
        results = []
        for seed in range(args.seeds):
            results.append(run_images(SETTINGS[family](seed=seed)))
            rows.append(row(f"{family}, seed {seed}", results[-1:]))
            if not args.json:
                print(table(rows[-1:]).splitlines()[-1], flush=True)
        found += results
        rows.append(row(f"{family}, mean", results))
    print(json.dumps([asdict(result) for result in found], indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()

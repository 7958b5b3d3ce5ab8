"""Held-out accuracy of LoRA on an NF4 base against full fine-tuning in fp32: the demo's first part over three seeds.

python benchmarks/accuracy.py [seeds]        about a minute and a half a seed on 2 CPU cores
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import mean

from lora_adapters.cli.demo_classification import ClassificationSettings, run_classification


def main(seeds: int = 3) -> None:
    """Print each seed's accuracies and their means."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            result = run_classification(Path(folder), ClassificationSettings(seed=seed))
        rows.append((result.lora_accuracy, result.full_accuracy))
        print(f"seed {seed}: LoRA on NF4 {rows[-1][0]:.1%}, full fine-tuning in fp32 {rows[-1][1]:.1%}", flush=True)
    lora, full = (mean(column) for column in zip(*rows, strict=True))
    print(f"mean: LoRA on NF4 {lora:.1%}, full {full:.1%}; {100 * (full - lora):+.1f} points apart")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

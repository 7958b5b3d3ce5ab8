"""DreamBooth teaches a new subject and keeps its class: the demo's diffusion part on several seeds, each with its own base.

    python benchmarks/dreambooth_subject.py [--seeds 3] [--digits 9] [--json]

Each seed pretrains a small Stable Diffusion on nine of scikit-learn's ten digits and teaches it the tenth from 8 images,
with and without prior preservation (`lora_adapters_diffusers.demo` has the task and the settings). A classifier of real
images says what samples show. A share of 64 samples is good to about 4 points where it is 90 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from interleaved import table
from lora_adapters_diffusers.demo.base import BaseSettings
from lora_adapters_diffusers.demo.subject import SubjectResult, SubjectSettings, run_subject


def row(name: str, results: list[SubjectResult]) -> dict[str, Any]:
    """Return the means of some results: shares of samples in percent, and effective numbers of digits."""

    def means(attribute: str, factor: float = 1) -> tuple[float, ...]:
        return tuple(
            factor * mean(getattr(r, attribute)[state] for r in results)
            for state in ("before", "with prior", "without")
        )

    subject, drift, varied = means("subject", 100), means("class_is_subject", 100), means("class_variety")
    return {
        "unseen, seed": name,
        "subject before %": subject[0],
        "with prior %": subject[1],
        "without %": subject[2],
        "digits of class before": varied[0],
        "digits with prior": varied[1],
        "digits without": varied[2],
        "class is subject before %": drift[0],
        "is, with prior %": drift[1],
        "is, without %": drift[2],
        "judge %": 100 * mean(r.judge_accuracy for r in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--digits", type=int, nargs="+", default=[9], help="which digits are the new subject, one at a time"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list of all results instead of the table")
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    rows, found = [], []
    for digit in args.digits:
        results = []
        for seed in range(args.seeds):
            settings = SubjectSettings(base=BaseSettings(unseen=digit, seed=seed), seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                results.append(run_subject(Path(folder), settings))
            rows.append(row(f"{digit}, {seed}", results[-1:]))
            if not args.json:
                print(table(rows[-1:]).splitlines()[-1], flush=True)
        found += results
        rows.append(row(f"{digit}, mean", results))
    print(json.dumps([asdict(result) for result in found], indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()

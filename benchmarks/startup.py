"""Start-up: what a person waits before anything happens.

    python benchmarks/startup.py

Each command runs in a process of its own; medians of 7. The peer is importing peft, which a script that uses PEFT pays.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "an empty Python process": ["-c", "pass"],
    "import lora_adapters": ["-c", "import lora_adapters"],
    "lora-adapters --help": ["-c", "from lora_adapters.cli import main; import sys; sys.argv[1:] = ['--help']; main()"],
    "lora-adapters plugins": ["-c", "from lora_adapters.cli import main; import sys; sys.argv[1:]=['plugins']; main()"],
    "import torch": ["-c", "import torch"],
    "import peft": ["-c", "import peft"],
}


def main() -> None:
    print("| command | median s | of importing peft |")
    print("|---|---|---|")
    rows = {}
    for title, arguments in COMMANDS.items():
        times = []
        for _ in range(8):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
        rows[title] = statistics.median(times[1:])
    for title, value in rows.items():
        print(f"| {title} | {value:.2f} | {value / rows['import peft']:.3f} |")


if __name__ == "__main__":
    main()

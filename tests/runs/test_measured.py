"""The peak of memory that a run reports: it grows by what a tensor took, and begins anew."""

import subprocess
import sys

import pytest
import torch

from lora_adapters.runs import measured

MIB = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the high-water mark can't be reset")
def test_the_peak_is_what_tensors_took_and_begins_anew():
    """In a process of its own: other tests' peaks and freed memory would blur it."""
    code = """
import torch
from lora_adapters.runs.measured import PeakMemory, now
device = torch.device("cpu")
torch.ones(2**20).sum()  # what a first operation loads
first = PeakMemory(device)
tensor = torch.ones(64 * 2**20 // 4)
held = now(device) - first.before
del tensor
one = first.read()
second = PeakMemory(device)
smaller = torch.ones(16 * 2**20 // 4)
two = second.read()
print(held, one["peak"] - one["before"], two["peak"] - two["before"], now(device) <= two["peak"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held, one, two, within = done.stdout.split()
    assert int(held) == pytest.approx(64 * MIB, abs=2 * MIB)
    assert int(one) == pytest.approx(64 * MIB, abs=2 * MIB)
    assert int(two) == pytest.approx(16 * MIB, abs=2 * MIB)
    assert within == "True"


def test_without_proc_the_highest_of_the_process_is_taken(monkeypatch, tmp_path):
    """As on macOS: never less than what is in use."""
    monkeypatch.setattr(measured, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(measured, "_CLEAR", tmp_path / "nowhere" / "none")
    memory = measured.PeakMemory(torch.device("cpu"))
    assert memory.read()["peak"] >= measured.now(torch.device("cpu")) // 2
    assert memory.read()["before"] == memory.before > 0

"""Attaching: ours against PEFT's two modes, in one run.

    python benchmarks/attach.py

A 70B Llama shape on the meta device (80 layers, 560 targets), and a model with real weights on the CPU. PEFT's faster
mode is low_cpu_mem_usage=True, which leaves the adapter on the meta device; ours is initialised. Medians of 5.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lora_adapters

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(device: str, **shape: int) -> LlamaForCausalLM:
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**shape))


def seconds(make, attach, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        model = make()
        gc.collect()
        start = time.perf_counter()
        attach(model)
        times.append(time.perf_counter() - start)
        del model
    return statistics.median(times[1:])


def peft(low: bool):
    return lambda model: get_peft_model(model, LoraConfig(r=16, target_modules=TARGETS), low_cpu_mem_usage=low)


def measure(title: str, make) -> None:
    ours = seconds(make, lambda model: lora_adapters.attach(model, rank=16, targets=TARGETS))
    slow, fast = seconds(make, peft(False)), seconds(make, peft(True))
    print(
        f"| {title} | {slow * 1000:.0f} | {fast * 1000:.0f} | {ours * 1000:.0f} | {ours / min(slow, fast):.2f} |",
        flush=True,
    )


def main() -> None:
    warnings.simplefilter("ignore")
    print("| model | PEFT ms | PEFT low_cpu_mem_usage ms | ours ms | ours / PEFT's faster |")
    print("|---|---|---|---|---|")
    shape = dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    measure("70B shape, meta device, 560 targets", lambda: llama("meta", **shape, vocab_size=128256))
    shape = dict(
        hidden_size=256, intermediate_size=704, num_hidden_layers=28, num_attention_heads=8, num_key_value_heads=4
    )
    measure("28 layers, CPU weights, 196 targets", lambda: llama("cpu", **shape, vocab_size=1000))


if __name__ == "__main__":
    main()

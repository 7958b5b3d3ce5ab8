"""After `merge(unload=True)` a model is as fast as its base, because it has the base's own modules.

    python benchmarks/merge.py

Forward latency of the base, with the adapter, merged, and merged and unloaded, in turn within one run; the ratio is the
median over rounds of (this forward / the base's forward of the same round).
"""

from __future__ import annotations

import copy
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_adapters


def latency(model, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        model(input_ids=ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, vocab_size=1000
        )
    ).to(device)
    base.eval()
    adapted, merged, unloaded = (copy.deepcopy(base) for _ in range(3))
    lora_adapters.attach(adapted, rank=16)
    lora_adapters.attach(merged, rank=16).merge()
    lora_adapters.attach(unloaded, rank=16).merge(unload=True)
    models = {"base": base, "adapter attached": adapted, "merge()": merged, "merge(unload=True)": unloaded}
    ids = torch.randint(0, 1000, (1, 128), device=device)
    rounds = [{name: latency(model, ids) for name, model in models.items()} for _ in range(60)][10:]
    print(f"| model ({device}) | median ms | ratio to the base |")
    print("|---|---|---|")
    for name in models:
        median = statistics.median(r[name] for r in rounds)
        ratio = statistics.median(r[name] / r["base"] for r in rounds)
        print(f"| {name} | {median * 1000:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()

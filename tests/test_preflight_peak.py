"""The host memory that transformers' loading really takes, in a process of its own, against what was predicted."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_adapters.preflight import LIBRARY_BYTES, check_load
from lora_adapters.quantized import quantized_layers

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc/self/status (Linux)")

#: Loads, then touches every weight as training would. Memory counted: what the system can't take back (RssAnon) at its
#: highest, plus file pages that are still mapped and touched at the end.
SCRIPT = """
import json, sys, threading, time
import torch, bitsandbytes, transformers.models.llama.modeling_llama, transformers.integrations.bitsandbytes
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

folder, dtype, quantization = sys.argv[1:]

def resident():
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["RssAnon"].split()[0]) * 1024, int(lines["RssFile"].split()[0]) * 1024

anonymous, files = resident()
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, resident()[0])
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
options = {}
if quantization != "none":
    options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map={"": "cpu"}, **options)
for parameter in model.parameters():
    parameter.view(torch.uint8).flatten()[::1024].sum()
done.set()
watcher.join()
mapped = sum(p.nbytes for p in model.parameters()) - (resident()[0] - anonymous)
print(json.dumps({"peak": peak - anonymous + (resident()[1] - files if mapped > 0 else 0)}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=10, num_attention_heads=8, intermediate_size=2048, vocab_size=2000
    )
    model = LlamaForCausalLM(config)  # 295 MB
    root = tmp_path_factory.mktemp("llama")
    model.save_pretrained(root / "one")
    model.save_pretrained(root / "shards", max_shard_size="40MB")
    return root


def measure(folder, dtype, quantization) -> int:
    # glibc keeps freed memory for itself as it likes; a fixed threshold makes it give back what is freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), dtype, quantization]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])["peak"]


@pytest.mark.parametrize(
    "layout, dtype, quantization",
    [
        ("one", "float32", "none"),
        ("shards", "bfloat16", "none"),
        ("one", "bfloat16", "nf4"),
    ],
)
def test_peak_host_memory_is_as_predicted(folders, layout, dtype, quantization):
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folders / layout))
    formats = quantized_layers(skeleton, quantization) if quantization != "none" else {}
    folder = folders / layout
    need = check_load(
        skeleton,
        formats,
        name=str(folder),
        revision=None,
        dtype=getattr(torch, dtype),
        device="cpu",
        free=lambda _: 1 << 40,
    )
    measured = measure(folder, dtype, quantization)
    # The model is small: what libraries take at most counts against the 10 % beside it.
    assert measured <= need.host_peak <= 1.1 * measured + LIBRARY_BYTES, (measured, need)

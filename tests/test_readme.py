"""The README's snippets run as they stand, but for the names of models and files and the number of steps."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

README = Path(__file__).parent.parent / "README.md"


def run(importing, changes, namespace):
    """Run the snippet with that line after replacing texts, each of which it must hold; return its names."""
    (code,) = [
        b for b in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S) if importing in b
    ]
    for old, new in changes.items():
        assert old in code, f"The README no longer says {old!r}."
        code = code.replace(old, new)
    exec(compile(code, "README.md", "exec"), namespace)
    return namespace


def test_trainer(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = torch.arange(8)
    given = {
        "model": LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)),
        "args": TrainingArguments("run", max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True),
        "data": [{"input_ids": tokens, "labels": tokens}] * 4,
        "Trainer": Trainer,
    }
    found = run("import LoraCallback", {}, given)
    assert found["trainer"].state.global_step == 2
    assert any(p.abs().sum() > 0 for n, p in found["lora"].model.named_parameters() if "lora_B" in n)


def test_timm(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    changes = {"vit_base_patch16_224": "test_vit", '"nf4", pretrained=True': '"nf4", pretrained=False'}
    found = run("import TimmLoraModel", changes, {"timm": timm})
    images = torch.randn(1, 3, 160, 160)
    merged = timm.create_model("local-dir:merged", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(images), found["model"].eval()(images), rtol=1e-3, atol=1e-4)
    assert len({group["lr_scale"] for group in found["optimizer"].param_groups}) > 1


def test_diffusers(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("diffusers")
    from lora_adapters_diffusers import LoraPipeline

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_ADAPTERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "diffusers"))
    tiny = importlib.import_module("pipelines")
    other = LoraPipeline(tiny.build("sd"))
    other.attach(rank=2)
    other.save("from-civitai.safetensors", format="kohya")
    Path("photos/dog").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(noise.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(f"photos/dog/{i}.png")
    few = 'steps=2, resolution=64, samples={"count": 0}, prior={"images": 2, "steps": 1}'
    changes = {"steps=500": few, 'on the moon"': 'on the moon", num_inference_steps=1, height=32, width=32'}
    found = run("lora.dreambooth(", changes, {"pipe": tiny.build("sd")})
    assert found["lora"].adapters["unet"] == ["b", "default"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["pytorch_lora_weights.safetensors"]
    assert isinstance(found["image"], Image.Image)

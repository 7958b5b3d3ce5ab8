"""What lora-adapters has to know about the framework. The target map does the work; this fills in the rest."""

import json
from pathlib import Path

import torch

from lora_adapters.errors import RequestError
from lora_adapters.targets import classify_by_patterns

from .models import Mixer


class MixerBackend:
    name = "mixer"

    def family(self, model):
        return type(model).__name__

    def classify(self, info, maps):
        return classify_by_patterns(info, maps)

    def task_type(self, model):
        return None  # PEFT has no task type for image classifiers; its plain PeftModel serves

    def heads_to_train(self, model):
        return ("classifier",) if model.new_classifier else ()

    def example_inputs(self, model, batch_size, sequence_length, device):
        size = (batch_size, model.settings["patches"], model.settings["values"])
        labels = torch.zeros(batch_size, dtype=torch.long, device=device)
        return {"images": torch.randn(size, device=device), "labels": labels}

    def can_load(self, name, revision=None):
        return Path(name, "mixer.json").is_file()

    def skeleton(self, name, *, dtype, revision, trust_remote_code, **options):
        """What `load` loads, without its weights: recipes are planned with it before anything is read."""
        self._check(name, None, options)
        with torch.device("meta"):
            model = Mixer(**json.loads(Path(name, "mixer.json").read_text()))
        return model if dtype == "auto" else model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def load(self, name, *, quantization, dtype, device, revision, trust_remote_code, **options):
        self._check(name, quantization, options)
        model = Mixer.load(name)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        return model.to(device=device, dtype=None if dtype == "auto" else dtype)

    def _check(self, name, quantization, options):
        if not self.can_load(name):
            raise RequestError(f"{str(name)!r} is no folder written by Mixer.save: it holds no mixer.json.")
        if quantization is not None or options:
            asked = ", ".join(["quantization"] * (quantization is not None) + sorted(options))
            raise RequestError(f"Mixer models load dense, without {asked}; attach(model, quantization=...) quantizes.")

"""The contracts of lora_adapters.testing: all that a plugin has to prove."""

import numpy as np
import torch
from lora_adapters_example.backend import MixerBackend
from lora_adapters_example.int4 import Int4Rows
from lora_adapters_example.models import Mixer
from sklearn.datasets import load_digits

from lora_adapters.testing import BackendContract, QuantizerContract, TrainerContract


class TestMixer(BackendContract):
    def make_backend(self):
        return MixerBackend()

    def make_model(self):
        return Mixer()


class TestMixerWithANewClassifier(TestMixer):
    def make_model(self):
        model = Mixer()
        model.replace_classifier(3)
        return model


class TestInt4Rows(QuantizerContract):
    max_relative_error = 1 / 14 + 1 / 256

    def make_quantizer(self):
        return Int4Rows()


class TestMixerClassification(TrainerContract):
    def make_recipe(self, folder):
        torch.manual_seed(0)
        Mixer(patches=16, values=4, classes=3).save(folder)
        digits = load_digits()
        np.savez(folder / "digits.npz", images=digits.images[:180], labels=digits.target[:180])
        return {
            "task": "mixer-classification",
            "model": {"name": str(folder), "device": "cpu", "quantization": "int4-rows"},
            "adapter": {"rank": 4, "dropout": 0.1},
            "data": {"train": str(folder / "digits.npz"), "eval_fraction": 0.2},
            "training": {"epochs": 3.5, "batch_size": 8, "gradient_accumulation": 2, "learning_rate": 1e-2},
        }

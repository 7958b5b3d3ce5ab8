"""The contracts of lora_adapters.testing: all that a plugin has to prove."""

from lora_adapters_example.backend import MixerBackend
from lora_adapters_example.int4 import Int4Rows
from lora_adapters_example.models import Mixer

from lora_adapters.testing import BackendContract, QuantizerContract


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

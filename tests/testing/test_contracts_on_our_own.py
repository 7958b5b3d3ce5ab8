"""The built-in quantizers, the generic backend and a task of transformers keep the contracts that plugins are held to."""

import pytest
from bases import llama_base, sums, write_rows

from lora_adapters.generic import GenericBackend
from lora_adapters.testing import BackendContract, QuantizerContract, TinyConv, TinyMLP, TinyText, TrainerContract

pytest.importorskip("bitsandbytes")


class GenericContract(BackendContract):
    def make_backend(self):
        return GenericBackend()

    def make_inputs(self, model, batch_size):
        return model.example_inputs(batch_size)


class TestGenericOnLinear(GenericContract):
    def make_model(self):
        return TinyMLP()


class TestGenericOnConvolutions(GenericContract):
    def make_model(self):
        return TinyConv()


class TestGenericOnText(GenericContract):
    def make_model(self):
        return TinyText()


class TestNf4(QuantizerContract):
    # Half of the widest gap between NF4's values, and the rounding of the nested maxima.
    max_relative_error = 0.17
    # The maxima are quantized themselves, around their mean: quantizing again moves them a little.
    requantize_error = 0.01

    def make_quantizer(self):
        from lora_adapters.weights import Nf4

        return Nf4()

    def load_state(self, module, state):
        if type(module).__name__ != "Linear4bit":
            return super().load_state(module, state)
        # bitsandbytes' Linear4bit can't load what it saved; this is how transformers loads it.
        statistics = {key: value for key, value in state.items() if key.startswith("weight.")}
        module.weight = type(module.weight).from_prequantized(state["weight"], statistics, device="cpu", module=module)
        module.quant_state = module.weight.quant_state
        if module.bias is not None:
            module.bias.data.copy_(state["bias"])


class TestFp4(TestNf4):
    max_relative_error = 0.19

    def make_quantizer(self):
        from lora_adapters.weights import Fp4

        return Fp4()


class TestInt8(QuantizerContract):
    max_relative_error = 0.005
    # In eval bitsandbytes quantizes the input too.
    forward_tolerance = 0.03

    def make_quantizer(self):
        from lora_adapters.weights import Int8

        return Int8()


class TestCausalLM(TrainerContract):
    def make_recipe(self, folder):
        return {
            "task": "causal-lm",
            "model": {"name": llama_base(folder / "llama"), "device": "cpu"},
            "adapter": {"rank": 4, "dropout": 0.1},
            "data": {
                "train": write_rows(folder / "qa.jsonl", sums()),
                "prompt": "question",
                "completion": "answer",
                "eval_fraction": 0.25,
            },
            "training": {
                "epochs": 4,
                "batch_size": 4,
                "gradient_accumulation": 2,
                "learning_rate": 1e-3,
                "max_length": 64,
            },
            "samples": 1,
        }

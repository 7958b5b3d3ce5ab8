"""What a plugin author tests with: contracts to subclass, and tiny models.

    from lora_adapters.testing import BackendContract, QuantizerContract, TrainerContract

    class TestMyBackend(BackendContract):
        def make_backend(self): ...
        def make_model(self): ...

The contracts need nothing but plain classes with `test_` methods: pytest runs them, and so does a loop.
"""

from .backend_contract import BackendContract
from .models import TinyConv, TinyMLP, TinyText
from .quantizer_contract import QuantizerContract
from .trainer_contract import TrainerContract

__all__ = ["BackendContract", "QuantizerContract", "TinyConv", "TinyMLP", "TinyText", "TrainerContract"]

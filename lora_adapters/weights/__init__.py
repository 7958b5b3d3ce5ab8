"""How base weights are stored: the protocols, the stores and quantizers, and the replacement of a model's modules.

Importing this package needs torch only; bitsandbytes is imported by the first quantizer or store that needs it.
"""

from .bnb import bnb_store, guard_cpu_repacking
from .bnb_quantizers import Bnb4bit, Fp4, Int8, Nf4
from .conv4bit import Conv1d4bit, Conv2d4bit
from .dense import DenseStore, dense_store, layer_kind, why_not_plain
from .marking import mark_quantized
from .quantize import BUILTIN_QUANTIZERS, quantize_module, quantize_modules, quantized_format, quantizer_for, store_for
from .store import Quantizer, WeightStore

__all__ = [
    "BUILTIN_QUANTIZERS",
    "Bnb4bit",
    "Conv1d4bit",
    "Conv2d4bit",
    "DenseStore",
    "Fp4",
    "Int8",
    "Nf4",
    "Quantizer",
    "WeightStore",
    "bnb_store",
    "dense_store",
    "guard_cpu_repacking",
    "layer_kind",
    "mark_quantized",
    "quantize_module",
    "quantize_modules",
    "quantized_format",
    "quantizer_for",
    "store_for",
    "why_not_plain",
]

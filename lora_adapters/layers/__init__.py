"""Thin subclasses of PEFT's LoRA layers: same names and state_dict keys, built directly, merged through stores.

This module imports nothing, so that planning stays light; the classes are loaded by name.
"""

from ..hooks.specs import LayerSpec

_HERE = "lora_adapters.layers"

#: The adapter layer of each base class; planning takes the first match along a module's `__mro__`.
BUILTIN_LAYERS = (
    LayerSpec("bitsandbytes.nn.modules:Linear4bit", f"{_HERE}.bnb:Linear4bit", "linear"),
    LayerSpec("bitsandbytes.nn.modules:Linear8bitLt", f"{_HERE}.bnb:Linear8bitLt", "linear"),
    LayerSpec("lora_adapters.weights.conv4bit:Conv1d4bit", f"{_HERE}.conv:Conv1d", "conv1d"),
    LayerSpec("lora_adapters.weights.conv4bit:Conv2d4bit", f"{_HERE}.conv:Conv2d", "conv2d"),
    LayerSpec("torch.nn.modules.linear:Linear", f"{_HERE}.linear:Linear", "linear"),
    LayerSpec("transformers.pytorch_utils:Conv1D", f"{_HERE}.linear:Linear", "linear"),
    LayerSpec("torch.nn.modules.conv:Conv1d", f"{_HERE}.conv:Conv1d", "conv1d"),
    LayerSpec("torch.nn.modules.conv:Conv2d", f"{_HERE}.conv:Conv2d", "conv2d"),
    LayerSpec("torch.nn.modules.sparse:Embedding", f"{_HERE}.embedding:Embedding", "embedding"),
)

#: The layer that takes the place of one above where others read its weight, or its base class has a forward of its own.
EFFECTIVE_LAYERS = {
    f"{_HERE}.linear:Linear": f"{_HERE}.effective:Linear",
    f"{_HERE}.conv:Conv1d": f"{_HERE}.effective:Conv1d",
    f"{_HERE}.conv:Conv2d": f"{_HERE}.effective:Conv2d",
    f"{_HERE}.bnb:Linear4bit": f"{_HERE}.effective_bnb:Linear4bit",
    f"{_HERE}.bnb:Linear8bitLt": f"{_HERE}.effective_bnb:Linear8bitLt",
}

"""The hooks. Listing plugins imports this module, so it must not import torch: targets are given by name."""

from lora_adapters import hookimpl
from lora_adapters.hooks.specs import BackendSpec, LayerSpec, QuantizerSpec, TargetMap, TrainerSpec

LORA_ADAPTERS_HOOK_API = 1


@hookimpl
def lora_adapters_backends():
    return [BackendSpec("mixer", ("lora_adapters_example.models",), "lora_adapters_example.backend:MixerBackend")]


@hookimpl
def lora_adapters_target_maps():
    roles = {"mlp": (r"\.(tokens|channels)\.(up|down)$",), "head": (r"^classifier$",), "other": (r"^patches$",)}
    return [TargetMap("mixer", ("Mixer",), roles, default="mlp")]


@hookimpl
def lora_adapters_quantizers():
    return [QuantizerSpec("int4-rows", 4, ("linear",), "lora_adapters_example.int4:Int4Rows")]


@hookimpl
def lora_adapters_layers():
    return [LayerSpec("lora_adapters_example.int4:Int4Linear", "lora_adapters.layers.linear:Linear", "linear")]


@hookimpl
def lora_adapters_trainers():
    return [
        TrainerSpec(
            task="mixer-classification",
            summary="A Mixer that sorts small images into classes.",
            config="lora_adapters_example.recipe:MixerRecipe",
            target="lora_adapters_example.runner:MixerRunner",
            examples="lora_adapters_example:recipes",
            requires=("numpy", "PIL"),
            extra="",
        )
    ]

"""The hook implementations. Listing them imports neither torch nor diffusers."""

from lora_adapters.hooks import hookimpl
from lora_adapters.hooks.specs import BackendSpec, TrainerSpec

LORA_ADAPTERS_HOOK_API = 1


@hookimpl
def lora_adapters_backends():
    """Serve every class that lives in diffusers."""
    return [
        BackendSpec(
            name="diffusers",
            module_prefixes=("diffusers", "diffusers_modules"),
            target="lora_adapters_diffusers.backend:DiffusersBackend",
            requires=("diffusers",),
            extra="diffusers",
        )
    ]


@hookimpl
def lora_adapters_target_maps():
    """Give the roles of diffusers' modules."""
    from .targets import TARGET_MAPS

    return list(TARGET_MAPS)


@hookimpl
def lora_adapters_attached(adapter, plan):
    """Let diffusers' own methods see the adapter."""
    if plan.backend == "diffusers":
        from .marks import mark_denoiser

        mark_denoiser(adapter)


@hookimpl
def lora_adapters_trainers():
    """Teach diffusion models a subject."""
    return [
        TrainerSpec(
            task="dreambooth",
            summary="A subject from a few images, for Stable Diffusion 1.x, 2.x, XL, 3 and Flux.1.",
            config="lora_adapters_diffusers.recipes:DreamBoothRecipe",
            target="lora_adapters_diffusers.dreambooth.runner:DreamBoothRunner",
            examples="lora_adapters_diffusers:examples",
            requires=("diffusers", "transformers", "accelerate"),
            extra="diffusers",
        )
    ]

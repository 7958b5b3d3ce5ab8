"""The hook implementations. Listing them imports neither torch nor diffusers."""

from lora_adapters.hooks import hookimpl
from lora_adapters.hooks.specs import BackendSpec

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
def lora_adapters_saving(adapter, path, metadata):
    """Say in a PEFT folder which family it is for: formats with other names need it, and layers don't always tell."""
    if adapter.plan.backend == "diffusers":
        from .families import header_entries

        metadata.update(header_entries(adapter.base))

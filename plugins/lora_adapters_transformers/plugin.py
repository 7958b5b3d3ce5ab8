"""The hook implementations. Listing them imports neither torch nor transformers."""

from lora_adapters.hooks import hookimpl
from lora_adapters.hooks.specs import BackendSpec

LORA_ADAPTERS_HOOK_API = 1


@hookimpl
def lora_adapters_backends():
    """Serve every class that lives in, or derives from, transformers."""
    return [
        BackendSpec(
            name="transformers",
            module_prefixes=("transformers", "transformers_modules"),
            target="lora_adapters_transformers.backend:TransformersBackend",
            requires=("transformers", "accelerate"),
            extra="transformers",
        )
    ]


@hookimpl
def lora_adapters_target_maps():
    """Give the roles of transformers' modules."""
    from .targets import TARGET_MAPS

    return list(TARGET_MAPS)

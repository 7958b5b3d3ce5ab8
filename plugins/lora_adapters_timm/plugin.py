"""The hook implementations. Listing them imports neither torch nor timm."""

from lora_adapters.hooks import hookimpl
from lora_adapters.hooks.specs import BackendSpec

LORA_ADAPTERS_HOOK_API = 1


@hookimpl
def lora_adapters_backends():
    """Serve every class that lives in timm."""
    return [
        BackendSpec(
            name="timm",
            module_prefixes=("timm",),
            target="lora_adapters_timm.backend:TimmBackend",
            requires=("timm",),
            extra="timm",
        )
    ]

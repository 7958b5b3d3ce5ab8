"""The hook implementations. Listing them imports neither torch nor timm."""

from lora_adapters.hooks import hookimpl
from lora_adapters.hooks.specs import BackendSpec, TrainerSpec

LORA_ADAPTERS_HOOK_API = 1


@hookimpl
def lora_adapters_backends():
    """Serve every class that lives in timm, and transformers' wrapper around them."""
    return [
        BackendSpec(
            name="timm",
            module_prefixes=("timm",),
            target="lora_adapters_timm.backend:TimmBackend",
            requires=("timm",),
            extra="timm",
        ),
        # Before the transformers backend, which takes all classes of transformers.
        BackendSpec(
            name="timm-wrapper",
            module_prefixes=("transformers.models.timm_wrapper",),
            target="lora_adapters_timm.wrapped:TimmWrapperBackend",
            requires=("timm", "transformers"),
            extra="timm",
            priority=10,
        ),
    ]


@hookimpl
def lora_adapters_saving(adapter, path, metadata):
    """Keep which timm model it is for, and how that was made."""
    if adapter.plan.backend == "timm":
        from .facts import Facts

        metadata.update(Facts.of(adapter.base).entries())


@hookimpl
def lora_adapters_trainers():
    """Train classifiers of images."""
    return [
        TrainerSpec(
            task="image-classification",
            summary="A classifier of images, on any model of timm.",
            config="lora_adapters_timm.recipes:ImageRecipe",
            target="lora_adapters_timm.training.runner:ImageRunner",
            examples="lora_adapters_timm:examples",
            requires=("timm", "accelerate"),
            extra="timm",
        )
    ]

"""The hook implementations. Listing them imports neither torch nor transformers."""

from lora_adapters.hooks import hookimpl
from lora_adapters.hooks.specs import BackendSpec, TrainerSpec

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


@hookimpl
def lora_adapters_saving(adapter, path, metadata):
    """Keep what the outputs of a trained head mean, which PEFT's files don't say."""
    # Another plugin's backend may serve a class of transformers; its config has the labels all the same.
    if adapter.plan.trained and any(c.__module__.startswith("transformers.") for c in type(adapter.base).__mro__):
        from .head_facts import to_save

        metadata.update(to_save(adapter.base))


@hookimpl
def lora_adapters_trainers():
    """Train language models, encoder-decoders, classifiers and reward models on text."""
    tasks = {
        "causal-lm": ("CausalLM", "A causal language model on text, instructions or chats."),
        "seq2seq": ("Seq2Seq", "An encoder-decoder that writes a target from a source: translation, summaries."),
        "text-classification": ("Classification", "A text classifier."),
        "reward": ("Reward", "A reward model on pairs of a better and a worse answer (TRL)."),
    }
    return [
        TrainerSpec(
            task=task,
            summary=summary,
            config=f"lora_adapters_transformers.recipes:{name}Recipe",
            target=f"lora_adapters_transformers.training.{task.replace('-', '_')}:{name}Runner",
            examples="lora_adapters_transformers:examples",
            requires=("transformers", "accelerate", "datasets", *(("trl",) if task == "reward" else ())),
            extra="train",
        )
        for task, (name, summary) in tasks.items()
    ]

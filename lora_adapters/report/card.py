"""The model card of an adapter: the README.md of its folder, in the Hub's conventions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from .html import changes
from .readable import as_number, duration, number, share, text, words, writable

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from .facts import DataFacts, RunFacts

#: Task -> how the Hub files it.
PIPELINES = {
    "causal-lm": "text-generation",
    "seq2seq": "text2text-generation",
    "text-classification": "text-classification",
    "reward": "text-classification",
    "image-classification": "image-classification",
    "dreambooth": "text-to-image",
}
#: Task -> transformers' class for the base. Other tasks are shown with `restore` alone.
_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "reward": "AutoModelForSequenceClassification",
}
_STATUS = {
    "running": "Training had not finished when this card was written.",
    "interrupted": "Training was interrupted before its end.",
    "diverged": "Training diverged; the adapter is the last one whose values were finite.",
    "failed": "Training failed before its end.",
}
#: Settings that say nothing about the result.
_NOT_TOLD = {"log_every", "save_every", "keep_checkpoints", "eval_every", "report_to", "compile", "nan"}
#: Files that data is read from; a name that ends like this is no dataset of the Hub.
_DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".arrow", ".gz", ".zst")
#: How timm's names of models on the Hub begin.
_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
#: Labels are written out in the code up to this many.
_FEW_LABELS = 20


def model_card(facts: RunFacts, files_base: str | Path | None = None) -> str:
    """Return the card as Markdown with a YAML header. No path of this machine, no sample and no row of the data is in it.

    Args:
        facts: what is known of the run.
        files_base: the folder that relative paths in the recipe start from; None is the current one. It tells a local
            folder from a name on the Hub.
    """
    folder = Path(files_base or ".")
    body = [
        f"# {_text(_title(facts, folder))}",
        _opening(facts, folder),
        _results(facts),
        _data(facts, folder),
        _hyperparameters(facts),
        _adapted(facts),
        _loading(facts, folder),
        _versions(facts),
    ]
    header = f"---\n{_header(facts, folder).to_yaml()}\n---"
    return writable("\n\n".join([header, *(part for part in body if part)]) + "\n")


# ---- header ----------------------------------------------------------------------------------------------------------


def _header(facts: RunFacts, folder: Path) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    pipeline = PIPELINES.get(facts.task)
    on_hub = {_one_line(part.source): part for part in facts.data if _is_on_hub(part.source, folder)}
    evaluated = next((part for part in facts.data if part.name == "eval"), facts.data[-1] if facts.data else None)
    results = [
        EvalResult(
            task_type=pipeline or _one_line(facts.task),
            dataset_type=_one_line(evaluated.source) if evaluated and evaluated.source in on_hub else "custom",
            dataset_name=_source_name(evaluated, folder) if evaluated else "evaluation data",
            metric_type=_one_line(name),
            metric_value=value,
            metric_name=words(_one_line(name)),
        )
        for name, raw in facts.after.items()
        if (value := as_number(raw)) is not None and math.isfinite(value)
    ]
    return ModelCardData(
        base_model=_hub_name(facts, folder),
        datasets=list(on_hub) or None,
        library_name="diffusers" if facts.task == "dreambooth" else "peft",
        pipeline_tag=pipeline,
        tags=["lora", "lora_adapters", _one_line(facts.task)],
        eval_results=results or None,
        model_name=_title(facts, folder) if results else None,
    )


# ---- body ------------------------------------------------------------------------------------------------------------


def _title(facts: RunFacts, folder: Path) -> str:
    return f"{_base_name(facts, folder).rpartition('/')[2]}-lora-{_one_line(facts.task)}"


def _opening(facts: RunFacts, folder: Path) -> str:
    name = _text(_base_name(facts, folder))
    if (hub := _hub_name(facts, folder)) is not None:
        revision = f" (revision {_text(facts.revision)})" if facts.revision else ""
        base = f"[{name}](https://huggingface.co/{hub}){revision}"
    elif facts.task == "image-classification" and _is_on_hub(facts.base, folder):
        base = f"timm's {name}"
    else:
        base = f"a model from a local folder named {name}"
    said = [f"A LoRA adapter for {base}, trained for {_text(facts.task)}."]
    if facts.trainable_parameters:
        part = share(facts.trainable_parameters, facts.total_parameters)
        said.append(f"It has {number(facts.trainable_parameters)} trained values, {part} of the model's.")
    if quantization := _recipe(facts, "model").get("quantization"):
        said.append(f"While training, the base was stored quantized ({_text(_plain(quantization))}).")
    if facts.status in _STATUS:
        done = f" {number(facts.steps)} of {number(facts.total_steps)} steps were done." if facts.total_steps else ""
        said.append(f"\n\n> **{_STATUS[facts.status]}**{done}")
    return " ".join(said).replace(" \n", "\n")


def _results(facts: RunFacts) -> str:
    found = changes(facts)
    if not found:
        return ""
    rows = [
        (words(row.name), row.before, row.after, f"{row.change} {row.relative}".strip(), row.verdict) for row in found
    ]
    return "## Results\n\n" + _table(("metric", "base", "with adapter", "change", ""), rows, right=(1, 2, 3))


def _data(facts: RunFacts, folder: Path) -> str:
    if not facts.data:
        return ""
    rows = [(part.name, _source_name(part, folder), number(part.rows)) for part in facts.data]
    return "## Data\n\n" + _table(("part", "source", "rows"), rows, right=(2,))


def _hyperparameters(facts: RunFacts) -> str:
    rows = [
        (words(name), _plain(value))
        for section in ("adapter", "training")
        for name, value in _recipe(facts, section).items()
        if value is not None and name not in _NOT_TOLD
    ]
    done = [("steps done", number(facts.steps)), ("epochs done", number(round(facts.epochs, 2)))]
    if facts.seconds:
        done.append(("training time", duration(facts.seconds)))
    if facts.skipped_steps:
        done.append(("steps skipped (gradient not finite)", number(facts.skipped_steps)))
    return "## Training\n\n" + _table(("setting", "value"), [*rows, *done])


def _adapted(facts: RunFacts) -> str:
    if not facts.adapted and not facts.trained:
        return ""
    parts = ["## What was adapted"]
    if facts.adapted:
        rows = [
            (group.role, group.name, number(group.count), number(group.rank), number(group.scale), group.base)
            for group in facts.adapted
        ]
        parts.append(_table(("role", "layers", "count", "rank", "scale", "base"), rows, right=(2, 3, 4)))
    if facts.trained:
        parts.append(f"Trained and saved whole: {', '.join(_text(name) for name in facts.trained)}.")
    return "\n\n".join(parts)


def _loading(facts: RunFacts, folder: Path) -> str:
    if facts.task == "image-classification":
        return _loading_with_timm(facts, folder)
    on_hub = _is_on_hub(facts.base, folder)
    base = facts.base if on_hub else f"path/to/{_base_name(facts, folder)}"
    where = [f"base = {_literal(base)}", 'adapter = "path/or/name/of/this/adapter"']
    source = _arguments(
        revision=facts.revision if on_hub else None,
        trust_remote_code=_recipe(facts, "model").get("trust_remote_code") or None,
    )
    if facts.task == "dreambooth":
        return _loading_with_diffusers(facts, where, source)
    ours = _arguments(
        task=facts.task if facts.task in _AUTO else None,
        **_head(facts),
        quantization=_recipe(facts, "model").get("quantization"),
    )
    parts = ["## How to load it"]
    if peft := _peft_code(facts, source):
        parts += ["With PEFT:", _code([*peft[0], "", *where, *peft[1]])]
    code = ["import lora_adapters as la", "", *where, f"model = la.load(base{source}{ours})"]
    parts.append("With lora_adapters, which checks the files against the base first:")
    parts.append(_code([*code, "la.restore(model, adapter)"]))
    return "\n\n".join(parts)


def _loading_with_diffusers(facts: RunFacts, where: list[str], source: str) -> str:
    made = [*where, f"pipe = DiffusionPipeline.from_pretrained(base{source})"]
    stock = ["from diffusers import DiffusionPipeline", "", *made, "pipe.load_lora_weights(adapter)"]
    ours = ["from diffusers import DiffusionPipeline", "from lora_adapters_diffusers import LoraPipeline", "", *made]
    ours.append("LoraPipeline(pipe).load(adapter)")
    checks = "With lora_adapters, which checks the file against the base first:"
    parts = ["## How to load it", "With diffusers:", _code(stock), checks, _code(ours)]
    if prompt := _recipe(facts, "data").get("prompt"):
        parts.append(f"It was trained on images of which was said: {_text(_one_line(prompt))}")
    return "\n\n".join(parts)


def _peft_code(facts: RunFacts, source: str) -> tuple[list[str], list[str]] | None:
    """Return imports and statements."""
    if facts.task not in _AUTO:
        return None
    auto = _AUTO[facts.task]
    labels = [_one_line(label) for label in facts.labels]
    options = _arguments(**_head(facts))
    before = []
    if labels and facts.task != "reward" and len(labels) <= _FEW_LABELS:
        before = [
            f"labels = [{', '.join(_literal(label) for label in labels)}]",
            'names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}',
        ]
        options = ", **names, ignore_mismatched_sizes=True"
    return ["from peft import PeftModel", f"from transformers import {auto}, AutoTokenizer"], [
        *before,
        f"model = {auto}.from_pretrained(base{source}{options})",
        "model = PeftModel.from_pretrained(model, adapter)",
        f"tokenizer = AutoTokenizer.from_pretrained(base{source})",
    ]


def _loading_with_timm(facts: RunFacts, folder: Path) -> str:
    model = _recipe(facts, "model")
    local = not _is_on_hub(facts.base, folder) and not facts.base.startswith(_HUB_PREFIXES)
    base = f"local-dir:path/to/{_last_part(facts.base)}" if local else facts.base
    file = model.get("checkpoint")
    overlay = {"file": f"path/to/{_last_part(file)}", "num_classes": -1} if file else None
    options = {name: model.get(name) for name in ("drop_rate", "drop_path_rate")}
    given = _arguments(num_classes=len(facts.labels) or None, pretrained_cfg_overlay=overlay, **options)
    extra = model.get("timm_kwargs") or {}
    made = f"model = timm.create_model(base, pretrained={model.get('pretrained') is not False}{given}"
    made += f", **{_literal(extra)})" if extra else ")"
    where = [f"base = {_literal(base)}", 'adapter = "path/or/name/of/this/adapter"', made]
    if facts.labels and len(facts.labels) <= _FEW_LABELS:
        where.append(f"labels = [{', '.join(_literal(label) for label in facts.labels)}]")
    peft = [
        "import timm",
        "from peft import PeftModel",
        "",
        *where,
        "model = PeftModel.from_pretrained(model, adapter)",
    ]
    ours = ["import timm", "", "import lora_adapters as la", "", *where, "la.restore(model, adapter)"]
    checks = "With lora_adapters, which checks the files against the base first:"
    return "\n\n".join(["## How to load it", "With PEFT:", _code(peft), checks, _code(ours)])


def _head(facts: RunFacts) -> dict[str, Any]:
    """Return the options that give the base a head like the one that the adapter brings."""
    labels = 1 if facts.task == "reward" else len(facts.labels)
    return {"num_labels": labels, "ignore_mismatched_sizes": True} if labels else {}


def _versions(facts: RunFacts) -> str:
    rows = [(name, _plain(value)) for name, value in facts.environment.items()]
    return "## Made with\n\n" + _table(("what", "version"), rows) if rows else ""


# ---- names -----------------------------------------------------------------------------------------------------------


def _is_on_hub(name: str, folder: Path) -> bool:
    """Return True if `name` is written as a Hub name is, and no file or folder here goes by it."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", name, flags=re.ASCII):
        return False
    if ".." in name or "--" in name or name.endswith((".git", *_DATA_FILES)):
        return False
    return not (folder / name).exists()


def _hub_name(facts: RunFacts, folder: Path) -> str | None:
    """Return the base's name on the Hub, None if it is not there. timm's models with a tag are, by the name of timm."""
    name = facts.base
    if facts.task == "image-classification":
        bare = re.sub(f"^({'|'.join(_HUB_PREFIXES)})", "", name)
        name = bare if bare != name or "/" in name else f"timm/{name}" if "." in name else ""
    return name if _is_on_hub(name, folder) else None


def _base_name(facts: RunFacts, folder: Path) -> str:
    return facts.base if _is_on_hub(facts.base, folder) else _last_part(facts.base)


def _source_name(part: DataFacts, folder: Path) -> str:
    return part.source if _is_on_hub(part.source, folder) else _last_part(part.source)


def _last_part(path: str) -> str:
    """Return a file's or folder's own name, of a path of either kind of system."""
    return PurePosixPath(PureWindowsPath(_one_line(path)).as_posix()).name or "data"


def _recipe(facts: RunFacts, section: str) -> Mapping[str, Any]:
    found = facts.recipe.get(section)
    return found if isinstance(found, Mapping) else {}


# ---- text that holds whatever a person wrote -------------------------------------------------------------------------


def _one_line(value: str) -> str:
    """Return the text without line breaks and other control characters."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", value).split())


def _text(value: str) -> str:
    """Return text that means itself in Markdown, also in a table."""
    return re.sub(r"([\\`*_{}\[\]<>|~$&#!])", r"\\\1", _one_line(value))


def _plain(value: Any) -> str:
    """Return a setting as text; of a path only the last part."""
    if isinstance(value, str):
        is_path = value.startswith(("/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", value)
        return _last_part(value) if is_path else value
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    return text(value) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else text(value)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    lines = [header, tuple("---:" if i in right else "---" for i in range(len(header)))]
    lines += [tuple(_text(str(cell)) for cell in row) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _literal(value: Any) -> str:
    """Return a Python literal on one line that can't end the block of code it stands in."""
    if isinstance(value, str):
        return json.dumps(_one_line(value), ensure_ascii=True).replace("`", "\\u0060")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _arguments(**given: Any) -> str:
    return "".join(f", {name}={_literal(value)}" for name, value in given.items() if value is not None)

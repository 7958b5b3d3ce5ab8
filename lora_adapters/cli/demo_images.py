"""The demo's image part: a small timm model, pretrained here on five handwritten digits, learns the other five.

The images are scikit-learn's `load_digits` (1797 of 8 x 8 pixels, from the UCI repository): real, and part of the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .demo_training import Clock, Progress, no_progress

#: Digits to pretrain on; the task is to tell the others apart.
KNOWN = (0, 1, 2, 3, 4)
#: Pixels a side of what the models see.
SIZE = 16


@dataclass(frozen=True)
class ImageSettings:
    """What the image part trains, and how. All methods see the same batches in the same order.

    Attributes:
        family: "vit" (a vision transformer, 1.2M values) or "resnet" (a residual network, 1.2M values).
        rank: of the adapters.
        norm: what becomes of BatchNorm; see `lora_adapters.attach`.
    """

    family: str = "vit"
    rank: int = 4
    norm: str = "affine"
    test_share: float = 0.4
    batch_size: int = 32
    pretraining_epochs: int = 8
    epochs: int = 30
    learning_rate: float = 5e-3
    full_learning_rate: float = 1e-3
    seed: int = 0


#: What serves each family.
SETTINGS: Mapping[str, Callable[..., ImageSettings]] = {
    "resnet": partial(ImageSettings, family="resnet", pretraining_epochs=4),
    "vit": partial(ImageSettings, family="vit", learning_rate=1e-2, pretraining_epochs=20, epochs=60),
}


@dataclass(frozen=True)
class ImageResult:
    """Measured numbers of the image part. Accuracies are shares (0 to 1) of the held-out images.

    Attributes:
        family, train_size, test_size: the task.
        pretraining_accuracy: of the base on held-out images of the digits that it was pretrained on, in eight orientations.
        before_accuracy: the base as pretrained: its features, nearest class centroid of the training images.
        lora_accuracy, nf4_accuracy: after LoRA on the fp32 and on the NF4 base.
        full_accuracy: after training every weight in fp32.
        values: of the base.
        trained_share: values that LoRA trains beside the new head, as a share of the base's.
        fp32_bytes, nf4_bytes: the base's parameters, quantization statistics included.
        merged_difference: largest difference of a logit after merging into a plain timm model (fp32 base).
        seconds: stage -> seconds.
    """

    family: str
    train_size: int
    test_size: int
    pretraining_accuracy: float
    before_accuracy: float
    lora_accuracy: float
    nf4_accuracy: float
    full_accuracy: float
    values: int
    trained_share: float
    fp32_bytes: int
    nf4_bytes: int
    merged_difference: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Images:
    """Images (rows, 1, SIZE, SIZE) and classes (rows)."""

    pixels: torch.Tensor
    classes: torch.Tensor


def run_images(settings: ImageSettings | None = None, progress: Progress = no_progress) -> ImageResult:
    """Pretrain a small model on some digits, then adapt it to the others by LoRA, on dense and NF4 weights, and in full."""
    import lora_adapters

    from .demo_classification import base_sizes

    settings = settings or ImageSettings()
    clock = Clock(progress)
    (old_train, old_test), (train, test) = _digits(settings, known=True), _digits(settings, known=False)
    torch.manual_seed(settings.seed)
    base = _model(settings.family)
    with clock.stage("Pretraining on five digits"):
        _fit(base, _turned(old_train), settings, settings.full_learning_rate, settings.pretraining_epochs, clock)
    pretrained = _accuracy(base, _turned(old_test))
    before = _centroid_accuracy(base, train, test)

    def adapted(quantization: Any) -> Any:
        model = copy.deepcopy(base)
        torch.manual_seed(settings.seed)
        model.reset_classifier(len(train.classes.unique()))
        options: dict[str, Any] = {"rank": settings.rank, "seed": settings.seed, "quantization": quantization}
        return lora_adapters.attach(model, **options, norm=settings.norm)

    results = {}
    for name, quantization in (("LoRA", None), ("LoRA on NF4", "nf4")):
        adapter = results[name] = adapted(quantization)
        with clock.stage(f"Training {name}"):
            _fit(adapter.model, train, settings, settings.learning_rate, settings.epochs, clock)
    full = copy.deepcopy(base)
    torch.manual_seed(settings.seed)
    full.reset_classifier(len(train.classes.unique()))
    with clock.stage("Training every weight"):
        _fit(full, train, settings, settings.full_learning_rate, settings.epochs, clock)
    lora, nf4 = results["LoRA"], results["LoRA on NF4"]
    head = sum(p.numel() for p in full.get_classifier().parameters())
    values = sum(p.numel() for p in full.parameters())
    trained = sum(p.numel() for p in lora.parameters()) - head
    accuracies = [_accuracy(model, test) for model in (lora.model, nf4.model, full)]
    sizes = base_sizes(nf4.base)
    scores = _scores(lora.model, test)
    return ImageResult(
        family=settings.family,
        train_size=len(train.classes),
        test_size=len(test.classes),
        pretraining_accuracy=pretrained,
        before_accuracy=before,
        lora_accuracy=accuracies[0],
        nf4_accuracy=accuracies[1],
        full_accuracy=accuracies[2],
        values=values,
        trained_share=trained / values,
        fp32_bytes=4 * values,
        nf4_bytes=sizes["nf4_bytes"] - 4 * trained,
        merged_difference=(_scores(lora.merge(unload=True), test) - scores).abs().max().item(),
        seconds=clock.seconds,
    )


def _digits(settings: ImageSettings, known: bool) -> tuple[_Images, _Images]:
    """Return the training and the held-out images of the known digits, or of the others."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    digits = torch.tensor(data.target)
    mine = torch.isin(digits, torch.tensor(KNOWN)) == known
    pixels = torch.tensor(data.images, dtype=torch.float32)[mine].unsqueeze(1) / 8 - 1
    pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    classes = digits[mine].unique(return_inverse=True)[1]
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(settings.seed))
    held_out = round(settings.test_share * len(classes))
    return tuple(_Images(pixels[rows], classes[rows]) for rows in (order[held_out:], order[:held_out]))  # type: ignore[return-value]


def _turned(images: _Images) -> _Images:
    """Return every image in its eight rotations and reflections, each a class of its own: more to learn from few images."""
    pixels, classes = [], []
    for turn in range(8):
        turned = torch.rot90(images.pixels, turn % 4, (2, 3))
        pixels.append(turned if turn < 4 else turned.transpose(2, 3))
        classes.append(images.classes + turn * len(KNOWN))
    return _Images(torch.cat(pixels), torch.cat(classes))


def _model(family: str) -> Any:
    import timm

    options: dict[str, Any] = {"in_chans": 1, "num_classes": 8 * len(KNOWN)}
    if family == "vit":
        options |= {"img_size": SIZE, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
        return timm.create_model("vit_tiny_patch16_224", **options)
    # The first stage sees the whole image: there are only 16 pixels a side.
    options |= {"channels": (32, 64, 128, 256), "stem_width": 16, "replace_stem_pool": True}
    return timm.create_model("resnet10t", **options)


def _fit(model: nn.Module, images: _Images, settings: ImageSettings, rate: float, epochs: int, clock: Clock) -> None:
    """AdamW, one-cycle learning rate, images shifted by up to one pixel."""
    trained = [p for p in model.parameters() if p.requires_grad]
    per_epoch = -(-len(images.classes) // settings.batch_size)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * per_epoch, pct_start=0.2)
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images.classes), generator=generator)
        for i, rows in enumerate(order.split(settings.batch_size)):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            pixels = torch.roll(images.pixels[rows], shift, (2, 3))
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), images.classes[rows], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
            clock.step(epoch * per_epoch + i + 1, epochs * per_epoch)
    model.eval()


@torch.no_grad()
def _scores(model: nn.Module, images: _Images) -> torch.Tensor:
    return model.eval()(images.pixels)


def _accuracy(model: nn.Module, images: _Images) -> float:
    return (_scores(model, images).argmax(1) == images.classes).float().mean().item()


@torch.no_grad()
def _centroid_accuracy(model: Any, train: _Images, test: _Images) -> float:
    """Return the accuracy of naming the class whose mean feature is nearest."""

    def features(images: _Images) -> torch.Tensor:
        return F.normalize(model.forward_head(model.forward_features(images.pixels), pre_logits=True), dim=1)

    known = features(train)
    centroids = torch.stack([known[train.classes == c].mean(0) for c in range(int(train.classes.max()) + 1)])
    return (torch.cdist(features(test), centroids).argmin(1) == test.classes).float().mean().item()

"""A tiny framework: one model, its result, and a folder format."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


class Result(NamedTuple):
    """What a forward returns. `loss` is None without labels."""

    loss: torch.Tensor | None
    scores: torch.Tensor


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Mixes along the patches, then along the channels (MLP-Mixer, arXiv 2105.01601)."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens, self.channels = MLP(patches, 2 * patches), MLP(channels, 2 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Classifies images (batch, patches, values of a patch)."""

    def __init__(self, patches: int = 16, values: int = 48, channels: int = 32, blocks: int = 2, classes: int = 10):
        super().__init__()
        self.settings = dict(patches=patches, values=values, channels=channels, blocks=blocks, classes=classes)
        self.patches = nn.Linear(values, channels)
        self.blocks = nn.ModuleList(Block(patches, channels) for _ in range(blocks))
        self.classifier = nn.Linear(channels, classes)
        self.new_classifier = False

    def replace_classifier(self, classes: int) -> None:
        """Give a pretrained model a new classifier, which then has to be trained."""
        self.classifier = nn.Linear(self.settings["channels"], classes)
        self.settings["classes"], self.new_classifier = classes, True

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> Result:
        x = self.patches(images)
        for block in self.blocks:
            x = block(x)
        scores = self.classifier(x.mean(1))
        return Result(None if labels is None else F.cross_entropy(scores, labels), scores)

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "mixer.json").write_text(json.dumps(self.settings))
        save_file(self.state_dict(), Path(folder, "mixer.safetensors"))

    @classmethod
    def load(cls, folder: str | Path) -> "Mixer":
        model = cls(**json.loads(Path(folder, "mixer.json").read_text()))
        model.load_state_dict(load_file(Path(folder, "mixer.safetensors")))
        return model

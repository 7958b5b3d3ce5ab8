"""The task dreambooth keeps all that `lora-adapters train` promises."""

import sys
from pathlib import Path

from lora_adapters.testing import TrainerContract

sys.path.insert(0, str(Path(__file__).parents[1]))
from photos import write_photos
from pipelines import build


class TestDreamBooth(TrainerContract):
    wrong = (
        "model.name={folder}/missing",
        "data.images={folder}/missing",
        "adapter.targets=nowhere",
        "adapter.text_encoders=[text_encoder_9]",
        "diffusion.timesteps=shifted",
        "training.optimizer=adamww",
    )

    def make_recipe(self, folder):
        build("sd").save_pretrained(folder / "base")
        return {
            "task": "dreambooth",
            "model": {"name": str(folder / "base"), "device": "cpu", "quantization": "nf4"},
            "adapter": {"rank": 4, "dropout": 0.1, "text_encoders": True},
            "data": {
                "images": write_photos(folder / "photos", square=True),
                "prompt": "a sks cat",
                "resolution": 16,
                "bucket_step": 8,
                "min_side": 16,
                "flip": 0.5,
                "eval_fraction": 0.2,
            },
            "prior": {"prompt": "a cat", "images": 3, "steps": 1, "folder": str(folder / "class")},
            "diffusion": {"min_snr": 5.0, "noise_offset": 0.05},
            "training": {
                "epochs": 8.5,
                "batch_size": 1,
                "gradient_accumulation": 2,
                "learning_rate": 1e-2,
                "lora_plus": 2.0,
                "schedule": "cosine",
                "ema": 0.9,
            },
            "samples": {"every": 4, "count": 1, "steps": 1},
        }

"""The task image-classification keeps all that `lora-adapters train` promises."""

from pictures import TINY_VIT, write_digits

from lora_adapters.testing import TrainerContract


class TestImageClassification(TrainerContract):
    def make_recipe(self, folder):
        return {
            "task": "image-classification",
            "model": {**TINY_VIT, "quantization": "nf4", "drop_path_rate": 0.1},
            "adapter": {"rank": 4, "dropout": 0.1},
            "data": {"train": write_digits(folder / "digits", 120, classes=6), "eval_fraction": 0.2, "image_size": 16},
            "augmentation": {"auto_augment": "rand-m5-inc1", "erasing": 0.2, "mixup": 0.2, "cutmix": 1.0},
            "training": {
                "epochs": 3.5,
                "batch_size": 8,
                "gradient_accumulation": 2,
                "learning_rate": 1e-2,
                "schedule": "cosine",
                "weight_decay": 0.05,
                "layer_decay": 0.8,
                "label_smoothing": 0.1,
                "ema": 0.9,
            },
        }

"""A model with BatchNorm whose statistics are trained: they come back with a resumed run, and diverge with it."""

from pictures import write_digits

from lora_adapters.testing import TrainerContract


class TestTrainedStatistics(TrainerContract):
    def make_recipe(self, folder):
        return {
            "task": "image-classification",
            "model": {"name": "test_resnet", "pretrained": False, "device": "cpu"},
            "adapter": {"rank": 4, "dropout": 0.1, "norm": "train"},
            "data": {"train": write_digits(folder / "digits", 120, classes=6), "eval_fraction": 0.2, "image_size": 32},
            "augmentation": {"auto_augment": "rand-m5-inc1", "mixup": 0.2},
            "training": {
                "epochs": 2.0,
                "batch_size": 8,
                "gradient_accumulation": 1,
                "learning_rate": 1e-2,
                "ema": 0.5,
                "channels_last": True,
            },
        }

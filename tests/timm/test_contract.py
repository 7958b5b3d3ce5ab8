"""The backend contract, on a transformer, a convolutional network and one whose weights are read without a call."""

import timm
from lora_adapters_timm.backend import TimmBackend

from lora_adapters.testing import BackendContract


class TestVit(BackendContract):
    def make_backend(self):
        return TimmBackend()

    def make_model(self):
        return timm.create_model("test_vit", num_classes=5, img_size=32)


class TestResNet(TestVit):
    def make_model(self):
        # Blocks that end in a norm of weight zero, as timm starts them, give the layers before it no gradient.
        model = timm.create_model("test_resnet", num_classes=5, zero_init_last=False)
        model.pretrained_cfg["input_size"] = (3, 32, 32)
        return model


class TestFeaturesOnly(TestVit):
    def make_model(self):
        model = timm.create_model("test_convnext", features_only=True)
        model.pretrained_cfg["input_size"] = (3, 64, 64)
        return model

    def loss(self, result):
        return sum(feature.square().mean() for feature in result)  # every stage has one

"""Small timm models for the tests of TimmLoraModel."""

import timm
import torch
from lora_adapters_timm import TimmLoraModel

VIT = ("vit_tiny_patch16_224", dict(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4))
RESNET = ("test_resnet", {})
#: Small members of families with unlike structure. All take images of 64 x 64.
FAMILIES = (
    VIT,
    RESNET,
    ("test_efficientnet", {}),
    ("test_convnext", {}),
    ("test_byobnet", {}),
    ("swin_tiny_patch4_window7_224", dict(img_size=64, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2))),
    ("deit_tiny_distilled_patch16_224", dict(img_size=64, embed_dim=48, depth=2, num_heads=3)),
    ("pit_ti_224", dict(img_size=64)),
)


def plain(which=VIT, classes=5, seed=0, **more):
    name, arguments = which
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=classes, **{**arguments, **more}).eval()


def lora(which=VIT, classes=5, seed=0, **more):
    name, arguments = which
    torch.manual_seed(seed)
    return TimmLoraModel(name, num_classes=classes, **{"rank": 3, **arguments, **more}).eval()


def images(which=VIT, batch=2, seed=1):
    size = which[1].get("img_size", 64)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trained(model, seed=2):
    """Give every trainable value another one, as training would. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.05)
    return model

"""The models of timm's sweep: a small one of every module in timm/models, and what is special about some families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models import _registry
from torch import nn

CLASSES = 5


@dataclass(frozen=True)
class Case:
    """One model of the sweep.

    Attributes:
        module: the module in timm/models it stands for.
        model: timm's name of the model.
        options: what `timm.create_model` is given besides the number of classes.
        size: side of the images.
        why: what is special about it; "" for the plain member of a family.
    """

    module: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int = 64
    why: str = ""

    @property
    def name(self) -> str:
        """The case in one word."""
        return f"{self.model} ({self.why})" if self.why else self.model


def build(case: Case) -> nn.Module:
    """Return the case's model with random weights, every value of which matters.

    What timm starts at zero (gates, the last layer of a branch, relative positions) would keep gradients from whole
    layers, and statistics of batches that were never seen let values grow or vanish: both are set as after some training.
    Dropped paths would do so too, and are off.
    """
    torch.manual_seed(0)
    model = timm.create_model(case.model, **{"num_classes": CLASSES, **case.options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.02 if parameter.dim() > 1 else 0.1
            if parameter.dim() < 2 or parameter.abs().max() < 1e-3:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if type(module).__name__ == "DropPath":
                module.drop_prob = 0.0
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        model(images(case, 4))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    model.eval()
    return model


def images(case: Case, batch_size: int, seed: int = 2) -> torch.Tensor:
    """Return (batch_size, channels, size, size) random images."""
    channels = case.options.get("in_chans", 3)
    return torch.randn(batch_size, channels, case.size, case.size, generator=torch.Generator().manual_seed(seed))


def _small(module: str, model: str, size: int = 64, **options: Any) -> Case:
    return Case(module, model, options, size)


def _sized(module: str, model: str, size: int = 64, **options: Any) -> Case:
    return Case(module, model, {"img_size": size, **options}, size)


_NARROW = dict(depth=2, embed_dim=192, num_heads=3)

#: One member of every module: its smallest, made smaller where it takes depths and widths.
FAMILIES = (
    _sized("beit", "beit_base_patch16_224", **_NARROW),
    _small("byoanet", "halonet_h1", 256),
    _small("byobnet", "test_byobnet"),
    _sized("cait", "cait_xxs24_224", depth=2),
    _sized("coat", "coat_tiny"),
    _sized("convit", "convit_tiny"),
    _small("convmixer", "convmixer_768_32"),
    _small("convnext", "test_convnext"),
    _small("cpubone", "cpubone_nano"),
    _small("crossvit", "crossvit_tiny_240", 240),
    _small("csatv2", "csatv2", 128),
    _small("cspnet", "cs3darknet_focus_s"),
    _small("cspnext", "cspnext_tiny"),
    _small("davit", "davit_tiny"),
    _small("deepseek_vit", "deepseek_vit_412m", 126, **_NARROW),
    _sized("deit", "deit_tiny_distilled_patch16_224", depth=2),
    _small("densenet", "densenet121"),
    _small("dla", "dla46x_c"),
    _small("dpn", "dpn48b"),
    _small("edgenext", "edgenext_xx_small"),
    _small("efficientformer", "efficientformer_l1", 224),
    _sized("efficientformer_v2", "efficientformerv2_s0", 128),
    _small("efficientnet", "test_efficientnet"),
    _small("efficientvim", "efficientvim_m1"),
    _small("efficientvit_mit", "efficientvit_b0", 128),
    _sized("efficientvit_msra", "efficientvit_m0", 128),
    _sized("eva", "vit_tiny_patch16_dinov3_qkvb", depth=2),
    _small("fasternet", "fasternet_t0"),
    _small("fastvit", "fastvit_t8"),
    _small("focalnet", "focalnet_tiny_srf"),
    _sized("gcvit", "gcvit_xxtiny", 128),
    _small("gemma4_vit", "gemma4_vit_167m", 96, depth=2),
    _small("ghostnet", "ghostnet_050"),
    _small("hardcorenas", "hardcorenas_b"),
    _small("hgnet", "hgnetv2_b0"),
    _sized("hiera", "hiera_tiny_224", 96),
    _small("hieradet_sam2", "sam2_hiera_tiny", 128),
    _small("hrnet", "hrnet_w18_small"),
    _small("iformer", "iformer_t", 128),
    _small("inception_next", "inception_next_atto"),
    _small("inception_resnet_v2", "inception_resnet_v2", 96),
    _small("inception_v3", "inception_v3", 96),
    _small("inception_v4", "inception_v4", 96),
    _small("lcnetv2", "lcnetv2_small"),
    _sized("levit", "levit_128s", 128),
    _small("lowformer", "lowformer_b0"),
    _small("mambaout", "test_mambaout"),
    _sized("maxxvit", "test_coatnet"),
    _small("metaformer", "poolformerv2_s12"),
    _sized("mlp_mixer", "gmlp_ti16_224"),
    _small("mobilenetv3", "mobilenetv3_small_050"),
    _small("mobilenetv5", "mobilenetv5_base"),
    _small("mobilevit", "mobilevit_xxs"),
    _sized("mvitv2", "mvitv2_tiny"),
    _small("naflexvit", "naflexvit_base_patch16_parfac_gap", **_NARROW),
    _small("nasnet", "nasnetalarge"),
    _sized("nest", "nest_tiny"),
    _small("nextvit", "nextvit_small"),
    _small("nfnet", "test_nfnet"),
    _sized("pit", "pit_ti_224"),
    _small("pnasnet", "pnasnet5large"),
    _small("pvt_v2", "pvt_v2_b0"),
    _small("qwen3_vit", "qwen3_vit_88m", depth=2),
    _small("rdnet", "rdnet_tiny"),
    _small("regnet", "regnetx_002"),
    _small("repghost", "repghostnet_050"),
    _small("repvit", "repvit_m1"),
    _small("res2net", "res2next50"),
    _small("resnest", "resnest14d"),
    _small("resnet", "test_resnet"),
    _small("resnetv2", "resnetv2_18"),
    _small("rexnet", "rexnet_100"),
    _small("selecsls", "selecsls42"),
    _small("senet", "legacy_seresnet18"),
    _sized("sequencer", "sequencer2d_s"),
    _small("shvit", "shvit_s1", 128),
    _small("sknet", "skresnet18"),
    _small("starnet", "starnet_s050"),
    _small("swiftformer", "swiftformer_xs"),
    _sized("swin_transformer", "swin_tiny_patch4_window7_224", window_size=2, depths=(2, 2, 2, 2)),
    _sized("swin_transformer_v2", "swinv2_tiny_window8_256", window_size=2, depths=(1, 2, 1, 1)),
    _sized("swin_transformer_v2_cr", "swinv2_cr_tiny_224", depths=(1, 2, 1, 1)),
    _small("tiny_vit", "tiny_vit_5m_224"),
    _sized("tnt", "tnt_s_legacy_patch16_224", depth=2),
    _small("tresnet", "tresnet_m"),
    _sized("twins", "twins_svt_small"),
    _small("vgg", "vgg11"),
    _sized("visformer", "visformer_tiny"),
    _sized("vision_transformer", "test_vit"),
    _sized("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", 128),
    _sized("vision_transformer_relpos", "test_vit_relpos"),
    _sized("vision_transformer_sam", "samvit_base_patch16_224", **_NARROW),
    _sized("vitamin", "vitamin_small_224"),
    _sized("volo", "volo_d1_224", 64),
    _small("vovnet", "ese_vovnet19b_slim_dw"),
    _small("xception", "legacy_xception", 96),
    _small("xception_aligned", "xception41p", 96),
    _sized("xcit", "xcit_nano_12_p8_224"),
)

#: What a family's smallest member does not show.
SPECIAL = (
    Case("vision_transformer", "test_vit3", {"img_size": 64}, 64, "attention pooling, NormLinear"),
    Case(
        "eva", "vit_tiny_patch16_dinov3_qkvb", {"img_size": 64, "depth": 2, "qkv_fused": False}, 64, "qkv_fused=False"
    ),
    Case(
        "vision_transformer",
        "vit_dwee_patch16_reg1_gap_256",
        {"img_size": 64, "depth": 2},
        64,
        "differential attention",
    ),
    Case("vision_transformer", "vit_pwee_patch16_reg1_gap_256", {"img_size": 64, "depth": 2}, 64, "parallel blocks"),
    Case(
        "vision_transformer",
        "vit_dpwee_patch16_reg1_gap_256",
        {"img_size": 64, "depth": 2},
        64,
        "parallel, differential",
    ),
    Case("maxxvit", "test_maxvit", {"img_size": 64}, 64, "attention over windows and grids"),
    Case("mobilevit", "mobilevitv2_050", {}, 64, "linear attention of convolutions"),
    Case("mobilenetv3", "mobilenetv4_hybrid_medium_075", {}, 64, "multi-query attention"),
    Case("byoanet", "lambda_resnet26t", {}, 256, "lambda layers"),
    Case("byoanet", "eca_botnext26ts_256", {}, 256, "bottleneck attention"),
    Case("metaformer", "caformer_s18", {}, 64, "convolutions and attention"),
    Case("fastvit", "fastvit_mci0", {}, 64, "attention in the last stage"),
    Case("nfnet", "dm_nfnet_f0", {}, 64, "ScaledStdConv2dSame"),
    Case("resnetv2", "resnetv2_50x1_bit", {}, 64, "weight-standardised convolutions"),
    Case("efficientnet", "tf_efficientnet_b0", {}, 64, "SAME padding by the input's size"),
    Case("efficientnet", "efficientnet_cc_b0_4e", {}, 64, "CondConv2d"),
    Case("efficientnet", "mixnet_s", {}, 64, "mixed kernels"),
    Case("resnet", "test_resnet", {"output_stride": 8}, 64, "dilated"),
    Case("byobnet", "resnet50_clip", {}, 224, "attention pooling of convolutions"),
    Case("resnet", "test_resnet", {"in_chans": 1}, 64, "one channel"),
    Case("resnet", "test_resnet", {"num_classes": 0}, 64, "no classifier"),
    Case("resnet", "test_resnet", {"features_only": True}, 64, "features_only"),
    Case("convnext", "test_convnext", {"features_only": True}, 64, "features_only"),
    Case("vision_transformer", "test_vit", {"img_size": 64, "features_only": True}, 64, "features_only"),
)


def modules() -> tuple[str, ...]:
    """Return the modules of timm/models that register models."""
    return tuple(sorted({_registry._model_to_module[name] for name in timm.list_models()}))

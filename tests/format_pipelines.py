"""Tiny pipelines with random weights, for what stock diffusers makes of a file. Only the adapted parts are there."""

import torch
from format_models import lora
from torch import nn

from lora_adapters.formats import PortableAdapter


def unet(**options):
    import diffusers

    torch.manual_seed(0)
    sizes = dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=2, cross_attention_dim=8)
    blocks = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    return diffusers.UNet2DConditionModel(**sizes, **blocks, norm_num_groups=8, attention_head_dim=4, **options)


def clip(projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=40)
    config = CLIPTextConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0, projection_dim=16)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def sd1():
    import diffusers

    kept = dict(vae=None, tokenizer=None, scheduler=None, safety_checker=None, feature_extractor=None)
    return diffusers.StableDiffusionPipeline(unet=unet(), text_encoder=clip(), requires_safety_checker=False, **kept)


def sdxl():
    import diffusers

    embedding = dict(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64
    )
    model = unet(use_linear_projection=True, **embedding)
    kept = dict(vae=None, tokenizer=None, tokenizer_2=None, scheduler=None)
    return diffusers.StableDiffusionXLPipeline(unet=model, text_encoder=clip(), text_encoder_2=clip(True), **kept)


def flux():
    import diffusers

    torch.manual_seed(0)
    sizes = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, guidance_embeds=True)
    dims = dict(in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8))
    kept = dict.fromkeys(("vae", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"))
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(**sizes, **dims), text_encoder=clip(), **kept
    )


def sd3():
    import diffusers

    torch.manual_seed(0)
    sizes = dict(
        num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, dual_attention_layers=(0,)
    )
    dims = dict(sample_size=8, in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, pos_embed_max_size=8)
    names = ("vae", "tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder_3", "scheduler")
    encoders = dict(text_encoder=clip(True), text_encoder_2=clip(True))
    model = diffusers.SD3Transformer2DModel(**sizes, **dims)
    return diffusers.StableDiffusion3Pipeline(transformer=model, **encoders, **dict.fromkeys(names))


PIPELINES = {"sd1": sd1, "sdxl": sdxl, "sd3": sd3, "flux": flux}
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def parts(pipe):
    return {name: getattr(pipe, name) for name in PARTS if getattr(pipe, name, None) is not None}


def adapter_for(pipe, family, alphas=(4.0,), ranks=(2,), chosen=lambda name: True, **more):
    """An adapter on the chosen layers of a pipeline; ranks and alphas take turns."""
    components = {}
    for component, model in parts(pipe).items():
        layers = {
            name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
        }
        for index, (name, shape) in enumerate(layers.items()):
            text = component.startswith("text_encoder")
            if (".layers." in name or "projection" in name) if text else chosen(name):
                own = f"text_model.{name}" if text and name.startswith("encoder.") else name
                made = lora(shape, ranks[index % len(ranks)], alphas[index % len(alphas)], index, **more)
                components.setdefault(component, {})[own] = made
    return PortableAdapter(components, family)


def loaded(pipe):
    """Return (component, module in our names) -> what a loaded adapter adds to the layer's weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    with torch.no_grad():
        for component, model in parts(pipe).items():
            for name, layer in model.named_modules():
                if isinstance(layer, BaseTunerLayer) and layer.scaling:
                    adapter = next(iter(layer.scaling))
                    text = component.startswith("text_encoder") and name.startswith("encoder.")
                    found[component, f"text_model.{name}" if text else name] = layer.get_delta_weight(adapter).double()
    return found


def wrong(pipe, adapter):
    """Return the layers that a pipeline does not adapt as it should, in our names."""
    there, bad = loaded(pipe), []
    wanted = {(component, module): factors.update() for component, module, factors in adapter}
    for key in wanted.keys() | there.keys():
        if (
            key not in wanted
            or key not in there
            or (there[key].reshape(wanted[key].shape) - wanted[key]).norm() > 1e-5 * wanted[key].norm()
        ):
            bad.append(key)
    return sorted(bad)

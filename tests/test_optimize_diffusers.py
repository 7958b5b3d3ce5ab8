"""optimize on diffusers models, with diffusers' own ways to load, unload, fuse, stack and swap adapters."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict

import lora_adapters as la
from lora_adapters.layers.optimized import stock_class

diffusers = pytest.importorskip("diffusers")

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
CONV = ["conv1", "conv2", "conv_shortcut"]


def make_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def pipeline():
    """Stable Diffusion of a few thousand values, without what LoRA does not touch."""
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = make_unet()
    torch.manual_seed(1)
    config = CLIPTextConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        text_encoder=CLIPTextModel(config),
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two adapters as diffusers saves them: the first also for convolutions."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, targets) in enumerate({"one": ATTENTION + CONV, "two": ATTENTION}.items()):
        pipe = pipeline()
        pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
        pipe.save_lora_weights(folder / name, unet_lora_layers=values_of(pipe.unet, seed))
    return folder


def values_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return get_peft_model_state_dict(model)


def predict(unet):
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 3, 12, generator=generator)
    return unet(sample, 7, encoder_hidden_states=context).sample


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def classes(model):
    return {type(module) for module in model.modules() if isinstance(module, LoraLayer)}


def optimized(model):
    return bool(classes(model)) and all(stock_class(cls) is not None for cls in classes(model))


def two_pipelines(files, *names):
    pipes = pipeline(), pipeline()
    for pipe in pipes:
        for name in names:
            pipe.load_lora_weights(files / name, adapter_name=name)
    return pipes


def test_a_unet_that_diffusers_adapted(files):
    stock, ours = (pipe.unet for pipe in two_pipelines(files, "one"))
    bare = predict(make_unet())
    report = la.optimize(ours)
    assert report.counts.keys() == {"split"}
    assert {layer.kind for layer in report.layers} == {"Linear", "Conv2d"}
    assert optimized(ours)
    assert repr(ours) == repr(stock)
    grads = []
    for unet in (stock, ours):
        unet.requires_grad_(False)
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_("lora_" in name)
        predict(unet).pow(2).sum().backward()
        grads.append({n: p.grad for n, p in unet.named_parameters() if p.grad is not None})
    assert (predict(stock) - bare).abs().max() > 1e-2
    close(predict(ours), predict(stock))
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        close(grads[1][name], gradient)
    report.undo()
    assert classes(ours) == classes(stock)


def test_unload_and_reload(files):
    stock, ours = two_pipelines(files, "one")
    report = la.optimize(ours.unet)
    for pipe in (stock, ours):
        pipe.unload_lora_weights()
        assert not classes(pipe.unet)
        pipe.load_lora_weights(files / "two", adapter_name="two")
    assert optimized(ours.unet)
    assert not optimized(stock.unet)
    close(predict(ours.unet), predict(stock.unet))
    report.undo()
    assert classes(ours.unet) == classes(stock.unet)


def test_two_adapters_set_fused_and_deleted(files):
    stock, ours = two_pipelines(files, "one")
    la.optimize(ours.unet)
    for pipe in (stock, ours):
        pipe.load_lora_weights(files / "two", adapter_name="two")
    assert optimized(ours.unet)

    def each(act):
        for pipe in (stock, ours):
            act(pipe)
        close(predict(ours.unet), predict(stock.unet))

    each(lambda pipe: pipe.set_adapters(["one", "two"], [0.7, 0.4]))
    each(lambda pipe: pipe.set_adapters(["two"], [1.5]))
    each(lambda pipe: pipe.set_adapters(["one", "two"], [1.0, {"unet": {"down": 0.2, "mid": 0.5, "up": 0.9}}]))
    each(lambda pipe: pipe.fuse_lora(lora_scale=0.5))
    assert torch.equal(predict(ours.unet), predict(stock.unet))
    each(lambda pipe: pipe.unfuse_lora())
    each(lambda pipe: pipe.disable_lora())
    each(lambda pipe: pipe.enable_lora())
    each(lambda pipe: pipe.delete_adapters("one"))
    assert optimized(ours.unet)


@pytest.mark.parametrize("enabled", [False, True])
def test_hot_swap(files, enabled):
    """Where it was enabled for compiled models the scalings are tensors, so PEFT's forward runs."""
    pipes = pipeline(), pipeline()
    for pipe in pipes:
        if enabled:
            pipe.enable_lora_hotswap(target_rank=8)
        pipe.load_lora_weights(files / "one", adapter_name="one")
    stock, ours = pipes
    paths = la.optimize(ours.unet).counts.keys()
    assert paths == ({"parent"} if enabled else {"split"})
    for pipe in pipes:
        pipe.load_lora_weights(files / "two", adapter_name="one", hotswap=True)
    close(predict(ours.unet), predict(stock.unet))
    assert optimized(ours.unet)


def test_a_pipeline_is_told_which_part_to_optimize(files):
    pipe, _ = two_pipelines(files, "two")
    with pytest.raises(la.errors.RequestError, match=r"optimize \.unet\."):
        la.optimize(pipe)

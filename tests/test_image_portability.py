"""Verdicts on diffusers, ComfyUI and timm. Those for diffusers and timm are compared with what the libraries do."""

import pytest
import torch
from helpers import llama, perturb
from peft import LoraConfig, PeftModel, get_peft_model

import lora_adapters as la
from lora_adapters.adapter_file import inspect_adapter
from lora_adapters.errors import CheckpointError
from lora_adapters.portability import judge

pytestmark = pytest.mark.filterwarnings("ignore")
SCALE_ONE = dict(r=4, lora_alpha=4)


def saved(folder, model, **fields):
    """Adapt a model with stock PEFT, give the adapter values, save it; return the adapted model."""
    adapted = get_peft_model(model, LoraConfig(**SCALE_ONE | fields))
    perturb(adapted)
    adapted.save_pretrained(folder)
    return adapted.base_model.model


def verdict(folder, target):
    return judge(inspect_adapter(folder), target)


# ---- diffusers: tiny models in pipelines of their own ---------------------------------------------------------------


def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    sizes = dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=8)
    return diffusers.UNet2DConditionModel(**blocks, **sizes, norm_num_groups=8, attention_head_dim=4)


def flux():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
    return diffusers.FluxTransformer2DModel(
        in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), **sizes
    )


def flux2():
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    torch.manual_seed(0)
    sizes = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
    return diffusers.Flux2Transformer2DModel(in_channels=4, joint_attention_dim=8, axes_dims_rope=(4, 4, 4, 4), **sizes)


def ernie():
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, text_in_dim=8)
    return diffusers.ErnieImageTransformer2DModel(in_channels=4, out_channels=4, rope_axes_dim=(4, 4, 8), **sizes)


def clip():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=40)
    return CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def stable_diffusion(denoiser=None, text_encoder=None):
    import diffusers

    kept = dict(vae=None, tokenizer=None, scheduler=None, safety_checker=None, feature_extractor=None)
    parts = dict(unet=denoiser or unet(), text_encoder=text_encoder or clip())
    return diffusers.StableDiffusionPipeline(**kept, **parts, requires_safety_checker=False)


def pipeline_of(name):
    def build(transformer):
        import diffusers

        cls = getattr(diffusers, name)
        if name != "FluxPipeline":
            empty = dict(vae=None, text_encoder=None, tokenizer=None, scheduler=None)
        else:
            empty = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"))
        return cls(transformer=transformer, **empty)

    return build


def updates(model):
    """Return layer name -> what the adapter adds to its weight."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    with torch.no_grad():
        return {name: layer.get_delta_weight(next(iter(layer.r))) for name, layer in layers.items()}


def same(one, other):
    a, b = updates(one), updates(other)
    return bool(a) and a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


ATTENTION = ["to_q", "to_v"]
#: What is adapted -> denoiser, its pipeline, PEFT's fields, whether stock load_lora_weights gets it, and what is said.
DIFFUSERS_CASES = {
    "UNet": (unet, stable_diffusion, dict(target_modules=ATTENTION), False, "loads nothing of it"),
    "UNet's convolutions": (unet, stable_diffusion, dict(target_modules=["conv1"]), False, "not unet..."),
    "Flux": (flux, pipeline_of("FluxPipeline"), dict(target_modules=ATTENTION), False, "KeyError"),
    "Flux2": (flux2, pipeline_of("Flux2Pipeline"), dict(target_modules=ATTENTION), True, ""),
    "Flux2, scale": (
        flux2,
        pipeline_of("Flux2Pipeline"),
        dict(target_modules=ATTENTION, lora_alpha=8),
        False,
        "scale 1 instead of 2",
    ),
    "Flux2, outside": (
        flux2,
        pipeline_of("Flux2Pipeline"),
        dict(target_modules=["to_q", "x_embedder"]),
        False,
        "outside of the blocks ('x_embedder')",
    ),
    "Ernie": (ernie, pipeline_of("ErnieImagePipeline"), dict(target_modules=ATTENTION), True, ""),
    "Ernie, ranks": (
        ernie,
        pipeline_of("ErnieImagePipeline"),
        dict(target_modules=ATTENTION, rank_pattern={"to_v": 2}, alpha_pattern={"to_v": 2}),
        True,
        "",
    ),
    "Ernie, rank-stabilised": (
        ernie,
        pipeline_of("ErnieImagePipeline"),
        dict(target_modules=ATTENTION, use_rslora=True),
        False,
        "scale 1 instead of 2",
    ),
    "Ernie, trained whole": (
        ernie,
        pipeline_of("ErnieImagePipeline"),
        dict(target_modules=ATTENTION, modules_to_save=["text_proj"]),
        False,
        "trained whole",
    ),
}


@pytest.mark.parametrize("build, pipeline, fields, loads, reason", DIFFUSERS_CASES.values(), ids=DIFFUSERS_CASES)
def test_for_diffusers_is_what_a_stock_pipeline_does(tmp_path, build, pipeline, fields, loads, reason):
    adapted = saved(tmp_path, build(), **fields)
    denoiser = build()
    pipe = pipeline(denoiser)
    try:
        pipe.load_lora_weights(tmp_path)
    except (KeyError, ValueError):
        assert not loads
    else:
        assert same(denoiser, adapted) == loads
    found = verdict(tmp_path, "diffusers")
    assert found.loads == loads, found.reasons
    assert reason in " ".join(found.reasons)


@pytest.mark.parametrize("build", [unet, flux])
@pytest.mark.parametrize("alpha", [4, 8])
def test_what_is_said_to_load_does(tmp_path, build, alpha):
    adapted = saved(tmp_path, build(), target_modules=ATTENTION, lora_alpha=alpha)
    found = verdict(tmp_path, "diffusers")
    part = "pipe.unet" if build is unet else "pipe.transformer"
    assert f"PeftModel.from_pretrained({part}, folder)" in found.reasons[0]
    model = build()
    PeftModel.from_pretrained(model, tmp_path)
    assert same(model, adapted)
    (note,) = found.notes
    assert note.startswith(f"{part}.load_lora_adapter(folder, ")
    model = build()
    model.load_lora_adapter(tmp_path, weight_name="adapter_model.safetensors", prefix="base_model.model")
    assert same(model, adapted) == ("scale 1 instead of 2" not in note) == (alpha == 4)


def test_a_text_encoder(tmp_path):
    pytest.importorskip("diffusers")
    adapted = saved(tmp_path, clip(), target_modules=["q_proj"])
    encoder = clip()
    stable_diffusion(text_encoder=encoder).load_lora_weights(tmp_path)
    assert not updates(encoder)
    found = verdict(tmp_path, "diffusers")
    assert "loads nothing of it" in found.reasons[0]
    assert "PeftModel.from_pretrained(pipe.text_encoder, folder)" in found.reasons[0]
    PeftModel.from_pretrained(encoder, tmp_path)
    assert same(encoder, adapted)


def test_our_own_file_of_a_unet(tmp_path):
    adapter = la.attach(unet(), rank=4, alpha=8, targets=["conv1"])
    perturb(adapter.model)
    adapter.save(tmp_path)
    found = verdict(tmp_path, "diffusers")
    assert "pipe.unet" in found.reasons[0]
    assert "scale 1 instead of 2" in found.notes[0]


def test_a_language_model_is_for_none_of_them(tmp_path):
    saved(tmp_path / "task", llama(), target_modules=["q_proj"], task_type="CAUSAL_LM")
    saved(tmp_path / "class", llama(), target_modules=["q_proj"])
    la.attach(llama(), rank=4, targets="q").save(tmp_path / "ours")
    for folder in ("task", "class", "ours"):
        for target in ("diffusers", "comfyui", "timm"):
            (reason,) = verdict(tmp_path / folder, target).reasons
            assert reason.startswith("it adapts ")
            assert "a model of transformers" in reason
            assert ("LlamaForCausalLM" in reason) == (folder != "task")


# ---- ComfyUI: its rules, by its source ------------------------------------------------------------------------------


def sd3():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = dict(num_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, pos_embed_max_size=8, **sizes
    )


COMFYUI_CASES = {
    "UNet": (unet, dict(target_modules=ATTENTION), "lora key not loaded"),
    "Flux": (flux, dict(target_modules=ATTENTION), "lora key not loaded"),
    "text encoder": (clip, dict(target_modules=["q_proj"]), "lora key not loaded"),
    "SD3": (sd3, dict(target_modules=[*ATTENTION, "add_q_proj", "to_out.0"]), ""),
    "SD3, scale": (sd3, dict(target_modules=ATTENTION, lora_alpha=1), "scale 1 instead of 0.25"),
    "SD3, DoRA": (sd3, dict(target_modules=ATTENTION, use_dora=True), "lora_magnitude_vector"),
    "SD3, trained whole": (sd3, dict(target_modules=ATTENTION, modules_to_save=["proj_out"]), "'base_model.model.proj"),
    "SD3, another layer": (sd3, dict(target_modules=["to_q", "proj_out"]), "'proj_out'"),
}


@pytest.mark.parametrize("build, fields, reason", COMFYUI_CASES.values(), ids=COMFYUI_CASES)
def test_for_comfyui(tmp_path, build, fields, reason):
    saved(tmp_path, build(), **fields)
    found = verdict(tmp_path, "comfyui")
    assert found.loads == (not reason), found.reasons
    assert len(found.reasons) == bool(reason)
    assert reason in " ".join(found.reasons)
    assert "source" in found.notes[0]


# ---- timm -----------------------------------------------------------------------------------------------------------


def timm_model(name="test_vit", **options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    with torch.no_grad():
        # Fresh residual branches are scaled by 0 or 1e-6, which would hide an adapter in them.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.5)
    return model


def outputs(model):
    with torch.no_grad():
        found = model.eval()(torch.linspace(-1, 1, 3 * 160 * 160).view(1, 3, 160, 160))
    return found[-1] if isinstance(found, list) else found


def attached(folder, model, **fields):
    adapter = la.attach(model, rank=4, targets=fields["target_modules"])
    perturb(adapter.model)
    adapter.save(folder)
    return model


@pytest.mark.parametrize("writer", [saved, attached])
@pytest.mark.parametrize(
    "name, target, convolution",
    [("test_vit", "qkv", False), ("test_resnet", "layer1.0.conv2", True), ("test_convnext", "fc1", False)],
)
def test_for_timm_loads_and_merges_into_timms_own_names(tmp_path, writer, name, target, convolution):
    adapted = writer(tmp_path, timm_model(name), target_modules=[target])
    found = verdict(tmp_path, "timm")
    assert found.loads, found.reasons
    assert "lora_adapters.restore(model, folder), or PeftModel.from_pretrained(model, folder)" in found.notes[0]
    # Our own files say what became of the statistics.
    assert any("BatchNorm" in note for note in found.notes) == (convolution and writer is saved)
    wanted = outputs(adapted)
    assert not torch.allclose(outputs(timm_model(name)), wanted, atol=1e-5)
    loaded = PeftModel.from_pretrained(timm_model(name), tmp_path)
    assert torch.allclose(outputs(loaded), wanted, atol=1e-5)
    assert torch.allclose(outputs(la.restore(timm_model(name), tmp_path).model), wanted, atol=1e-5)
    plain = timm_model(name)
    plain.load_state_dict(loaded.merge_and_unload().state_dict())
    assert torch.allclose(outputs(plain), wanted, atol=1e-5)


def test_running_statistics_are_lost_as_said(tmp_path):
    model = timm_model("test_resnet")
    adapted = get_peft_model(model, LoraConfig(**SCALE_ONE, target_modules=["layer1.0.conv2"]))
    adapted.train()(torch.randn(2, 3, 160, 160))
    adapted.save_pretrained(tmp_path)
    assert any("BatchNorm" in note for note in verdict(tmp_path, "timm").notes)
    loaded = PeftModel.from_pretrained(timm_model("test_resnet"), tmp_path)
    assert not torch.allclose(outputs(loaded), outputs(model), atol=1e-3)


def test_features_only_has_other_names(tmp_path):
    features = timm_model("test_resnet", features_only=True)
    saved(tmp_path, features, target_modules=["layer1.0.conv2"])
    found = verdict(tmp_path, "timm")
    assert found.loads
    assert any("features_only=True" in note for note in found.notes)
    assert set(features.state_dict()) != set(timm_model("test_resnet").state_dict())


def test_the_wrapper_of_transformers_is_not_timms(tmp_path):
    pytest.importorskip("timm")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_vit", num_labels=3))
    adapted = saved(tmp_path, model, target_modules=["qkv"])
    (reason,) = verdict(tmp_path, "timm").reasons
    assert "transformers' wrapper" in reason
    assert any(name.startswith("timm_model.") for name, _ in adapted.named_parameters())
    # On timm's own model stock PEFT finds the targets, but no tensor for them.
    loaded = PeftModel.from_pretrained(timm_model(), tmp_path)
    assert not any(update.any() for update in updates(loaded).values())
    with pytest.raises(CheckpointError, match="made for another model"):
        la.restore(timm_model(), tmp_path)


def test_a_denoiser_is_not_timms(tmp_path):
    saved(tmp_path, unet(), target_modules=["to_q"])
    (reason,) = verdict(tmp_path, "timm").reasons
    assert reason == "it adapts UNet2DConditionModel (a model of diffusers), not a model of timm"


def test_a_vision_model_is_not_for_pipelines(tmp_path):
    saved(tmp_path, timm_model(), target_modules=["qkv"])
    for target in ("diffusers", "comfyui"):
        (reason,) = verdict(tmp_path, target).reasons
        assert reason.startswith("it adapts VisionTransformer (a model of timm), and ")

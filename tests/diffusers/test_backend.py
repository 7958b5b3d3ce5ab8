"""The backend keeps the contract of every backend, loads models, and knows what a training step takes."""

import diffusers
import pytest
import torch
from lora_adapters_diffusers.backend import DiffusersBackend

import lora_adapters as la
from lora_adapters.errors import RequestError, UnsupportedError
from lora_adapters.testing import BackendContract


def make_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


class TestUNet(BackendContract):
    def make_backend(self):
        return DiffusersBackend()

    def make_model(self):
        return make_unet()


SHAPES = {
    "UNet2DConditionModel": dict(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    ),
    "SD3Transformer2DModel": dict(sample_size=8, num_layers=1),
    "FluxTransformer2DModel": dict(num_layers=1, num_single_layers=1, guidance_embeds=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_memory_of_a_training_step(name):
    with torch.device("meta"):
        model = getattr(diffusers, name)(**SHAPES[name])
    small, large = (la.plan(model, rank=4).memory(batch_size=n) for n in (1, 2))
    assert large.activations > 1.5 * small.activations > 0


def test_inputs_that_are_not_known():
    with torch.device("meta"):
        model = diffusers.AllegroTransformer3DModel(num_layers=1)
    with pytest.raises(UnsupportedError, match="predict_step"):
        la.plan(model).memory()


def test_loading_a_folder(tmp_path):
    make_unet().save_pretrained(tmp_path / "pipeline" / "unet")
    wanted = make_unet().state_dict()
    loaded = la.load(str(tmp_path / "pipeline" / "unet"), device="cpu")
    assert all(torch.equal(value, wanted[key]) for key, value in loaded.state_dict().items())
    half = la.load(str(tmp_path / "pipeline"), backend="diffusers", subfolder="unet", dtype="float16", device="cpu")
    assert half.dtype == torch.float16
    packed = la.load(str(tmp_path / "pipeline" / "unet"), quantization="nf4", device="cpu")
    formats = {layer.format for layer in la.plan(packed, targets="attention+conv", rank=2).layers}
    assert formats == {"nf4"}
    assert type(packed.conv_in) is torch.nn.Conv2d
    with pytest.raises(RequestError, match="use LoraPipeline"):
        la.load(str(tmp_path / "pipeline"), backend="diffusers", device="cpu")
    with pytest.raises(RequestError, match="dtype must be"):
        la.load(str(tmp_path / "pipeline" / "unet"), dtype="half?", device="cpu")

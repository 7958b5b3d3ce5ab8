"""Families: training gives the denoiser what the pipeline's own denoising loop gives it."""

import diffusers
import pytest
import torch
from lora_adapters_diffusers import LoraPipeline
from lora_adapters_diffusers.dreambooth.families import family_of

from lora_adapters.errors import RequestError, StateError, UnsupportedError

KINDS = ("sd", "sdxl", "sd3", "flux")
PROMPT = "a cat"
HEIGHT, WIDTH = 16, 24
#: original height, width; top, left of the crop; target height, width
SIZES = (40, 36, 2, 4, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def pipes(tiny):
    return {kind: tiny.build(kind) for kind in KINDS}


@pytest.fixture
def pipe(pipes, request):
    return pipes[request.param]


each = pytest.mark.parametrize("pipe", KINDS, indirect=True)


def of_pipeline(pipe, prompts=(PROMPT,), **options):
    """Return what the pipeline's own loop gave its denoiser in the second of three steps, and got."""
    family, seen = family_of(pipe), []

    def hook(module, args, kwargs, output):
        names = ("sample", "timestep")
        seen.append(({**dict(zip(names, args, strict=False)), **kwargs}, output[0]))

    if family.name == "SDXL":
        options |= dict(original_size=SIZES[:2], crops_coords_top_left=SIZES[2:4], target_size=SIZES[4:])
    if hasattr(family, "max_sequence_length"):
        options |= dict(max_sequence_length=family.max_sequence_length)
    handle = family.denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        pipe(
            list(prompts),
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=3,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **{"guidance_scale": 1.0, **options},
        )
    finally:
        handle.remove()
    inputs, output = seen[1]
    return inputs, output


def of_family(family, inputs, prompts=(PROMPT,)):
    """Return the family's prediction for the same latents, timestep and prompts, as the pipeline's loop shapes it."""
    latents, timestep = inputs.get("sample", inputs.get("hidden_states")), inputs["timestep"]
    rows, packed = len(prompts), family.name == "Flux.1"
    if packed:
        scale = family.pipe.vae_scale_factor
        latents, timestep = family.pipe._unpack_latents(latents, HEIGHT, WIDTH, scale), timestep * 1000
    sizes = torch.tensor([SIZES] * rows)
    with torch.no_grad():
        made = family.predict(latents, timestep.expand(rows), family.encode(prompts), sizes)
    return family.pipe._pack_latents(made, *made.shape) if packed else made


@each
def test_prediction_is_the_pipelines(pipe):
    inputs, output = of_pipeline(pipe)
    torch.testing.assert_close(of_family(family_of(pipe), inputs), output, rtol=0, atol=1e-6)


@each
def test_every_input_counts(pipe):
    """The comparison above would not hold for another prompt, timestep or size."""
    family = family_of(pipe)
    inputs, output = of_pipeline(pipe, (PROMPT, "a dog"))
    torch.testing.assert_close(of_family(family, inputs, (PROMPT, "a dog")), output, rtol=0, atol=1e-6)
    assert (of_family(family, inputs, ("a dog", PROMPT)) - output).abs().max() > 1e-4
    later = {**inputs, "timestep": inputs["timestep"] * 0.5}
    assert (of_family(family, later, (PROMPT, "a dog")) - output).abs().max() > 1e-4


def test_sdxl_is_told_the_sizes(pipes):
    inputs, _ = of_pipeline(pipes["sdxl"])
    assert inputs["added_cond_kwargs"]["time_ids"].tolist() == [list(map(float, SIZES))]
    family = family_of(pipes["sdxl"])
    latents, text = torch.randn(1, 4, 8, 8), family.encode([PROMPT])
    one, other = (family.predict(latents, torch.tensor([9]), text, torch.tensor([s])) for s in (SIZES, SIZES[::-1]))
    assert (one - other).abs().max() > 1e-5


def test_flux_with_and_without_guidance(tiny):
    torch.manual_seed(0)
    pipe = tiny.build("flux")
    told = diffusers.FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=True)
    pipe.register_modules(transformer=told)
    inputs, output = of_pipeline(pipe, guidance_scale=3.5)
    torch.testing.assert_close(of_family(family_of(pipe, guidance=3.5), inputs), output, rtol=0, atol=1e-6)
    assert (of_family(family_of(pipe), inputs) - output).abs().max() > 1e-5
    with pytest.raises(RequestError, match="leave it out"):
        family_of(tiny.build("sd"), guidance=3.5)


@each
def test_bfloat16_with_float32_adapters(pipe, tiny):
    pipe = tiny.build({"Stable Diffusion": "sd", "SDXL": "sdxl", "Flux.1": "flux"}.get(family_of(pipe).name, "sd3"))
    pipe.to(torch.bfloat16)
    family = family_of(pipe)
    lora = LoraPipeline(pipe)
    lora.attach(rank=2, components=[family.denoiser_name, *tiny.ENCODERS["sd"]])
    tiny.fill(lora.denoiser)
    inputs, output = of_pipeline(pipe)
    made = of_family(family, inputs)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, output.float(), rtol=0, atol=1e-6)


def test_four_bits_and_compiled(tiny):
    pytest.importorskip("bitsandbytes")
    pipe = tiny.build("sdxl")
    lora = LoraPipeline(pipe, quantization={"unet": "nf4", "text_encoder": "nf4"})
    lora.attach(rank=2)
    tiny.fill(lora.denoiser)
    inputs, output = of_pipeline(pipe)
    pipe.unet = torch.compile(pipe.unet)
    with torch.compiler.set_stance("force_eager"):  # the wrapper is what counts here
        made = of_family(family_of(pipe), inputs)
    torch.testing.assert_close(made, output, rtol=0, atol=1e-5)


@each
def test_gradients_reach_the_text_encoders(pipe):
    family = family_of(pipe)
    for name in family.text_encoder_names:
        encoder = getattr(pipe, name)
        encoder.zero_grad()
    text = family.encode([PROMPT, "a dog"])
    assert all(len(value) == 2 for value in text.values())
    latents = torch.randn(2, 4, 8, 8)
    family.predict(latents, torch.tensor([1, 500]), text, torch.tensor([SIZES] * 2)).square().sum().backward()
    for name in family.text_encoder_names:
        total = sum(p.grad.abs().sum() for p in getattr(pipe, name).parameters() if p.grad is not None)
        assert total > 0, name


@each
def test_latents_are_the_pipelines(pipe):
    """Decoding as the pipeline does gives back what the VAE makes of its own posterior's mean."""
    family, vae = family_of(pipe), pipe.vae
    pixels = torch.rand(2, 3, HEIGHT, WIDTH) * 2 - 1
    moments = family.moments(pixels)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(moments["mean"], posterior.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments["std"], posterior.std, rtol=1e-5, atol=1e-6)
    noise = torch.randn_like(moments["mean"])
    latents = family.sample(moments, noise)
    back = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    torch.testing.assert_close(back, posterior.mean + posterior.std * noise, rtol=1e-5, atol=1e-5)
    alone = family.moments(pixels[1:])
    assert torch.equal(alone["mean"], moments["mean"][1:])  # to the bit, whatever is beside it


def test_the_vae_computes_in_float32_and_is_left_as_it_was(tiny):
    pipe = tiny.build("sdxl")
    pipe.vae.to(torch.float16)
    exact = tiny.build("sdxl").vae.half().float()
    before = {name: (p.data_ptr(), p.dtype) for name, p in pipe.vae.named_parameters()}
    pixels = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        moments = family_of(pipe).moments(pixels)
    with torch.no_grad():
        assert torch.equal(moments["mean"], exact.encode(pixels).latent_dist.mean)
    assert before == {name: (p.data_ptr(), p.dtype) for name, p in pipe.vae.named_parameters()}


def test_a_tiled_vae(tiny):
    pipe = tiny.build("sd")
    pixels = torch.rand(1, 3, 32, 48)
    whole = family_of(pipe).moments(pixels)["mean"]
    pipe.vae.enable_tiling()
    made = family_of(pipe).moments(pixels)["mean"]
    with torch.no_grad():
        assert torch.equal(made, pipe.vae.encode(pixels).latent_dist.mean)
    assert made.shape == whole.shape
    assert not torch.equal(made, whole)


def test_latents_scaled_by_channel(tiny):
    pipe = tiny.build("sdxl")
    mean, std = [0.1, -0.2, 0.3, 0.0], [2.0, 1.0, 0.5, 4.0]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    moments = {"mean": torch.randn(1, 4, 8, 8), "std": torch.zeros(1, 4, 8, 8)}
    made = family_of(pipe).sample(moments, torch.zeros(1, 4, 8, 8))
    scale = torch.tensor(std).view(1, 4, 1, 1) / pipe.vae.config.scaling_factor
    torch.testing.assert_close(made * scale + torch.tensor(mean).view(1, 4, 1, 1), moments["mean"])


def test_sizes_that_do_not_divide(pipes):
    assert {kind: family_of(pipe).multiple for kind, pipe in pipes.items()} == {"sd": 2, "sdxl": 2, "sd3": 4, "flux": 4}
    assert [family_of(pipes[kind]).resolution for kind in KINDS] == [16, 16, 16, 256]
    with pytest.raises(RequestError, match="multiples of 4"):
        family_of(pipes["flux"]).moments(torch.zeros(1, 3, 18, 16))


def test_the_empty_caption_is_what_guidance_takes(pipes):
    family = family_of(pipes["sdxl"])
    text = family.encode(["", PROMPT])
    assert not text["embeds"][0].any()
    assert not text["pooled"][0].any()
    assert text["embeds"][1].any()
    said = family_of(pipes["sd"]).encode([""])["embeds"]
    with torch.no_grad():
        _, unconditional = pipes["sd"].encode_prompt(PROMPT, "cpu", 1, True)
    torch.testing.assert_close(said, unconditional)


def test_sd3_without_t5(tiny):
    pipe = tiny.build("sd3")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    family = family_of(pipe)
    assert family.text_encoder_names == ["text_encoder", "text_encoder_2"]
    inputs, output = of_pipeline(pipe)
    torch.testing.assert_close(of_family(family, inputs), output, rtol=0, atol=1e-6)


def test_parts_may_go_once_they_are_not_needed(tiny):
    for kind in KINDS:
        pipe = tiny.build(kind)
        family = family_of(pipe)
        text = family.encode([PROMPT])
        for name in ("vae", *family.text_encoder_names):
            setattr(pipe, name, None)
        assert family.predict(torch.randn(1, 4, 8, 8), torch.tensor([5]), text, torch.tensor([SIZES])).isfinite().all()
        with pytest.raises(StateError, match="bring it back"):
            family.encode([PROMPT])
        with pytest.raises(StateError, match="vae is put away"):
            family.moments(torch.zeros(1, 3, 16, 16))


def test_other_pipelines_are_refused(tiny):
    pipe = tiny.build("sd")
    pipe.register_modules(unet=tiny.unet(in_channels=9))
    with pytest.raises(UnsupportedError, match="takes 9 channels"):
        family_of(pipe)
    pipe.register_modules(unet=tiny.unet(time_cond_proj_dim=8))
    with pytest.raises(UnsupportedError, match="time_cond_proj_dim"):
        family_of(pipe)
    pipe = tiny.build("sd")
    pipe.register_modules(text_encoder=None)
    with pytest.raises(UnsupportedError, match="no text_encoder"):
        family_of(pipe)
    pipe = tiny.build("sd")
    pipe.register_modules(vae=None)
    with pytest.raises(UnsupportedError, match="AutoencoderKL"):
        family_of(pipe)
    with pytest.raises(UnsupportedError, match="knows the pipelines"):
        family_of(diffusers.DDPMPipeline(diffusers.UNet2DModel(block_out_channels=(32, 64), **BLOCKS), None))


def test_siblings_and_subclasses_are_known(tiny):
    pipe = tiny.build("sdxl")
    other = diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    assert family_of(other).name == "SDXL"

    class Mine(diffusers.StableDiffusionPipeline):
        pass

    parts = tiny.build("sd").components
    assert family_of(Mine(**parts, requires_safety_checker=False)).name == "Stable Diffusion"


BLOCKS = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)

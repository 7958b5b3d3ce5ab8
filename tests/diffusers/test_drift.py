"""The drift of a denoiser is what running both models gives."""

from __future__ import annotations

import pytest
import torch
from lora_adapters_diffusers import LoraPipeline
from lora_adapters_diffusers.example_inputs import record

from lora_adapters.drift import measure_drift
from lora_adapters.errors import RequestError

pytest.importorskip("bitsandbytes")
CALL = dict(prompt="a cat", height=16, width=16, num_inference_steps=2, output_type="latent")


def test_the_total_is_what_the_quantized_denoiser_gives(tiny):
    lora = LoraPipeline(tiny.build("sd"))
    before = {key: value.clone() for key, value in lora.denoiser.state_dict().items()}
    modules = dict(lora.denoiser.named_modules())
    torch.manual_seed(0)
    report = lora.drift(**CALL)
    assert report.inputs == 2
    assert {part.part for part in report.parts} == {"attention", "mlp", "conv", "time", "other"}
    assert sum(part.layers for part in report.parts) == report.total.layers
    assert sum(part.saved for part in report.parts) == report.total.saved > 0
    assert all(0 < part.error < 1 and part.cosine < 1 for part in (report.total, *report.parts))
    assert [part.error for part in report.parts] == sorted((p.error for p in report.parts), reverse=True)
    assert [line.split()[0] for line in str(report).splitlines()[2:7]] == [part.part for part in report.parts]
    assert dict(lora.denoiser.named_modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in lora.denoiser.state_dict().items())
    torch.manual_seed(0)
    inputs = record(lora.pipe, lora.denoiser, **CALL)
    packed = LoraPipeline(tiny.build("sd"), quantization={"unet": "nf4"}).denoiser
    with torch.no_grad():
        dense, four = (torch.stack([m(**each)[0] for each in inputs]) for m in (lora.denoiser, packed))
    assert report.total.error == pytest.approx(((four - dense).norm() / dense.norm()).item(), rel=1e-3)


def test_parts_that_cost_nothing_and_parts_that_cost_most(tiny):
    lora = LoraPipeline(tiny.build("sd"))
    with torch.no_grad():
        for name, parameter in lora.denoiser.named_parameters():
            if ".ff." in name and name.endswith("weight"):
                parameter.zero_()  # which 4 bits hold exactly
        for resnet in lora.denoiser.mid_block.resnets:
            for norm, conv in ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2)):
                # Large weights that meet zeros only: the output is as before, but beside them a block of 64 loses the rest.
                norm.weight[::7] = norm.bias[::7] = 0.0
                conv.weight[:, ::7] = 1000.0
    roles = {part.part: part for part in lora.drift().parts}
    assert roles["mlp"].error == 0.0
    assert roles["mlp"].cosine == 1.0
    assert next(iter(roles)) == "conv"
    blocks = lora.drift(by="block")
    assert blocks.parts[0].part == "mid_block"
    assert {part.part for part in blocks.parts} >= {"down_blocks.0", "up_blocks.1", "time_embedding"}
    kept = lora.drift(quantization={"attention+mlp": "nf4"}).total
    assert kept.error < blocks.total.error


@pytest.mark.parametrize("kind", ["sdxl", "flux", "sd3"])
def test_other_denoisers_and_text_encoders(tiny, kind):
    lora = LoraPipeline(tiny.build(kind))
    call = CALL | ({} if kind == "sdxl" else {"max_sequence_length": 16})
    assert lora.drift(**call).total.error > 0
    if kind == "sd3":
        assert lora.drift(by="block").inputs == 4
    report = lora.drift("text_encoder_2", by=lambda name: "fc" if "fc" in name or "Dense" in name else "rest", **call)
    assert {part.part for part in report.parts} == {"fc", "rest"}


def test_what_can_not_be_measured(tiny):
    lora = LoraPipeline(tiny.build("sd"))
    with pytest.raises(RequestError, match="by must be"):
        lora.drift(by="layer")
    with pytest.raises(RequestError, match="stay dense"):
        lora.drift("vae")
    with pytest.raises(RequestError, match="no input"):
        measure_drift(lora.denoiser, inputs=[])
    lora.attach(rank=2)
    with pytest.raises(RequestError, match="already carries an adapter"):
        lora.drift()
    with pytest.raises(RequestError, match="quantized already"):
        LoraPipeline(tiny.build("sd"), quantization="nf4").drift()

"""timm models on CUDA: training on dense and 4-bit bases in mixed precision, merging, saving, averages."""

import pytest
import timm
import torch
from lora_adapters_timm import TimmLoraModel

from lora_adapters.ema import AdapterEma

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MODELS = {
    "vit_tiny_patch16_224": dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4),
    "beit_base_patch16_224": dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4),
    "test_resnet": {},
    "test_nfnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
}


def build(name, **options):
    torch.manual_seed(0)
    base = timm.create_model(name, num_classes=4, **MODELS[name]).cuda()
    return TimmLoraModel(base, rank=2, attach_options={"seed": 0}, **options)


def images(rows=6):
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("name", list(MODELS))
def test_it_trains_saves_and_merges(name, quantization, autocast, tmp_path):
    model = build(name, quantization=quantization)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer, ema = torch.optim.AdamW(trained, lr=1e-2), AdapterEma(model, 0.5)
    labels, losses = torch.arange(6).cuda() % 4, []
    for step in range(1, 31):
        model.train()
        with torch.autocast("cuda", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = torch.nn.functional.cross_entropy(model(images()).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model, step)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    model.eval()
    with torch.no_grad():
        expected = model(images())
        again = build(name, quantization=quantization)
        model.save(tmp_path / "adapter")
        again = TimmLoraModel.from_pretrained(tmp_path / "adapter", again.adapter.detach()).eval()
        torch.testing.assert_close(again(images()), expected)
        model.save_merged(tmp_path / "merged")
        plain = timm.create_model(
            name, num_classes=4, checkpoint_path=tmp_path / "merged" / "model.safetensors", **MODELS[name]
        )
        size = expected.abs().max()
        assert (plain.cuda().eval()(images()) - expected).abs().max() <= 2e-3 * size
        assert torch.equal(model(images()), expected)

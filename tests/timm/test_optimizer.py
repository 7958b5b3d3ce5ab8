"""timm's optimizers take a TimmLoraModel: layer decay gives each adapter the scale of the layer that it is on."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from timm_models import FAMILIES, VIT, images, lora, plain


def scales(model, **options):
    """Return name -> (lr_scale, weight_decay) of every trainable parameter."""
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7, **options)
    of = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("which", FAMILIES, ids=lambda w: w[0])
def test_adapters_have_the_scale_that_timm_gives_their_layer(which):
    theirs = scales(plain(which))
    ours = scales(lora(which))
    assert len({scale for scale, _ in ours.values()}) > 2
    for name, (scale, _) in ours.items():
        if ".lora_" in name:
            own = name.partition(".lora_")[0] + ".weight"
        else:
            own = name.replace(".modules_to_save.default.", ".")
        assert scale == pytest.approx(theirs[own][0]), name


def test_coarse_groups_are_timms():
    names = timm.models.group_parameters(lora(), lora().group_matcher(coarse=True), reverse=True)
    theirs = timm.models.group_parameters(plain(), plain().group_matcher(coarse=True), reverse=True)
    for key, layer in names.items():
        own = key.partition(".lora_")[0] + ".weight" if ".lora_" in key else key
        own = own.replace(".base_layer.", ".").replace(".modules_to_save.default", "").replace(".original_module", "")
        assert layer == theirs[own], key


def test_the_optimizer_holds_exactly_what_trains():
    model = lora().train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.7)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    x, y = images(batch=6), torch.tensor([0, 1, 2, 3, 4, 0])
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_what_timm_keeps_from_weight_decay_is_kept():
    model = lora()
    assert model.no_weight_decay() == plain().no_weight_decay()
    decays = scales(model)
    assert decays["head.modules_to_save.default.bias"][1] == 0
    assert decays["blocks.0.attn.qkv.lora_A.default.weight"][1] == 0.05


def test_a_frozen_stage_by_name_is_found():
    # timm's own patterns, applied to the wrapper's names, must find what they find on the plain model.
    import re

    model = lora(VIT)
    patterns = plain(VIT).group_matcher()["blocks"]
    pattern = patterns if isinstance(patterns, str) else patterns[0][0]
    assert {re.match(pattern, n).group(1) for n, _ in model.named_parameters() if re.match(pattern, n)} == {
        "0",
        "1",
        "2",
    }

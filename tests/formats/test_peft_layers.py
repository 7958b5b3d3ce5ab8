"""LoHa, LoKr and LoRA of a file as layers of PEFT, which must then do to a model what the factors say."""

import peft
import pytest
from format_models import loha, lokr, lora, tucker, values
from torch import nn

from lora_adapters.formats.peft_layers import as_peft, why_not_loha

LINEAR, CONV = (24, 16), (24, 16, 3, 3)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_out = nn.Linear(16, 24)
        self.inner = nn.ModuleDict({"proj_out": nn.Linear(16, 24), "conv": nn.Conv2d(16, 24, 3)})


CASES = {
    "LoHa": ("LOHA", {"proj_out": loha(LINEAR), "inner.conv": loha(CONV)}),
    "LoHa, ranks": ("LOHA", {"proj_out": loha(LINEAR, rank=2, alpha=5.0), "inner.proj_out": loha(LINEAR, rank=4)}),
    "LoHa with cores": ("LOHA", {"proj_out": loha(LINEAR), "inner.conv": loha(CONV, core=True)}),
    "LoKr": ("LOKR", {"inner.proj_out": lokr(LINEAR, (4, 4), rank=2), "inner.conv": lokr(CONV, (4, 4), rank=2)}),
    "LoKr by a factor": ("LOKR", {"inner.proj_out": lokr(LINEAR, (2, 2), rank=3)}),
    "LoKr whole": (
        "LOKR",
        {"proj_out": lokr(LINEAR, (4, 4), w2="whole"), "inner.conv": lokr(CONV, (4, 4), w2="whole")},
    ),
    "LoKr with a core": ("LOKR", {"inner.conv": lokr(CONV, (4, 4), rank=2, w2="core")}),
    "LoKr of products": ("LOKR", {"inner.proj_out": lokr(LINEAR, (4, 4), rank=1, w1="product")}),
    "LoKr of other shapes": ("LORA", {"inner.proj_out": lokr(LINEAR, (6, 2), rank=2)}),
    "LoRA": ("LORA", {"proj_out": lora(LINEAR, 3, 5.0), "inner.conv": lora(CONV, 2, 5.0)}),
    "Tucker": ("LORA", {"inner.conv": tucker(CONV)}),
    "two kinds": ("LORA", {"proj_out": loha(LINEAR), "inner.conv": lora(CONV)}),
    "cores in one only": ("LORA", {"inner.conv": loha(CONV, core=True), "inner.proj_out": lokr(LINEAR)}),
}


@pytest.mark.parametrize("peft_type, modules", CASES.values(), ids=CASES)
def test_pefts_layers_do_what_the_factors_say(peft_type, modules):
    form = as_peft("unet", modules)
    assert form.peft_type == peft_type
    assert bool(form.notes) == any(
        factors.kind != "LoRA" or "mid" in factors.tensors for factors in modules.values()
    ) * (peft_type == "LORA")
    config = {"LORA": peft.LoraConfig, "LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}[form.peft_type](**form.fields)
    model = peft.inject_adapter_in_model(config, Block())
    loaded = peft.set_peft_model_state_dict(model, dict(form.tensors))
    assert not loaded.unexpected_keys
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    assert set(layers) == set(modules)
    for name, factors in modules.items():
        found, wanted = layers[name].get_delta_weight("default").double(), factors.update()
        assert found.shape == wanted.shape
        assert (found - wanted).norm() <= 1e-6 * wanted.norm(), name


def test_why_not():
    assert why_not_loha(CASES["LoHa"][1]) == ""
    assert "is LoRA" in why_not_loha(CASES["two kinds"][1])
    assert "cores" in why_not_loha({"a": loha(CONV, core=True), "b": loha(CONV)})
    from dataclasses import replace

    assert "DoRA" in why_not_loha({"a": replace(loha(LINEAR), magnitude=values(24))})
    assert "two ranks" in why_not_loha({"a": replace(loha(LINEAR), w2_a=values(24, 5), w2_b=values(5, 16))})
    assert as_peft("unet", {"a.b": loha(LINEAR)}).peft_type == "LOHA"

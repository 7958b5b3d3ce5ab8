"""A sample of timm's sweep (`make sweep` runs the whole), and that every module of timm has a case."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SAMPLE = (
    "test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_byobnet", "levit_128s", "test_nfnet",
    "dla46x_c", "swin_tiny_patch4_window7_224", "beit_base_patch16_224", "test_coatnet", "efficientvit_m0",
)  # fmt: skip


@pytest.fixture(scope="module")
def sweep():
    """The sweep's modules, importable while this file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield {name: importlib.import_module(f"sweep_{name}") for name in ("cases", "check")}


def test_every_module_of_timm_has_one_case(sweep):
    cases = sweep["cases"]
    named = [case.module for case in cases.FAMILIES]
    assert len(named) == len(set(named))
    assert set(cases.modules()) - set(named) == set()


@pytest.mark.parametrize("name", SAMPLE)
def test_an_adapters_life(sweep, name):
    case = next(c for c in sweep["cases"].FAMILIES if c.model == name)
    assert sweep["check"].check(case).problems == {"roles": [], "fp32": [], "nf4": []}

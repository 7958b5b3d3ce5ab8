"""Parts of messages."""

import pytest
from lora_adapters_transformers import loading
from transformers import AutoConfig

from lora_adapters import LoraAdaptersError
from lora_adapters.error_text import did_you_mean, first_line


def test_first_line():
    assert first_line(OSError("\n no such file \nsecond line")) == "no such file"
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(ValueError(" \n ")) == "ValueError"


def test_did_you_mean():
    assert did_you_mean("rnak", ["alpha", "rank"]) == " Did you mean 'rank'?"
    assert did_you_mean("rnak", ["alpha"]) == ""
    assert did_you_mean("rnak", {"rank": 1}, cutoff=0.99) == ""


def test_an_error_that_says_nothing_is_told_by_its_class(monkeypatch):
    def fail(*args, **options):
        raise OSError

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(LoraAdaptersError, match="'some/model' can't be loaded: OSError"):
        loading.read_config("some/model", {}, {})

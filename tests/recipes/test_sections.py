"""What the recipes' sections have in common."""

import pytest
from lora_adapters_diffusers.recipes import SubjectData
from lora_adapters_timm.recipes import ImageData
from lora_adapters_transformers.recipes import TextData
from pydantic import ValidationError

THREE = "eval, eval_split and eval_fraction are three ways to say the same: give one"
TWO = "eval and eval_fraction are two ways to say the same: give one"


@pytest.mark.parametrize(
    ("section", "least", "message"),
    [
        (TextData, {"train": "rows.jsonl"}, THREE),
        (ImageData, {"train": "images"}, THREE),
        (SubjectData, {"images": "images", "prompt": "a photo of sks dog"}, TWO),
    ],
)
def test_there_is_one_way_to_evaluate(section, least, message):
    section(**least, eval="there")
    section(**least, eval=None, eval_fraction=0.5)
    with pytest.raises(ValidationError, match=message):
        section(**least, eval="there", eval_fraction=0.5)

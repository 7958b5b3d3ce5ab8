"""target_modules written for stock PEFT mean exactly the planned modules to it."""

import re

from hypothesis import given
from hypothesis import strategies as st

from lora_adapters.naming import patterns_for, target_modules_for

PART = st.sampled_from(["q", "v", "attn", "layers", "0", "1", "2", "11", "conv1", "layer1", "a_b"])
NAME = st.lists(PART, min_size=1, max_size=4).map(".".join)


def peft_matches(targets, name):
    """PEFT's documented rule for target_modules."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith("." + t) for t in targets)


@given(st.sets(NAME, min_size=1, max_size=12), st.data())
def test_exactly_the_wanted_names_match(universe, data):
    wanted = data.draw(st.sets(st.sampled_from(sorted(universe)), min_size=1))
    targets = target_modules_for(wanted, universe)
    assert {name for name in universe if peft_matches(targets, name)} == wanted


@given(st.sets(NAME, min_size=1, max_size=12), st.data())
def test_pattern_keys_match_exactly(universe, data):
    wanted = data.draw(st.sets(st.sampled_from(sorted(universe)), min_size=1))
    keys = patterns_for(wanted, universe)
    matched = {name for name in universe if any(re.match(rf"(.*\.)?({key})$", name) for key in keys)}
    assert matched == wanted


def test_short_names_where_they_are_enough():
    universe = ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]
    assert target_modules_for(["layers.0.q", "layers.1.q"], universe) == ["q"]
    assert target_modules_for(["layers.1.q"], universe) == r"layers\.1\.q"

"""adapter_config.json as untrusted data: typed errors, quickly, and nothing it names is imported."""

import contextlib
import json
import sys
import tracemalloc
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_adapters.adapter_config import CONFIG_NAME, parse_config, read_config
from lora_adapters.errors import CheckpointError, LoraAdaptersError, UnsupportedError
from lora_adapters.name_patterns import NamePattern, PatternMap

PLAIN = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": ["q_proj"],
}


def parse(**fields):
    return parse_config(json.dumps(PLAIN | fields).encode())


@pytest.mark.parametrize(
    "field, value",
    [
        *[("r", value) for value in (10**6, 0, -4, "8", True, 4.0, None, [], 10**400)],
        *[("lora_alpha", value) for value in (float("inf"), float("nan"), "8", True, None, 1e300)],
        *[("lora_dropout", value) for value in (-0.1, 1.5, "0", None, True)],
        *[("rank_pattern", value) for value in ({"q_proj": 10**8}, {"q_proj": "4"}, {"q_proj": True}, [], "x")],
        *[("alpha_pattern", value) for value in ({"q_proj": float("nan")}, {"q_proj": "4"}, 4)],
        *[("target_modules", value) for value in (4, [4], {"a": 1}, ["a\nb"], [["q"]], True)],
        *[("modules_to_save", value) for value in ("lm_head", [1], ["x"] * 1000, {})],
        *[("bias", value) for value in ("some", None, 1)],
        *[("use_dora", value) for value in ("yes", 1, [])],
        *[("init_lora_weights", value) for value in ("os.system", "pissa_niter_99999", 1, [])],
        *[("loftq_config", value) for value in ([], {"loftq_bits": 4, "x": 1}, {"loftq_iter": 10**9})],
        *[("task_type", value) for value in ("X", 1)],
        *[("megatron_core", value) for value in ("evil_package", 1)],
        *[("megatron_config", value) for value in ({"a": 1}, [1])],
        *[("something_new", value) for value in (True, 1, "x", {"a": 1})],
    ],
)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(CheckpointError, match=field):
        # NaN and Infinity as words fail before any field is looked at; 1e999 is JSON that reads as infinity.
        parse_config(json.dumps(PLAIN | {field: value}).replace("NaN", "1e999").replace("Infinity", "1e999").encode())


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_words_that_are_not_json_numbers_are_refused(word):
    with pytest.raises(CheckpointError, match="not a JSON number"):
        parse_config(json.dumps(PLAIN).replace('"lora_alpha": 8', f'"lora_alpha": {word}').encode())


def test_empty_or_default_unknown_fields_are_accepted():
    config = parse(
        new_a=None, new_b=False, new_c={}, new_d=[], new_e="", megatron_core="megatron.core", loftq_config={}
    )
    assert config.r == 4
    assert "new_a" not in config.values


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", "ADALORA"])
def test_other_methods_point_at_stock_peft(kind):
    with pytest.raises(UnsupportedError, match="PeftModel"):
        parse(peft_type=kind)


@pytest.mark.parametrize(
    "field", ["layer_replication", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora"]
)
def test_variants_only_peft_has_are_unsupported(field):
    with pytest.raises(UnsupportedError, match=field):
        parse(**{field: {"a": 1}})


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"3", b"{", b"\xff\xfe", b"[" * 100_000, b'{"r": 1, "r": 2}', b"{" + b'"a":{' * 50_000, b"9" * 5000],
)
def test_broken_json_is_a_typed_error(data):
    with pytest.raises(CheckpointError):
        parse_config(data)


def test_an_oversized_file_is_refused_before_it_is_parsed(tmp_path):
    (tmp_path / CONFIG_NAME).write_bytes(b'{"a": "' + b"x" * 30_000_000 + b'"}')
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="larger"):
        read_config(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_huge_ranks_allocate_nothing():
    tracemalloc.start()
    for fields in ({"r": 10**6}, {"rank_pattern": {"q_proj": 10**8}}):
        with pytest.raises(CheckpointError):
            parse(**fields)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_nothing_the_file_names_is_imported(tmp_path, monkeypatch):
    package = tmp_path / "evil_package"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = parse(
        auto_mapping={"base_model_class": "Model", "parent_library": "evil_package"},
        eva_config={"x": "evil_package"},
        runtime_config={"x": "evil_package"},
    )
    built = config.to_lora_config()
    assert built.auto_mapping is None
    for field in ("megatron_core", "peft_type", "init_lora_weights", "task_type"):
        with pytest.raises(LoraAdaptersError):
            parse(**{field: "evil_package"})
    assert "evil_package" not in sys.modules
    assert not (tmp_path / "ran").exists()


CATASTROPHIC = [
    "(a+)+$",
    "(a|a)*b",
    "(.*)*x",
    "(?=a)a",
    r"(a)\1",
    "a{1,99999}",
    "((a?){50}){50}",
    "(" * 5000,
    "a++",
    "*a",
]


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_patterns_that_could_hang_are_refused(pattern):
    with pytest.raises(CheckpointError):
        NamePattern(pattern)


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_a_catastrophic_target_is_never_run(pattern):
    assert parse(target_modules=pattern).expected_targets(["a" * 5000 + "!"]) is None


def matches(pattern, name):
    return PatternMap({pattern: True}).look_up([name], False)[name]


def test_many_wildcards_end_in_bounded_work():
    patterns = {".*a" * 40 + str(index): 1 for index in range(200)}
    with pytest.raises(CheckpointError, match="too long"):
        PatternMap(patterns).look_up(["a" * 2000] * 2000, 1)


def test_long_patterns_are_refused_before_they_are_expanded():
    for pattern in ("(a|b)" * 12 + "a" * 60_000, "a" * 60_000, "|".join(["(a|b)" * 11] * 50), "b" * 70_000):
        with pytest.raises(CheckpointError):
            NamePattern(pattern)


WORDS = st.text("ab.1", min_size=1, max_size=8)
PIECES = st.sampled_from(
    ["a", "b", r"\.", ".", ".*", "a*", "b+", "1?", r"\d", r"\d+", "[ab]", "[^a]+", "(a|b1)", "(?:a|.b|1)"]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=6).map("".join), WORDS, st.booleans(), st.booleans())
def test_the_matcher_agrees_with_pefts_rule(body, name, start, end):
    from peft.utils.other import get_pattern_key

    pattern = "^" * start + body + "$" * end
    # PEFT answers with the pattern where it matches and with the name where it doesn't.
    expected = get_pattern_key([f"({pattern})"], name) != name
    assert matches(pattern, name) == expected


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(r"ab.*+?()[]|\^$1{},-d"), max_size=12), WORDS)
def test_a_pattern_is_refused_or_matched_as_re_does(pattern, name):
    import re

    try:
        mine = matches(pattern, name)
    except CheckpointError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert mine == bool(re.match(rf"(.*\.)?({pattern})$", name)), pattern


def test_ranks_and_alphas_follow_the_first_pattern():
    config = parse(rank_pattern={r"layers\.[0-3]\..*q_proj": 2, "q_proj": 3}, alpha_pattern={"^a.v_proj": 5.5})
    assert config.ranks(["layers.1.x.q_proj", "layers.5.x.q_proj", "k_proj"]) == {
        "layers.1.x.q_proj": 2,
        "layers.5.x.q_proj": 3,
        "k_proj": 4,
    }
    assert config.alphas(["a.v_proj", "b.a.v_proj"]) == {"a.v_proj": 5.5, "b.a.v_proj": 8}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ],
)
def test_expected_targets_are_those_peft_adapts(fields):
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **fields)).targeted_module_names
    assert parse(r=2, **fields).expected_targets(names) == set(adapted)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELD_NAMES = [
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "bias",
    "x",
]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELD_NAMES), JSON, max_size=4))
def test_any_json_gives_a_config_or_a_typed_error(fields):
    try:
        config = parse(**fields)
        config.ranks(["a.q_proj"])
        config.expected_targets(["a.q_proj"])
    except LoraAdaptersError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_mutated_bytes_give_a_config_or_a_typed_error(data):
    raw = bytearray(json.dumps(PLAIN | {"rank_pattern": {"q": 2}, "task_type": None}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(LoraAdaptersError):
        parse_config(bytes(raw))

"""A merged checkpoint is the adapted model, and whatever goes wrong leaves everything as it was."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import llama, perturb, tokens
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import lora_adapters as la
from lora_adapters import merge
from lora_adapters.errors import CheckpointError, DoesNotFitError, LoraAdaptersError, RequestError, UnsupportedError
from lora_adapters.hooks.specs import BackendSpec
from lora_adapters.layers.engine import EngineLayer

IDS = tokens() % 32
CLASSIFIER, CAUSAL = tf.AutoModelForSequenceClassification, tf.AutoModelForCausalLM


def bert(cls=tf.BertModel, **options):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=32)
    return cls(tf.BertConfig(**sizes, **options))


def t5():
    torch.manual_seed(0)
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=32)
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def vit():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=7))


@dataclass
class Case:
    """A base as its checkpoint holds it, and the class and head that the adapter was trained with."""

    base: Callable[[], Any]
    auto: Any
    attach: dict[str, Any]
    head: dict[str, Any]
    merged: str


ATTENTION = dict(rank=4, alpha=8, targets="attention")
CASES = {
    "causal": Case(llama, CAUSAL, ATTENTION | {"targets": "all-linear"}, {}, "LlamaForCausalLM"),
    "tied": Case(lambda: llama(tie_word_embeddings=True), CAUSAL, ATTENTION, {}, "LlamaForCausalLM"),
    "classifier on an encoder": Case(bert, CLASSIFIER, ATTENTION, {"num_labels": 3}, "BertForSequenceClassification"),
    "classifier on a language model": Case(
        llama, CLASSIFIER, ATTENTION, {"num_labels": 4, "pad_token_id": 0}, "LlamaForSequenceClassification"
    ),
    "classifier with two classes, as its config says anyway": Case(
        bert, CLASSIFIER, ATTENTION, {}, "BertForSequenceClassification"
    ),
    "classifier over a head of other classes": Case(
        lambda: bert(tf.BertForSequenceClassification, num_labels=5),
        CLASSIFIER,
        ATTENTION,
        {"num_labels": 3, "ignore_mismatched_sizes": True},
        "BertForSequenceClassification",
    ),
    "token classifier": Case(
        bert, tf.AutoModelForTokenClassification, ATTENTION, {"num_labels": 6}, "BertForTokenClassification"
    ),
    "encoder-decoder": Case(t5, tf.AutoModelForSeq2SeqLM, ATTENTION, {}, "T5ForConditionalGeneration"),
    "image classifier, which has no task type": Case(
        vit,
        tf.AutoModelForImageClassification,
        ATTENTION | {"modules_to_save": ["classifier"]},
        {"num_labels": 3, "ignore_mismatched_sizes": True},
        "ViTForImageClassification",
    ),
    "DoRA": Case(llama, CAUSAL, ATTENTION | {"use_dora": True}, {}, "LlamaForCausalLM"),
}


def logits(model):
    if model.config.model_type == "vit":
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        inputs = {"pixel_values": pixels}
    elif model.config.is_encoder_decoder:
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    else:
        inputs = {"input_ids": IDS}
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def tokenizer():
    inner = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def make(folder: Path, case: Case) -> torch.Tensor:
    """Write folder/base and folder/adapter. Returns what the adapted model computes."""
    case.base().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    model = case.auto.from_pretrained(folder / "base", **case.head)
    untrained = logits(model)
    adapter = la.attach(model, **case.attach)
    perturb(model)
    adapter.save(folder / "adapter")
    expected = logits(adapter.model)
    assert not torch.allclose(untrained, expected, atol=1e-2)
    return expected


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that gives a case's folder, made once, and its expected logits."""
    made = {}

    def give(name: str) -> tuple[Path, torch.Tensor]:
        if name not in made:
            folder = tmp_path_factory.mktemp("case")
            made[name] = (folder, make(folder, CASES[name]))
        return made[name]

    return give


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", CASES)
def test_the_merged_checkpoint_computes_what_the_adapted_model_and_stock_peft_compute(saved, name, tmp_path):
    case, (folder, expected) = CASES[name], saved(name)
    before = everything(folder)
    made = la.merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "out")
    assert everything(folder) == before
    assert (made.folder, made.model, made.dtype) == (tmp_path / "out", case.merged, "float32")
    model, info = case.auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == case.merged
    assert not any(info.values()), info
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    stock = PeftModel.from_pretrained(case.auto.from_pretrained(folder / "base", **case.head), folder / "adapter")
    torch.testing.assert_close(logits(model), logits(stock.merge_and_unload()), rtol=1e-4, atol=1e-5)
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out")("a b x")["input_ids"] == [3, 4, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert made.nbytes == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*"))
    assert not [p for p in (tmp_path / "out").iterdir() if "adapter" in p.name]
    assert str(folder) not in (tmp_path / "out/config.json").read_text()


def test_what_stock_peft_saved_is_merged_too(saved, tmp_path):
    folder, expected = saved("classifier on an encoder")
    case = CASES["classifier on an encoder"]
    base = case.auto.from_pretrained(folder / "base", **case.head)
    PeftModel.from_pretrained(base, folder / "adapter").save_pretrained(tmp_path / "stock")
    la.merge_checkpoint(folder / "base", tmp_path / "stock", tmp_path / "out")
    model = case.auto.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 3
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "classifier on a language model", "encoder-decoder"])
def test_bf16_is_the_sum_in_fp32_rounded_once(saved, name, tmp_path):
    """The base is rounded when it is loaded, W + scaling * B @ A once more: nothing in between is."""
    case, (folder, _) = CASES[name], saved(name)
    made = la.merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "out", dtype="bfloat16")
    assert made.dtype == "bfloat16"
    merged = case.auto.from_pretrained(tmp_path / "out")
    assert merged.config.dtype == torch.bfloat16
    base = case.auto.from_pretrained(folder / "base", dtype=torch.bfloat16, **case.head).float()
    exact = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().state_dict()
    for key, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, exact[key].to(torch.bfloat16), rtol=2**-7, atol=1e-6)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_auto_keeps_the_checkpoints_dtype(saved, tmp_path):
    folder, _ = saved("causal")
    CASES["causal"].base().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    assert la.merge_checkpoint(tmp_path / "base", folder / "adapter", tmp_path / "out").dtype == "bfloat16"


def test_merging_keeps_no_second_copy_of_the_weights(saved, tmp_path, monkeypatch):
    folder, _ = saved("causal")
    kept = []
    unload = merge.unload

    def counted(peft_model):
        kept.extend(m._aside for m in peft_model.modules() if isinstance(m, EngineLayer))
        return unload(peft_model)

    monkeypatch.setattr(merge, "unload", counted)
    made = la.merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "out")
    assert kept == [()] * made.layers


# ---- what lies beside the model --------------------------------------------------------------------------------------


def test_a_tokenizer_in_the_adapters_folder_wins_whole(saved, tmp_path):
    folder, _ = saved("causal")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    own = tokenizer()
    own.add_tokens(["x"])
    own.save_pretrained(tmp_path / "adapter")
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "base/special_tokens_map.json").write_text("{}")  # of the base's tokenizer: must not be mixed in
    (tmp_path / "base/preprocessor_config.json").write_text("{}")
    made = la.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out")("a x")["input_ids"] == [3, 5]
    assert "special_tokens_map.json" not in made.copied
    assert "preprocessor_config.json" in made.copied
    assert made.notes == ()


def test_nothing_but_tokenizer_and_processor_files_is_copied(saved, tmp_path):
    folder, _ = saved("causal")
    shutil.copytree(folder / "base", tmp_path / "base")
    others = (
        "README.md",
        "optimizer.pt",
        "training_args.bin",
        "pytorch_model.bin",
        "run.py",
        ".env",
        "trainer_state.json",
    )
    for name in others:
        (tmp_path / "base" / name).write_text("x")
    (tmp_path / "base/additional_chat_templates").mkdir()
    (tmp_path / "base/additional_chat_templates/tools.jinja").write_text("x")
    made = la.merge_checkpoint(tmp_path / "base", folder / "adapter", tmp_path / "out")
    assert set(made.copied) == {"tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tools.jinja"}
    assert {"config.json", "generation_config.json", "model.safetensors", *made.copied} == {
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }


def test_a_link_out_of_the_adapters_folder_is_not_followed(saved, tmp_path):
    folder, _ = saved("causal")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "adapter/vocab.txt").symlink_to(tmp_path / "secret")
    made = la.merge_checkpoint(folder / "base", tmp_path / "adapter", tmp_path / "out")
    assert "tokenizer.json" in made.copied
    assert "vocab.txt" not in made.copied


def test_the_patterns_know_every_vocabulary_file_of_transformers():
    import re
    from fnmatch import fnmatchcase

    from lora_adapters_transformers.merging import _BESIDE

    source = Path(tf.__file__).parent / "models"
    tables = [
        table
        for path in source.glob("*/tokenization*.py")
        for table in re.findall(r"VOCAB_FILES_NAMES = \{([^}]*)\}", path.read_text(encoding="utf-8"))
    ]
    names = {name for table in tables for name in re.findall(r':\s*"([^"]+)"', table)}
    assert len(names) > 20
    assert [n for n in sorted(names) if not any(fnmatchcase(n, p) for p in _BESIDE[0][1])] == []


# ---- which base ------------------------------------------------------------------------------------------------------


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_adapters_config_names_the_base(saved, tmp_path):
    folder, _ = saved("causal")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path=str(folder / "base"))
    made = la.merge_checkpoint(None, tmp_path / "adapter", tmp_path / "out")
    assert (made.base, made.base_from) == (str(folder / "base"), "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path="org/another")
    made = la.merge_checkpoint(folder / "base", tmp_path / "adapter", tmp_path / "other")
    assert (made.base, made.base_from) == (str(folder / "base"), "argument")
    assert "'org/another'" in made.notes[0]


@pytest.mark.parametrize(
    ("named", "options", "message"),
    [
        (None, {}, "does not name its base. Give it: base="),
        ("nowhere/at-all", {}, "which the adapter's config names. Give it where it is now: base="),
        ("some/model", {"trust_remote_code": True}, "whoever made the adapter wrote"),
    ],
)
def test_a_base_that_the_config_can_not_give(saved, tmp_path, named, options, message):
    folder, _ = saved("causal")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path=named)
    with pytest.raises(LoraAdaptersError, match=message):
        la.merge_checkpoint(None, tmp_path / "adapter", tmp_path / "out", **options)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "its_own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_base_with_code_of_its_own_only_when_trusted(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(tf.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, expected = saved("causal")
    base, pair = tmp_path / "places/base", (tmp_path / "places/base", folder / "adapter")
    shutil.copytree(folder / "base", base)
    (base / "own.py").write_text(CODE)
    config = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "its_own_llama", "architectures": ["OwnForCausalLM"], "auto_map": own}
    (base / "config.json").write_text(json.dumps(config))
    refused(LoraAdaptersError, "trust_remote_code", *pair, tmp_path / "places/out")
    made = la.merge_checkpoint(*pair, tmp_path / "places/out", trust_remote_code=True)
    assert made.model == "OwnForCausalLM"
    shutil.rmtree(base)
    model = CAUSAL.from_pretrained(tmp_path / "places/out", trust_remote_code=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


# ---- refused before a weight is read ---------------------------------------------------------------------------------


def refused(error, message, base, adapter, out, reads=False, **options):
    """Assert an error that comes before the base's weights are read (unless `reads`) and changes nothing."""

    def read(*_, **__):
        raise AssertionError("the base's weights were read")

    before = everything(Path(out).parent)
    with pytest.MonkeyPatch.context() as patch:
        if not reads:
            patch.setattr(tf.PreTrainedModel, "from_pretrained", read)
        with pytest.raises(error, match=message):
            la.merge_checkpoint(base, adapter, out, **options)
    assert everything(Path(out).parent) == before


def test_a_wrong_adapter(saved, tmp_path):
    refused(
        CheckpointError, "made for another model", saved("encoder-decoder")[0] / "base", saved("causal")[0] / "adapter",
        tmp_path / "out", task="seq2seq",
    )  # fmt: skip
    wide = Case(lambda: llama(hidden_size=64), CAUSAL, ATTENTION, {}, "")
    make(tmp_path / "wide", wide)
    refused(CheckpointError, "another size", saved("causal")[0] / "base", tmp_path / "wide/adapter", tmp_path / "out")
    refused(
        UnsupportedError, "no AutoModelForSeq2SeqLM of type 'llama'", saved("causal")[0] / "base",
        saved("encoder-decoder")[0] / "adapter", tmp_path / "out",
    )  # fmt: skip


def test_a_damaged_adapter(saved, tmp_path):
    folder, _ = saved("causal")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(CheckpointError, "digest mismatch", folder / "base", tmp_path / "adapter", tmp_path / "out")
    weights.write_bytes(data[: len(data) // 2])
    refused(CheckpointError, "damaged|incomplete", folder / "base", tmp_path / "adapter", tmp_path / "out")
    refused(CheckpointError, "is not a folder", folder / "base", tmp_path / "missing", tmp_path / "out")


def test_a_place_that_is_not_free(saved, tmp_path, monkeypatch):
    folder, _ = saved("causal")
    pair = (folder / "base", folder / "adapter")
    (tmp_path / "file").write_text("x")
    refused(RequestError, "is a file", *pair, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("x")
    refused(RequestError, "holds files already.*--overwrite", *pair, tmp_path / "full")
    refused(RequestError, "no model", *pair, tmp_path / "full", overwrite=True)
    refused(RequestError, "which is needed", *pair, folder / "base", overwrite=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(RequestError, "which is needed", *pair, tmp_path / "here")
    refused(CheckpointError, "Writing .* failed", *pair, tmp_path / "file/out")


def test_a_base_that_is_stored_quantized(saved, tmp_path):
    folder, _ = saved("causal")
    shutil.copytree(folder / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    refused(UnsupportedError, "stored quantized", tmp_path / "base", folder / "adapter", tmp_path / "out")


def test_a_disk_that_is_too_full(saved, tmp_path, monkeypatch):
    folder, _ = saved("causal")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(DoesNotFitError, "1000 B are free|free on the disk", folder / "base", folder / "adapter", tmp_path / "out")


def test_wrong_arguments(saved, tmp_path):
    folder, _ = saved("causal")
    pair = (folder / "base", folder / "adapter")
    refused(RequestError, "no floating dtype", *pair, tmp_path / "out", dtype="int4")
    refused(RequestError, "no device", *pair, tmp_path / "out", device="gpu")
    refused(RequestError, "There is no backend", *pair, tmp_path / "out", backend="jax")
    refused(RequestError, "Did you mean 'causal-lm'", *pair, tmp_path / "out", task="causal_lm")
    refused(RequestError, "no field 'num_label'", *pair, tmp_path / "out", num_label=3)


def test_a_backend_that_can_not_write_merged_models(saved, tmp_path, monkeypatch):
    import types

    from lora_adapters.generic import GenericBackend
    from lora_adapters.hooks import hookimpl
    from lora_adapters.hooks.manager import plugins

    module: Any = types.ModuleType("reader_plugin")
    spec = BackendSpec("reader", ("reader",), "lora_adapters.generic:GenericBackend", priority=99)
    module.lora_adapters_backends = hookimpl(lambda: [spec])
    module.lora_adapters_backends.__name__ = "lora_adapters_backends"
    plugins().register(module, "reader")
    monkeypatch.setattr(GenericBackend, "can_load", lambda *_, **__: True)
    folder, _ = saved("causal")
    refused(
        UnsupportedError, r"can't write merged models.*merge\(unload=True\)", folder / "base", folder / "adapter",
        tmp_path / "out", backend="reader",
    )  # fmt: skip


# ---- refused or broken later -----------------------------------------------------------------------------------------


def test_weights_that_nobody_has_are_refused(saved, tmp_path):
    """A head that neither the checkpoint nor the adapter holds would be random in the merged model."""
    llama().model.save_pretrained(tmp_path / "base")
    adapter = saved("causal")[0] / "adapter"
    refused(
        CheckpointError, "has no 'lm_head.weight'.*random", tmp_path / "base", adapter, tmp_path / "out", reads=True
    )


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("a bug")])
@pytest.mark.parametrize("at", ["load", "merge", "save", "copy"])
@pytest.mark.parametrize("place", ["missing", "empty", "a model", "deep"])
def test_a_failure_midway_leaves_everything_as_it_was(saved, tmp_path, monkeypatch, error, at, place):
    folder, _ = saved("causal")
    out = tmp_path / ("not/there/out" if place == "deep" else "out")
    if place in ("empty", "a model"):
        out.mkdir()
    if place == "a model":
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(b"old")

    save = tf.PreTrainedModel.save_pretrained

    def fail(*_, **__):
        raise error

    def half(self, target, **options):
        save(self, target, **options)
        assert (Path(target) / "model.safetensors").exists()
        raise error

    owner, name, with_ = {
        "load": (tf.PreTrainedModel, "from_pretrained", fail),
        "merge": (merge, "merge", fail),
        "save": (tf.PreTrainedModel, "save_pretrained", half),
        "copy": (shutil, "copyfile", fail),
    }[at]
    monkeypatch.setattr(owner, name, with_)
    before = everything(tmp_path)
    wanted = CheckpointError if isinstance(error, OSError) and at in ("save", "copy") else type(error)
    with pytest.raises(wanted):
        la.merge_checkpoint(folder / "base", folder / "adapter", out, overwrite=place == "a model")
    assert everything(tmp_path) == before


def test_overwriting_leaves_nothing_of_the_old_model(saved, tmp_path):
    folder, expected = saved("causal")
    out = tmp_path / "out"
    llama(1, num_hidden_layers=3).save_pretrained(out)
    (out / "old.txt").write_text("x")
    la.merge_checkpoint(folder / "base", folder / "adapter", out, overwrite=True)
    assert not (out / "old.txt").exists()
    torch.testing.assert_close(logits(CAUSAL.from_pretrained(out)), expected, rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

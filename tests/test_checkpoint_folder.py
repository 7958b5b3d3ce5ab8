"""Adapter folders: stock PEFT's are read, ours load in stock PEFT, and everything else is refused with the reason."""

import json
import shutil
import tracemalloc

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from lora_adapters import checkpoint
from lora_adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from lora_adapters.errors import CheckpointError, LoraAdaptersError, RequestError, UnsupportedError

A = "base_model.model.fc.lora_A.weight"
B = "base_model.model.fc.lora_B.weight"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Linear(8, 4))

    def forward(self, ids):
        x = self.bn(self.conv(self.fc(self.emb(ids)).transpose(1, 2)))
        return self.head(x.mean(-1))


def net():
    torch.manual_seed(0)
    return Net()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))


def adapted(build, **fields):
    model = get_peft_model(build(), LoraConfig(**{"r": 4, **fields}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """A folder that stock PEFT wrote: rank 4 on `fc`."""
    adapted(net, target_modules=["fc"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_tensors(folder, **changes):
    """Rewrite the weights: key -> tensor, or None to drop it."""
    tensors = load_file(folder / WEIGHTS_NAME)
    for key, value in changes.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


VARIANTS = {
    "linear": {"target_modules": ["fc"]},
    "embedding, modules_to_save": {"target_modules": ["fc", "emb"], "modules_to_save": ["head", "bn"]},
    "grouped conv, bias all": {"target_modules": ["fc", "conv"], "bias": "all"},
    "bias lora_only": {"target_modules": ["fc"], "bias": "lora_only"},
    "dora": {"target_modules": ["fc", "emb"], "use_dora": True, "rank_pattern": {"fc": 7}},
    "lora_bias": {"target_modules": "(fc|conv)", "lora_bias": True, "alpha_pattern": {"^f.*": 3.5}},
    "tokens": {"target_modules": ["fc"], "trainable_token_indices": {"emb": [1, 2]}},
    "rslora": {"target_modules": ["fc"], "use_rslora": True, "lora_alpha": 16},
    "gaussian, dropout": {"target_modules": ["fc"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.filterwarnings("ignore")
def test_peft_to_here_to_peft_bit_for_bit(tmp_path, fields):
    model = adapted(net, **fields)
    model.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / WEIGHTS_NAME)
    file = checkpoint.inspect_adapter(tmp_path / "theirs")
    assert not file.verifiable
    assert file.missing_targets([name for name, _ in net().named_modules()]) == []
    tensors = checkpoint.read_adapter(file)
    checkpoint.check_tensors(file, {key: tensor.shape for key, tensor in tensors.items()})

    config = file.config.to_lora_config(inference_mode=True)
    checkpoint.write_adapter(tmp_path / "ours", config, tensors, {"base.name": "net"}, readme="# mine\n")
    again = checkpoint.inspect_adapter(tmp_path / "ours")
    assert again.verifiable
    assert again.metadata["base.name"] == "net"
    assert again.modules == file.modules
    ours = checkpoint.read_adapter(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)

    loaded = PeftModel.from_pretrained(net(), str(tmp_path / "ours")).eval()
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(loaded(ids), model(ids))


def test_what_is_adapted_is_read_off_the_header(tmp_path):
    fields = {"target_modules": ["fc", "conv", "emb"], "rank_pattern": {"conv": 2}, "modules_to_save": ["head"]}
    adapted(net, **fields).save_pretrained(tmp_path)
    file = checkpoint.inspect_adapter(tmp_path)
    kinds = {name: (module.kind, module.rank) for name, module in file.modules.items()}
    assert kinds == {"fc": ("linear", 4), "conv": ("conv1d", 2), "emb": ("embedding", 4)}
    assert file.modules["fc"].shapes == {"a": (4, 8), "b": (8, 4)}
    assert file.modules["fc"].keys == {"a": A, "b": B}
    assert file.saved == ("base_model.model.head.0.bias", "base_model.model.head.0.weight")


def test_a_tiny_llama_goes_both_ways(tmp_path):
    model = adapted(llama, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "theirs")
    file = checkpoint.inspect_adapter(tmp_path / "theirs")
    # PEFT repeats the base weight of an adapted embedding.
    assert list(file.copies.values()) == ["model.embed_tokens"]
    tensors = checkpoint.read_adapter(file)
    own = {"model.embed_tokens": llama().model.embed_tokens.weight}
    checkpoint.check_copies(file, tensors, own)
    with pytest.raises(CheckpointError, match="overwrite"):
        checkpoint.check_copies(file, tensors, {"model.embed_tokens": own["model.embed_tokens"] + 1})
    kept = {key: tensor for key, tensor in tensors.items() if key not in file.copies}
    checkpoint.check_tensors(file, {key: tensor.shape for key, tensor in kept.items()})
    checkpoint.write_adapter(tmp_path / "ours", model.peft_config["default"], kept)
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    "key",
    [
        *(
            "fc.base_layer.weight",
            "fc.base_layer.bias",
            "fc.weight",
            "head.0.weight",
            "emb.weight",
            "emb.base_layer.weight",
        ),
        *("bn.running_mean", "fc.lora_A.default.weight", "fc.lora_junk", "fc.lora_magnitude_vector", "fc.lora_B.bias"),
        *("emb.token_adapter.trainable_tokens_delta", "bn.bias"),
    ],
)
def test_a_key_that_is_not_the_adapters_is_refused_by_name(folder, key):
    edit_tensors(folder, **{f"base_model.model.{key}": torch.ones(8)})
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        checkpoint.inspect_adapter(folder)


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.", "unet."])
def test_a_wrong_prefix_is_refused(folder, prefix):
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file(
        {key.replace("base_model.model.", prefix): value for key, value in tensors.items()}, folder / WEIGHTS_NAME
    )
    with pytest.raises(CheckpointError, match="must start with"):
        checkpoint.inspect_adapter(folder)


def test_half_the_keys_missing_is_refused(tmp_path):
    model = adapted(llama, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    whole = {key: tensor.shape for key, tensor in load_file(tmp_path / WEIGHTS_NAME).items()}
    edit_tensors(tmp_path, **{key: None for key in whole if ".layers.0." in key})
    file = checkpoint.inspect_adapter(tmp_path)
    names = [name for name, module in llama().named_modules() if isinstance(module, nn.Linear)]
    assert file.missing_targets(names) == [f"model.layers.0.self_attn.{one}_proj" for one in "qv"]
    with pytest.raises(CheckpointError, match=r"lacks 4 of 8 tensors, first .*layers\.0"):
        checkpoint.check_tensors(file, whole)
    edit_tensors(tmp_path, **{key: None for key in whole if "lora_B" in key})
    with pytest.raises(CheckpointError, match="has no lora_B"):
        checkpoint.inspect_adapter(tmp_path)


def test_an_empty_file_is_refused(folder):
    edit_tensors(folder, **{A: None, B: None})
    with pytest.raises(CheckpointError, match="no adapter tensors"):
        checkpoint.inspect_adapter(folder)


@pytest.mark.parametrize("change", [{"r": 8}, {"rank_pattern": {"fc": 2}}, {"rank_pattern": {".*c": 5}}])
def test_a_rank_the_config_does_not_say_is_refused(folder, change):
    edit_config(folder, **change)
    with pytest.raises(CheckpointError, match="Rank mismatch"):
        checkpoint.inspect_adapter(folder)


@pytest.mark.parametrize("a, b", [((4, 8), (8, 2)), ((4,), (8, 4)), ((0, 8), (8, 0)), ((4, 8, 3), (8, 4)), ((), ())])
def test_factors_that_do_not_fit_together_are_refused(folder, a, b):
    edit_tensors(folder, **{A: torch.ones(a), B: torch.ones(b)})
    with pytest.raises(CheckpointError):
        checkpoint.inspect_adapter(folder)


def test_a_size_mismatch_and_an_unexpected_module_are_refused_from_the_header(folder):
    file = checkpoint.inspect_adapter(folder)
    with pytest.raises(CheckpointError, match=r"lora_A.*\[4, 8\].*\[4, 16\]"):
        checkpoint.check_tensors(file, {A: (4, 16), B: (8, 4)})
    with pytest.raises(CheckpointError, match=r"no place for, first .*lora_B"):
        checkpoint.check_tensors(file, {A: (4, 8)})


def test_a_huge_file_is_judged_without_reading_its_tensors(folder):
    shape = [60_000, 30_000]
    header = {
        A: {"dtype": "F32", "shape": shape, "data_offsets": [0, 7_200_000_000]},
        B: {"dtype": "F32", "shape": [8, 60_000], "data_offsets": [7_200_000_000, 7_201_920_000]},
    }
    raw = json.dumps(header).encode()
    with (folder / WEIGHTS_NAME).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 7_201_920_000)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="Rank mismatch"):
        checkpoint.inspect_adapter(folder)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_dtypes_that_are_not_an_adapters_are_refused_by_key(folder, dtype):
    edit_tensors(folder, **{A: torch.ones(4, 8).to(dtype)})
    with pytest.raises(CheckpointError, match="lora_A"):
        checkpoint.inspect_adapter(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_key_when_read_and_when_written(folder, tmp_path, value):
    bad = {A: torch.full((4, 8), value), B: torch.zeros(8, 4)}
    edit_tensors(folder, **bad)
    with pytest.raises(CheckpointError, match="lora_A"):
        checkpoint.read_adapter(checkpoint.inspect_adapter(folder))
    with pytest.raises(CheckpointError, match="lora_A"):
        checkpoint.write_adapter(tmp_path / "new", LoraConfig(target_modules=["fc"]), bad)
    assert not (tmp_path / "new").exists()


def saved_here(folder, tmp_path, **fields):
    model = adapted(net, **({"target_modules": ["fc"]} | fields))
    return checkpoint.write_adapter(tmp_path / "ours", model.peft_config["default"], get_peft_model_state_dict(model))


def test_a_flipped_bit_is_found_by_our_digest(folder, tmp_path):
    ours = saved_here(folder, tmp_path)
    raw = bytearray((ours / WEIGHTS_NAME).read_bytes())
    raw[-1] ^= 1
    (ours / WEIGHTS_NAME).write_bytes(raw)
    with pytest.raises(CheckpointError, match="digest"):
        checkpoint.read_adapter(checkpoint.inspect_adapter(ours))


def test_config_and_weights_of_two_saves_are_refused(folder, tmp_path):
    ours = saved_here(folder, tmp_path)
    edit_config(ours, base_model_name_or_path="moved/elsewhere", peft_version="0.99")
    checkpoint.inspect_adapter(ours)
    edit_config(ours, lora_alpha=99)
    with pytest.raises(CheckpointError, match="not of one save"):
        checkpoint.inspect_adapter(ours)


def test_a_save_cut_off_between_its_files_is_read_as_one_save(folder, tmp_path, monkeypatch):
    import os

    ours = saved_here(folder, tmp_path)
    newer = adapted(net, target_modules=["fc"], lora_alpha=99, r=2)
    real = os.replace

    def dies_at_config(source, target):
        if str(target).endswith((CONFIG_NAME, "previous")) or "previous" in str(source):
            raise OSError(5, "the disk is gone")
        real(source, target)

    monkeypatch.setattr(os, "replace", dies_at_config)
    with pytest.raises(CheckpointError, match="completes the rest"):
        checkpoint.write_adapter(ours, newer.peft_config["default"], get_peft_model_state_dict(newer))
    monkeypatch.undo()
    file = checkpoint.inspect_adapter(ours)
    assert (file.config.r, file.config.lora_alpha, file.modules["fc"].rank) == (2, 99, 2)
    checkpoint.read_adapter(file)
    checkpoint.remove_litter(ours)
    assert sorted(path.name for path in ours.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert checkpoint.inspect_adapter(ours).config.lora_alpha == 99


def test_pickles_are_never_read(folder):
    valid = load_file(folder / WEIGHTS_NAME)
    torch.save(valid, folder / "adapter_model.bin")
    good = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(good[:-4])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.inspect_adapter(folder)
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        checkpoint.inspect_adapter(folder)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="link out of"):
        checkpoint.inspect_adapter(folder)


def test_the_hub_caches_own_links_are_followed(folder, tmp_path):
    repo = tmp_path / "models--me--adapter"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.move(folder / name, repo / "blobs" / name)
        (snapshot / name).symlink_to(repo / "blobs" / name)
    checkpoint.read_adapter(checkpoint.inspect_adapter(snapshot))


@pytest.mark.parametrize("missing", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        checkpoint.inspect_adapter(folder)


def test_a_folder_of_adapters_names_them(folder, tmp_path):
    with pytest.raises(CheckpointError, match="adapter hold"):
        checkpoint.inspect_adapter(tmp_path)


@pytest.mark.parametrize(
    "name", ["..", "../x", "/etc", "a/b", "a\\b", ".hidden", "a.b", "", "a b", "x" * 200, "a\n", None]
)
def test_adapter_names_that_could_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(RequestError):
        checkpoint.adapter_folder(tmp_path, name)


def test_adapters_lie_where_peft_puts_them(tmp_path):
    assert checkpoint.adapter_folder(tmp_path, "default") == tmp_path
    assert checkpoint.adapter_folder(tmp_path, "style-2") == tmp_path / "style-2"
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "linked").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="link"):
        checkpoint.adapter_folder(tmp_path / "inside", "linked")


def test_hub_names_without_a_hub_say_what_to_do(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="download it first"):
        checkpoint.resolve_adapter_path("nobody-here/no-such-adapter", revision="main")
    for name in ("./nothing", str(tmp_path / "nothing"), "a/b/c"):
        with pytest.raises(CheckpointError, match="not a folder"):
            checkpoint.resolve_adapter_path(name)
    assert checkpoint.resolve_adapter_path(tmp_path) == tmp_path
    with pytest.raises(RequestError, match="revision"):
        checkpoint.resolve_adapter_path(tmp_path, revision="abc")


def test_metadata_must_be_strings_and_not_ours(folder, tmp_path):
    tensors, config = load_file(folder / WEIGHTS_NAME), LoraConfig(target_modules=["fc"], r=4)
    for metadata in ({"a": 1}, {"format": "tf"}, {"lora_adapters.digest": "x"}, {"a": "x" * 2**21}):
        with pytest.raises(RequestError):
            checkpoint.write_adapter(tmp_path / "new", config, tensors, metadata)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_initialisations_that_need_their_data_are_unsupported(folder, init):
    edit_config(folder, init_lora_weights=init)
    with pytest.raises(UnsupportedError, match=init):
        checkpoint.inspect_adapter(folder).config.to_lora_config()


def test_tied_and_transposed_tensors_are_saved_as_they_are(tmp_path):
    shared = torch.randn(8, 4)
    tensors = {A: shared.T, B: shared}
    checkpoint.write_adapter(tmp_path / "new", LoraConfig(target_modules=["fc"], r=4), tensors)
    found = checkpoint.read_adapter(checkpoint.inspect_adapter(tmp_path / "new"))
    assert torch.equal(found[A], shared.T)
    assert torch.equal(found[B], shared)


def test_failed_reads_leave_the_files_as_they_are(folder):
    edit_tensors(folder, junk=torch.ones(1))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(LoraAdaptersError):
        checkpoint.inspect_adapter(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

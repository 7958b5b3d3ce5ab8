"""What loading takes, known from headers; and what is said when it is too much."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_adapters import preflight
from lora_adapters.budget import FitSetting, format_size, parse_size, suggest_fit
from lora_adapters.checkpoint_size import TensorInfo, checkpoint_bytes, hub_checkpoint_bytes, read_header
from lora_adapters.errors import CheckpointError, DoesNotFitError, RequestError
from lora_adapters.free_memory import _cgroup_free, free_memory
from lora_adapters.preflight import LIBRARY_BYTES, LoadNeed, check_fits, check_load, load_choices, plan_load

GIB = 1 << 30


def test_headers_of_one_file(tmp_path):
    save_file(
        {"a.weight": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7)}, tmp_path / "model.safetensors"
    )
    assert sorted(checkpoint_bytes(tmp_path), key=lambda t: t.name) == [
        TensorInfo("a.weight", (3, 5), "BF16", 30),
        TensorInfo("b", (7,), "F32", 28),
    ]


def test_headers_of_shards(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    save_file({"c": torch.zeros(4)}, tmp_path / "other.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {t.name for t in checkpoint_bytes(tmp_path)} == {"a", "b"}
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors"):
        checkpoint_bytes(tmp_path)


def test_bin_files_count_by_size(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 100)
    assert checkpoint_bytes(tmp_path) == [TensorInfo("pytorch_model.bin", (), "", 100)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        (1 << 40).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"{{{",
    ],
)
def test_damaged_headers_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="incomplete"):
        checkpoint_bytes(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="index"):
        checkpoint_bytes(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="holds no"):
        checkpoint_bytes(tmp_path)


def test_hub_headers(monkeypatch):
    """The Hub's own answer types, filled as its documentation describes them; only the network is replaced."""
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata
    from huggingface_hub.utils import TensorInfo as HubTensor

    file = SafetensorsFileMetadata(
        metadata={}, tensors={"a": HubTensor(dtype="F16", shape=[2, 3], data_offsets=(0, 12))}
    )
    answer = SafetensorsRepoMetadata(metadata={}, sharded=False, weight_map={"a": "m"}, files_metadata={"m": file})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name, revision: answer)
    assert hub_checkpoint_bytes("someone/model") == [TensorInfo("a", (2, 3), "F16", 12)]


def matrices(count, rows=1000, dtype="F32"):
    size = {"F32": 4, "BF16": 2}[dtype]
    return [TensorInfo(f"{i}.weight", (rows, rows), dtype, size * rows * rows) for i in range(count)]


def test_need_on_the_cpu(monkeypatch):
    monkeypatch.setattr(preflight, "_readers", lambda: 2)
    assert plan_load(matrices(10)).host_peak == 40_000_000 + LIBRARY_BYTES
    cast = plan_load(matrices(10), dtype=torch.bfloat16)
    assert cast.host_peak == 20_000_000 + 2 * 2_000_000 + LIBRARY_BYTES
    half = plan_load(matrices(10), dtype=torch.bfloat16, quantized_bytes=lambda t: 500_000)
    assert half.host_peak == 5_000_000 + 2 * 2_000_000 + 8_000_000 + LIBRARY_BYTES


def test_need_on_an_accelerator_is_bounded_by_tensor_not_by_model(monkeypatch):
    monkeypatch.setattr(preflight, "_readers", lambda: 2)
    few, many = (plan_load(matrices(n), dtype=torch.bfloat16, device="cuda:0") for n in (10, 1000))
    assert few.host_peak == many.host_peak == 2 * 2_000_000 + LIBRARY_BYTES
    assert many.device_weights == 2_000_000_000 + 2_000_000


def test_integers_keep_their_bytes():
    need = plan_load([TensorInfo("i", (10,), "I64", 80)], dtype=torch.bfloat16)
    assert need.host_peak == 80 + LIBRARY_BYTES


def free(cpu, cuda=0):
    return {"cpu": cpu, "cuda:0": cuda}.__getitem__


def test_what_fits_is_left_alone():
    check_fits(LoadNeed(10 * GIB, 0, "cpu"), free=free(11 * GIB))


def test_the_margin_counts():
    with pytest.raises(DoesNotFitError, match=r"10\.0 GiB .*10% on top.*10\.9 GiB are free on the host"):
        check_fits(LoadNeed(10 * GIB, 0, "cpu"), free=free(int(10.9 * GIB)))


def test_settings_that_fit_are_computed_and_listed():
    tensors = matrices(1000)  # 4 GB in fp32
    need = plan_load(tensors)
    choices = load_choices(tensors, device="cpu", quantizers={"nf4": lambda t: 520_000})
    with pytest.raises(DoesNotFitError) as error:
        check_fits(need, choices, free=free(3 * GIB))
    listed = str(error.value).splitlines()[2:]
    assert [line.split(":")[0].strip() for line in listed] == [
        'dtype="bfloat16"',
        'quantization="nf4", dtype="bfloat16"',
    ]
    assert format_size(choices['dtype="bfloat16"'].host_peak) in listed[0]
    with pytest.raises(DoesNotFitError) as error:
        check_fits(need, choices, free=free(1 * GIB))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[2:]] == [
        'quantization="nf4", dtype="bfloat16"'
    ]


def test_another_device_is_offered_and_the_device_named():
    tensors = matrices(1000)
    need = plan_load(tensors, device="cuda:0")
    with pytest.raises(DoesNotFitError, match=r"free on cuda:0") as error:
        check_fits(need, load_choices(tensors, device="cuda:0"), free=free(8 * GIB, 1 * GIB))
    assert f'  device="cpu": {format_size(plan_load(tensors).host_peak)}' in str(error.value)


def test_nothing_fits_says_how_much_is_missing():
    tensors = matrices(1000)
    choices = load_choices(tensors, device="cpu", quantizers={"nf4": lambda t: 520_000})
    with pytest.raises(DoesNotFitError, match=r'closest, quantization="nf4", dtype="bfloat16", lacks \d') as error:
        check_fits(plan_load(tensors), choices, free=free(GIB // 4))
    assert "would fit" not in str(error.value)


def skeleton():
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(16)))  # 1 GiB in fp32


def test_check_load_knows_the_file_and_offers_quantization(tmp_path):
    pytest.importorskip("bitsandbytes")
    save_file({"0.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    common = dict(name=str(tmp_path), revision=None, device="cpu")
    need = check_load(skeleton(), {}, dtype=torch.float32, free=free(2 * GIB), **common)
    assert need.host_peak == pytest.approx(GIB + LIBRARY_BYTES, rel=0.001)
    with pytest.raises(DoesNotFitError, match=r'quantization="nf4", dtype="bfloat16": \d'):
        check_load(skeleton(), {}, dtype=torch.float32, free=free(GIB // 2 + (64 << 20)), **common)


def test_a_load_that_is_quantized_by_us_needs_the_dense_model_first(tmp_path, monkeypatch):
    save_file({"0.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(preflight, "_quantized_by", lambda formats: lambda tensor: 1)
    common = dict(name=str(tmp_path), revision=None, device="cpu", dtype=torch.float32, free=free(4 * GIB))
    assert check_load(skeleton(), {"0": "nf5"}, **common).host_peak >= GIB
    assert check_load(skeleton(), {"0": "nf4"}, **common).host_peak < GIB + LIBRARY_BYTES + 3 * (64 << 20)


def test_an_incomplete_folder_is_refused_before_loading(tmp_path):
    with pytest.raises(CheckpointError, match="holds no"):
        check_load(skeleton(), {}, name=str(tmp_path), revision=None, dtype=torch.float32, device="cpu")


def test_free_memory_of_this_machine():
    assert 0 < free_memory("cpu") < 1 << 50
    with pytest.raises(RequestError, match="xpu"):
        free_memory("xpu")


def group(folder, limit, used, inactive, v1=False):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{'total_' if v1 else ''}inactive_file {inactive}\n")


def test_control_groups_v2_take_the_tightest_of_the_parents(tmp_path):
    (tmp_path / "self").write_text("0::/a/b\n")
    group(tmp_path / "fs" / "a", 1000, 600, 50)
    group(tmp_path / "fs" / "a" / "b", "max", 500, 0)
    assert _cgroup_free(tmp_path / "self", tmp_path / "fs") == 450
    group(tmp_path / "fs" / "a" / "b", 700, 500, 100)
    assert _cgroup_free(tmp_path / "self", tmp_path / "fs") == 300


def test_control_groups_v1(tmp_path):
    (tmp_path / "self").write_text("5:cpu,cpuacct:/x\n4:memory:/x\n")
    group(tmp_path / "fs" / "memory" / "x", 1000, 900, 30, v1=True)
    assert _cgroup_free(tmp_path / "self", tmp_path / "fs") == 130


def test_no_control_groups(tmp_path):
    assert _cgroup_free(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(
    "text, size",
    [
        ("16GiB", 16 * GIB),
        ("16 gb", 16 * 10**9),
        ("1.5KiB", 1536),
        (" 100 ", 100),
        ("7b", 7),
        (5, 5),
        ("2TiB", 2 << 40),
    ],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 XB", "1e3", True, -1, None, 1.5e9j])
def test_parse_size_refuses(text):
    with pytest.raises(RequestError, match="not a size"):
        parse_size(text)


def test_format_size():
    assert [format_size(n) for n in (0, 1023, 1024, 5 * GIB + GIB // 10)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "5.1 GiB",
    ]


def step_bytes(batch, length, checkpointing, quantization):
    return (1000 if quantization is None else 300) + batch * length * (1 if checkpointing else 4)


def test_suggest_fit_changes_as_little_as_it_can():
    found = suggest_fit(step_bytes, 3000, batch_size=8, sequence_length=256)
    assert found[0] == FitSetting(8, 256, True, "nf4", 2348)
    assert found[1] == FitSetting(4, 256, True, None, 2024)
    assert all(f.nbytes <= 3000 for f in found)
    assert suggest_fit(step_bytes, "1 GiB", batch_size=8, sequence_length=256, count=1)[0].checkpointing is False
    assert suggest_fit(step_bytes, 100, batch_size=8, sequence_length=256) == []
    with pytest.raises(RequestError, match="at least 1"):
        suggest_fit(step_bytes, 100, batch_size=0, sequence_length=1)

"""safetensors headers as untrusted data: anything malformed is a typed error, found without reading a tensor."""

import contextlib
import json
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora_adapters.errors import CheckpointError
from lora_adapters.tensor_file import MAX_HEADER_BYTES, digest_of, read_header, read_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor(1.5, dtype=torch.bfloat16),
    "c": torch.zeros(0, 3, dtype=torch.float16),
    "d": torch.tensor([1, 2]),
}


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write(path, header, data=24, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data))
    return path


def test_what_safetensors_writes_is_read_back_bit_for_bit(tmp_path):
    save_file(TENSORS, tmp_path / "x", metadata={"note": "1"})
    header = read_header(tmp_path / "x")
    assert header.metadata == {"note": "1"}
    tensors, digest = read_tensors(tmp_path / "x", header)
    assert digest == digest_of(TENSORS)
    for key, tensor in TENSORS.items():
        assert tensors[key].dtype == tensor.dtype
        assert torch.equal(tensors[key], tensor)


@pytest.mark.parametrize("change", ["value", "shape", "dtype", "key"])
def test_the_digest_covers_values_shapes_dtypes_and_keys(change):
    tensors = {"a": torch.zeros(2, 3)}
    other = {
        "value": {"a": torch.full((2, 3), -0.0)},
        "shape": {"a": torch.zeros(3, 2)},
        "dtype": {"a": torch.zeros(2, 3, dtype=torch.int32)},
        "key": {"b": torch.zeros(2, 3)},
    }[change]
    assert digest_of(tensors) != digest_of(other)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{" * 50_000,
        b'{"a": 1}',
        {"a": entry() | {"extra": 1}},
        {"a": entry(dtype="Q4")},
        {"a": entry(dtype=["F32"])},
        {"a": entry(shape=(2, -3))},
        {"a": entry(shape=(2, True))},
        {"a": entry(shape=(2, 3.0))},
        {"a": entry(shape=(2, 10**400))},
        {"a": entry(shape=[1] * 20)},
        {"a": entry(shape=(2, 4))},
        {"a": entry(offsets=(0, 20))},
        {"a": entry(offsets=(24, 0))},
        {"a": entry(offsets=(-24, 0))},
        {"a": entry(offsets=(8, 32))},
        {"a": entry(), "b": entry()},
        {"a": entry(), "b": entry(offsets=(12, 36))},
        {"a": entry(shape=(2,), offsets=(0, 8)), "b": entry(shape=(2,), offsets=(16, 24))},
        {"a\n": entry()},
        {"a" * 5000: entry()},
        {"a": entry(), "__metadata__": {"x": 1}},
        {"a": entry(), "__metadata__": []},
        b'{"a": ' + json.dumps(entry()).encode() + b', "a": ' + json.dumps(entry()).encode() + b"}",
        {"a": entry(shape=(10**6, 10**6), offsets=(0, 4 * 10**12))},
    ],
    ids=range(26),
)
def test_malformed_headers_are_refused(tmp_path, header):
    with pytest.raises(CheckpointError):
        read_header(write(tmp_path / "x", header))


@pytest.mark.parametrize("length", [0, 1, 10**6, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_wrong_header_lengths_are_refused(tmp_path, length):
    with pytest.raises(CheckpointError):
        read_header(write(tmp_path / "x", {"a": entry()}, length=length))


def test_a_huge_header_length_in_a_sparse_file_allocates_nothing(tmp_path):
    path = write(tmp_path / "x", {"a": entry()}, length=10**9)
    with path.open("ab") as file:
        file.truncate(2 * 10**9)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="more than any adapter needs"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_every_truncation_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    for size in range(len(data)):
        (tmp_path / "y").write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_header(tmp_path / "y")
    (tmp_path / "y").write_bytes(data + b"\0")
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "y")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mutated_bytes_give_tensors_or_a_typed_error(tmp_path, data):
    save_file(TENSORS, tmp_path / "x")
    raw = bytearray((tmp_path / "x").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "y").write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        read_tensors(tmp_path / "y", read_header(tmp_path / "y"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_named(tmp_path, value, dtype):
    bad = torch.zeros(2, 2).index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(value)).to(dtype)
    save_file({"fine": torch.ones(2), "broken": bad}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="broken"):
        read_tensors(tmp_path / "x", read_header(tmp_path / "x"))


def test_a_file_that_changed_after_its_header_was_checked_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x")
    header = read_header(tmp_path / "x")
    save_file({"a": torch.ones(3)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="changed"):
        read_tensors(tmp_path / "x", header)


def test_missing_files_folders_and_pipes_are_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError):
            read_header(path)

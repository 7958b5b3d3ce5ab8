"""The benchmarks run and report what they say they do. Sizes are tiny here, so no number is judged."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def assert_ratio(value) -> None:
    assert isinstance(value, float)
    assert math.isfinite(value)
    assert value > 0


@pytest.mark.parametrize("isa", ["native", "avx2"])
def test_cpu(isa):
    done = run(
        "cpu.py", "--size", "tiny", "--rounds", "2", "--ranks", "4", "--isa", isa, "--json", "--models", "llm", "vit"
    )
    rows = json.loads(done.stdout)
    assert [(row["model"], row["weights"]) for row in rows] == [
        ("llm", "fp32"),
        ("llm", "nf4"),
        ("vit", "fp32"),
        ("vit", "nf4"),
    ]
    for row in rows:
        assert isa == "native" or row["cpu"] != "AVX512"
        for key in ("ours / PEFT", "ours / base", "operations / base", "memory ours / PEFT", "base ms"):
            assert_ratio(row[key])


def test_cpu_unet():
    settings = ("--size", "tiny", "--rounds", "2", "--ranks", "4", "--isa", "native", "--json")
    (row,) = json.loads(run("cpu.py", *settings, "--models", "unet", "--bases", "nf4").stdout)
    if "skipped" in row:
        pytest.skip(row["skipped"])
    assert_ratio(row["ours / PEFT"])


def test_unet():
    pytest.importorskip("diffusers")
    variants = ["frozen base", "PEFT", "ours", "PEFT, NF4 linear", "ours, NF4"]
    done = run("unet.py", "--models", "tiny", "--variants", *variants, "--rounds", "1", "--steps", "1", "--json")
    rows = json.loads(done.stdout)
    assert [row["variant"] for row in rows] == variants
    for row in rows:
        assert_ratio(row["/ frozen base"])
        assert_ratio(row["/ PEFT"])


def test_dreambooth():
    pytest.importorskip("diffusers")
    done = run(
        "dreambooth.py",
        "--models",
        "tiny",
        "--variants",
        "diffusers",
        "ours",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--json",
    )
    rows = json.loads(done.stdout)
    assert [row["variant"] for row in rows] == ["diffusers", "ours"]
    for row in rows:
        assert_ratio(row["/ diffusers"])
        assert_ratio(row["peak GiB"])


def test_layers(tmp_path):
    table = tmp_path / "layers.md"
    done = run("layers.py", "--tiny", "--rounds", "2", "--device", "cpu", "--markdown", str(table), "--json")
    rows = json.loads(done.stdout)
    seen = {(row["layer"].split()[0], row["weights"]) for row in rows}
    assert seen == {("linear", "bf16"), ("linear", "nf4"), ("conv", "bf16"), ("conv", "nf4"), ("embedding", "bf16")}
    for row in rows:
        assert_ratio(row["forward ms"])
        assert_ratio(row["alone ms"])
        if not row["layer"].startswith("embedding"):
            assert_ratio(row["/ product"])
            assert_ratio(row["/ dX product"])
    variants = {row["variant"] for row in rows if row["layer"].startswith("linear")}
    assert {"product", "base", "PEFT, fp32 adapters, autocast", "ours, fp32 adapters, autocast"} <= variants
    text = table.read_text()
    assert text.count("\n| ") == len(rows) + 1


def test_parity(tmp_path):
    picture = tmp_path / "parity.png"
    sizes = ("--steps", "4", "--pretrain", "3", "--hidden", "64", "--layers", "1", "--rank", "4")
    done = run("parity.py", *sizes, "--cache", str(tmp_path / "cache"), "--picture", str(picture), "--json")
    found = json.loads(done.stdout)
    rows = {row["row"]: row for row in found["losses"]}
    assert list(rows) == ["fp32", "bf16", "fp16", "nf4 merged", "nf4 split", "bf16 forced"]
    for name, row in rows.items():
        assert_ratio(row["ours / PEFT"])
        assert len(found["curves"][name]["ours"]) == 4
    assert abs(rows["fp32"]["ours / PEFT"] - 1) < 1e-4
    # The two paths over the same 4-bit weights are two paths, and so are the two over bf16.
    assert found["curves"]["nf4 merged"]["ours"] != found["curves"]["nf4 split"]["ours"]
    assert found["curves"]["bf16"]["ours"] != found["curves"]["bf16 forced"]["ours"]
    arrives = {row["path"]: row for row in found["survival"]}
    assert arrives["ours, bf16"]["0.001 arrives"] > arrives["ours, bf16 forced"]["0.001 arrives"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_models():
    done = run(
        "models.py", "--tiny", "--device", "cpu", "--models", "llama-1b", "--rounds", "2", "--seconds", "0.05", "--json"
    )
    rows = json.loads(done.stdout)
    names = ["base", "PEFT, autocast", "PEFT, bf16", "ours, autocast", "ours, bf16"]
    assert [(row["weights"], row["variant"]) for row in rows] == [(w, n) for w in ("bf16", "nf4") for n in names]
    for row in rows:
        assert_ratio(row["/ base"])
        assert_ratio(row["/ PEFT"])


def test_image_weights():
    pytest.importorskip("diffusers")
    models = ("resnet50", "vit_base_patch16_224", "sd1.5", "sdxl")
    resnet, vit, sd, sdxl = json.loads(run("image_weights.py", "--models", *models, "--json").stdout)
    assert resnet["NF4, ours, MB"] < 0.4 * resnet["NF4, linear only, MB"] == 0.4 * resnet["16 bits, MB"]
    assert vit["NF4, ours, MB"] <= vit["NF4, linear only, MB"] < 0.3 * vit["16 bits, MB"]
    assert (sd["values"], sdxl["values"]) == ("859.5M", "2567.5M")
    assert sd["NF4, ours, MB"] <= 450 < 1300 < sd["NF4, linear only, MB"]
    assert sdxl["NF4, ours, MB"] <= 1350 < 1800 < sdxl["NF4, linear only, MB"]

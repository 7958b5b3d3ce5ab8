"""`lora-adapters inspect` on saved adapters, whole and damaged."""

import json

import pytest
from click.testing import CliRunner
from helpers import llama, perturb, run_cli
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lora_adapters as la
from lora_adapters import cli
from lora_adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from lora_adapters.errors import CheckpointError, UnsupportedError

TARGETS = {"attention": {"rank": 4, "alpha": 8}, "mlp": 2, "embedding": 3}


@pytest.fixture(scope="module")
def adapter():
    adapter = la.attach(llama(), targets=TARGETS)
    perturb(adapter.model)
    return adapter


@pytest.fixture
def ours(adapter, tmp_path):
    return adapter.save(tmp_path / "ours")


def stock(folder, model=None, **fields):
    """Save an adapter with stock PEFT."""
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | fields
    peft_model = get_peft_model(model or llama(), LoraConfig(**fields))
    perturb(peft_model)
    peft_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # the config is enough
    return folder


def here(*arguments):
    """Run the command in this process."""
    return CliRunner().invoke(cli.cli, ["inspect", *map(str, arguments)])


def facts_of(folder, *options):
    done = here(folder, "--json", *options)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensor(folder, change):
    """Change the first tensor in place, keeping the header as it is."""
    path = folder / WEIGHTS_NAME
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 4] = change(data[start : start + 4])
    path.write_bytes(data)


# ---- facts ----------------------------------------------------------------------------------------------------------


def test_the_facts_of_our_own_file(adapter, ours):
    done = run_cli("inspect", str(ours), "--json", before="import sys; sys.modules['peft'] = None; ")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    tensors = load_file(ours / WEIGHTS_NAME)
    assert facts["base_class"] == "LlamaForCausalLM"
    assert facts["task_type"] == "CAUSAL_LM"
    assert facts["written_by"].startswith(f"lora_adapters {la.__version__} (PEFT ")
    assert facts["digest"] is True
    assert (facts["variants"], facts["bias"], facts["trained_whole"]) == ([], "none", [])
    assert facts["values"] == sum(tensor.numel() for tensor in tensors.values())
    assert facts["dtypes"] == {"F32": facts["values"]}
    assert facts["file_bytes"] == (ours / WEIGHTS_NAME).stat().st_size
    groups = {group["name"]: group for group in facts["groups"]}
    assert {name: group["count"] for name, group in groups.items()} == {
        **{f"{name}_proj": 2 for name in ("q", "k", "v", "o", "gate", "up", "down")},
        "embed_tokens": 1,
    }
    assert facts["layers"] == 15
    for name, expected in {
        "q_proj": ([4], [8], [2]),
        "up_proj": ([2], [2], [1]),
        "embed_tokens": ([3], [3], [1]),
    }.items():
        assert tuple(groups[name][key] for key in ("ranks", "alphas", "scalings")) == expected
    assert groups["embed_tokens"]["kind"] == "embedding"
    assert groups["up_proj"]["values"] == sum(t.numel() for key, t in tensors.items() if ".up_proj." in key)


def test_the_norms_are_those_of_the_product(adapter, ours):
    norms = facts_of(ours)["norms"]
    products = {}
    for name, layer in adapter.layers.items():
        a, b = layer.factor_parameters("default")
        products[name] = (layer.scaling["default"] * b @ a).norm().item()
    largest = sorted(products, key=lambda name: -products[name])[:5]
    assert [name for name, _ in norms["largest"]] == largest
    assert dict(norms["largest"]) == pytest.approx({name: products[name] for name in largest}, rel=1e-4)
    assert norms["mean"] == pytest.approx(sum(products.values()) / len(products), rel=1e-4)
    assert norms["max"] == pytest.approx(max(products.values()), rel=1e-4)


def test_the_facts_of_a_file_of_stock_peft(tmp_path):
    fields = dict(
        r=4, lora_alpha=8, use_rslora=True, use_dora=True, rank_pattern={"v_proj": 2}, modules_to_save=["norm"]
    )
    facts = facts_of(stock(tmp_path, llama(attention_bias=True), bias="all", **fields))
    assert facts["written_by"].startswith("PEFT ")
    assert facts["digest"] is False
    assert facts["variants"] == ["DoRA", "rank-stabilised"]
    # PEFT compares ends of names as text: "norm" means every norm of this model.
    assert facts["trained_whole"][0].endswith("norm")
    assert len(facts["trained_whole"]) == 5
    assert facts["bias"] == "all"
    assert facts["biases"] == 2 * 4
    groups = {group["name"]: group for group in facts["groups"]}
    assert groups["v_proj"]["scalings"] == [pytest.approx(8 / 2**0.5)]
    assert groups["q_proj"]["scalings"] == [pytest.approx(8 / 4**0.5)]


def test_base_weights_in_the_file_are_named(tmp_path):
    facts = facts_of(stock(tmp_path, target_modules=["embed_tokens", "q_proj"]))
    assert facts["base_copies"] == ["model.embed_tokens"]


def test_only_modules_trained_whole_have_no_norms(tmp_path):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    tensors = {key: t for key, t in load_file(tmp_path / WEIGHTS_NAME).items() if ".lora_" not in key}
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    facts = facts_of(tmp_path)
    assert (facts["layers"], facts["norms"], facts["trained_whole"]) == (0, None, ["lm_head"])
    assert here(tmp_path).exit_code == 0


def test_text_of_a_file_can_not_steer_the_terminal(ours):
    save_file(load_file(ours / WEIGHTS_NAME), ours / WEIGHTS_NAME, {"lora_adapters.version": "1\x1b[2J\n2"})
    done = here(ours)
    assert done.exit_code == 0
    assert "lora_adapters 1?[2J?2" in done.stdout
    assert "\x1b" not in done.stdout


def test_the_tables(ours):
    done = run_cli("inspect", str(ours), "--verify")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "base model not named, LlamaForCausalLM" in lines
    assert "q_proj linear 2 4 8 2 512" in lines
    assert "digest verified" in lines
    assert any(line.startswith("mean ") for line in lines)
    assert "values: finite" in lines
    quiet = here(ours, "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


# ---- damage ---------------------------------------------------------------------------------------------------------

DAMAGE = {
    "a bit flipped": (lambda folder: edit_tensor(folder, lambda b: bytes([b[0] ^ 1, *b[1:]])), "digest mismatch"),
    "not finite": (lambda folder: edit_tensor(folder, lambda b: b"\x00\x00\x80\x7f"), "NaN or infinite"),
    "cut off": (
        lambda folder: (folder / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes()[:-1]),
        "damaged",
    ),
    "another config": (lambda folder: edit_config(folder, lora_alpha=3), "not of one save"),
    "no weights": (lambda folder: (folder / WEIGHTS_NAME).unlink(), "holds no adapter_model.safetensors"),
    "a pickle": (lambda folder: (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin"), "pickle"),
    "no config": (lambda folder: (folder / CONFIG_NAME).unlink(), "does not exist"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_an_error(ours, damage, message):
    damage(ours)
    for options in ([], ["--verify"], ["--for", "peft"]):
        done = here(ours, *options)
        assert isinstance(done.exception, CheckpointError)
        assert message in str(done.exception)
        assert done.stdout == ""


def test_an_error_is_one_line(ours):
    (ours / WEIGHTS_NAME).unlink()
    done = run_cli("inspect", str(ours))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_a_folder_that_is_not_there(tmp_path):
    done = here(tmp_path / "nowhere")
    assert isinstance(done.exception, CheckpointError)
    assert here().exit_code == 2


# ---- --verify and --base --------------------------------------------------------------------------------------------


def test_what_was_verified_is_said(ours, tmp_path):
    checks = facts_of(ours, "--verify")["checks"]
    assert "digest: the values are those that were saved" in checks
    assert "checks" not in facts_of(ours)
    theirs = facts_of(stock(tmp_path / "theirs"), "--verify")["checks"]
    assert any(check.startswith("digest: none") for check in theirs)
    assert len(theirs) == len(checks)


def unsupported(folder, kind):
    stock(folder, **({"trainable_token_indices": [1, 2]} if kind == "trained token rows" else {}))
    changes = {
        "activated LoRA": {"alora_invocation_tokens": [3]},
        "corda": {"init_lora_weights": "corda"},
        "lora_ga": {"init_lora_weights": "lora_ga"},
        "LoftQ": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    }
    edit_config(folder, **changes.get(kind, {}))
    return folder


@pytest.mark.parametrize("kind", ["trained token rows", "activated LoRA", "corda", "lora_ga", "LoftQ"])
def test_what_can_not_be_restored_is_shown_but_not_verified(tmp_path, kind):
    folder = unsupported(tmp_path, kind)
    assert facts_of(folder)["layers"] == 4
    done = here(folder, "--verify")
    assert isinstance(done.exception, UnsupportedError)
    assert kind in str(done.exception)
    with pytest.raises(UnsupportedError, match=kind):
        la.restore(llama(), folder)


def test_the_base_it_was_made_for(ours, base):
    done = run_cli("inspect", str(ours), "--base", str(base), "--json")
    assert done.returncode == 0, done.stderr
    assert "base: every name and shape is that of this LlamaForCausalLM" in json.loads(done.stdout)["checks"]


@pytest.mark.parametrize(
    "settings, message", [({"hidden_size": 48}, "has shape"), ({"num_hidden_layers": 1}, "another model")]
)
def test_another_base(ours, tmp_path, settings, message):
    llama(**settings).config.save_pretrained(tmp_path)
    done = here(ours, "--base", tmp_path)
    assert isinstance(done.exception, CheckpointError)
    assert message in str(done.exception)
    assert done.stdout == ""


def test_the_base_gets_the_head_and_labels_of_the_file(tmp_path, base):
    """The base's own config knows neither: it is that of a language model."""
    from transformers import AutoModelForSequenceClassification

    config = llama().config
    config.num_labels = 5
    folder = stock(tmp_path / "theirs", AutoModelForSequenceClassification.from_config(config), task_type="SEQ_CLS")
    checks = facts_of(folder, "--base", base)["checks"]
    assert "base: every name and shape is that of this LlamaForSequenceClassification" in checks


def test_copies_of_base_weights_were_not_compared(tmp_path, base):
    folder = stock(tmp_path, target_modules=["embed_tokens", "q_proj"])
    assert "were not compared" in facts_of(folder, "--base", base)["checks"][-1]


# ---- --for ----------------------------------------------------------------------------------------------------------


def test_yes_and_no(ours):
    done = here(ours, "--for", "peft", "--for", "vllm")
    assert done.exit_code == 0
    assert "Loads in peft: yes" in done.stdout
    assert "Loads in vllm: yes" in done.stdout
    done = run_cli("inspect", str(ours), "--for", "peft", "--for", "vllm", "--max-lora-rank", "1")
    assert done.returncode == 1
    assert "Loads in peft: yes" in done.stdout
    assert "Loads in vllm: no" in done.stdout
    assert "start it with --max-lora-rank 8" in done.stdout
    assert done.stderr == "reading the adapter\n"
    assert here(ours, "--for", "vllm", "--max-lora-rank", "1", "--quiet").exit_code == 1
    assert facts_of(ours, "--for", "peft")["for"] == {"peft": {"loads": True, "reasons": [], "notes": []}}


def test_tools_for_images_are_told_that_it_is_a_language_model(ours):
    done = run_cli("inspect", str(ours), "--for", "diffusers", "--for", "comfyui", "--for", "timm")
    assert done.returncode == 1
    for target in ("diffusers", "comfyui", "timm"):
        assert f"Loads in {target}: no" in done.stdout
    text = " ".join(done.stdout.split())
    assert text.count("it adapts LlamaForCausalLM (a model of transformers)") == 3


def test_an_adapter_of_a_denoiser(tmp_path):
    """Its files say so; diffusers itself is not needed to tell."""
    edit_config(stock(tmp_path, task_type=None), auto_mapping=auto_mapping("diffusers.models", "UNet2DConditionModel"))
    done = here(tmp_path, "--for", "diffusers", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)["for"]["diffusers"]
    assert "PeftModel.from_pretrained(pipe.unet, folder)" in found["reasons"][0]
    assert "scale 1 instead of 2" in found["notes"][0]


@pytest.mark.parametrize("library", ["diffusers\x1b[2J.models", 5, None, ["diffusers"], "diffusers" * 100, "a b"])
def test_a_base_class_that_is_no_name_is_not_shown(tmp_path, library):
    edit_config(stock(tmp_path, task_type=None), auto_mapping=auto_mapping(library, "UNet\n2"))
    done = here(tmp_path, "--for", "diffusers")
    assert done.exit_code == 1
    assert "a model its files do not name" in " ".join(done.stdout.split())
    assert "\x1b" not in done.stdout


def auto_mapping(library, name):
    return {"parent_library": library, "base_model_class": name}


def test_an_unknown_target(ours):
    done = here(ours, "--for", "vlm")
    assert done.exit_code == 2
    assert "'peft', 'diffusers', 'vllm', 'comfyui', 'timm'" in done.output

"""Whole runs in this process, from a recipe: every setting does what it says, and what is written is of use."""

import base64
import io
import json
import sys
from pathlib import Path

import pytest
import single_files
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from lora_adapters_diffusers import LoraPipeline
from PIL import Image
from safetensors.torch import load_file

from lora_adapters import cli
from lora_adapters.errors import LoraAdaptersError
from lora_adapters.recipes.reading import validate
from lora_adapters.runs.progress import Progress
from lora_adapters.runs.run import train
from lora_adapters.runs.runner import runner_for

sys.path.insert(0, str(Path(__file__).parents[1]))
from photos import photos, write_photos
from pipelines import build


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dreambooth")
    build("sd").save_pretrained(folder / "base")
    write_photos(folder / "photos", 3, square=True)
    for i, image in enumerate(photos(3, square=True)):
        mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, image.width // 2, image.height))
        (folder / "masks").mkdir(exist_ok=True)
        mask.save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture
def run(place, tmp_path):
    """Return a function that runs a recipe with these sections changed, and returns facts and folder."""

    def do(name="run", **changes):
        sections = {
            "task": "dreambooth",
            "model": {"name": str(place / "base"), "device": "cpu"},
            "adapter": {"rank": 2},
            "data": {
                "images": str(place / "photos"),
                "prompt": "a sks cat",
                "resolution": 16,
                "bucket_step": 8,
                "min_side": 16,
            },
            "training": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2, "log_every": 1},
            "samples": {"count": 0},
            "output": str(tmp_path / name),
        }
        for key, value in changes.items():
            sections[key] = {**sections.get(key, {}), **value}
        recipe = validate(sections)
        return train(recipe, runner_for(recipe), Progress(quiet=True)), tmp_path / name

    return do


def tensors(folder):
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def same(one, other):
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_caches_and_reading_processes_change_nothing(run, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_ADAPTERS_CACHE", str(tmp_path / "cache"))
    _, plain = run("plain", data={"cache_latents": None, "cache_text": None, "flip": 0.5})
    assert not (tmp_path / "cache").exists()
    for name, cache in (("memory", "memory"), ("disk", "disk")):
        assert same(plain, run(name, data={"cache_latents": cache, "cache_text": cache, "flip": 0.5})[1])
    assert len(list((tmp_path / "cache" / "latents").iterdir())) >= 3
    assert same(plain, run("workers", data={"cache_latents": None, "cache_text": None, "flip": 0.5, "workers": 2})[1])


def test_each_setting_changes_what_is_learned(run, place, tmp_path):
    _, plain = run("plain")
    changes = {
        "mask": {"data": {"masks": str(place / "masks"), "mask_floor": 0.1}},
        "min_snr": {"diffusion": {"min_snr": 0.01}},
        "offset": {"diffusion": {"noise_offset": 0.2}},
        "dropout": {"data": {"caption_dropout": 0.99}},
        "prior": {"prior": {"prompt": "a cat", "images": 2, "steps": 1, "folder": str(tmp_path / "class")}},
        "lora_plus": {"training": {"lora_plus": 4.0}},
        "ema": {"training": {"ema": 0.9}},
        "radam": {"training": {"optimizer": "RAdam", "optimizer_options": {"betas": [0.5, 0.9]}}},
        "accumulated": {"training": {"gradient_accumulation": 2}},
        "bf16": {"training": {"precision": "bfloat16"}},
        "dora": {"adapter": {"dora": True}},
        "nf4": {"model": {"quantization": {"unet": "nf4"}}},
    }
    for name, change in changes.items():
        facts, folder = run(name, **change)
        assert facts.status == "finished", name
        assert facts.memory_planned["total"] > 0, name
        assert not same(plain, folder), name
    _, half = run("half", data={"masks": str(place / "masks"), "mask_floor": 1.0})
    assert same(plain, half), "a floor of 1 is no mask"


def test_another_accelerator_keeps_its_precision(run):
    """accelerate has one precision for all of a process."""
    AcceleratorState._reset_state()
    try:
        other = Accelerator(cpu=True, mixed_precision="no")
        facts, _ = run("beside", training={"precision": "bfloat16"})
        assert facts.status == "finished"
        assert other.mixed_precision == other.state.mixed_precision == "no"
    finally:
        AcceleratorState._reset_state()


def test_a_compiled_denoiser_learns_the_same(run, monkeypatch):
    """By the eager backend: the graph is captured and run, and no minutes go by with a C++ compiler."""
    _, plain = run("plain")
    compile, compiled = torch.compile, []

    def by_eager(model, **options):
        compiled.append(model)
        return compile(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", by_eager)
    _, folder = run("compiled", training={"compile": True})
    assert [type(model).__name__ for model in compiled] == ["UNet2DConditionModel"]
    assert tensors(folder).keys() == tensors(plain).keys()
    for name, tensor in tensors(plain).items():
        torch.testing.assert_close(tensors(folder)[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_no_gradient(run, dropout):
    text = {"text_encoders": True, "text_rank": 3, "dropout": dropout}
    _, plain = run("plain", adapter=text)
    _, saved = run("saved", adapter=text, training={"gradient_checkpointing": True})
    first, second = tensors(plain), tensors(saved)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-6)
    ranks = {name.split(".")[0]: tensor.shape[0] for name, tensor in first.items() if "lora_A" in name}
    assert ranks == {"unet": 2, "text_encoder": 3}


def test_ranks_by_block(run):
    """The longest name that fits wins; 0 leaves a block alone; the scale stays."""
    facts, folder = run(
        adapter={"alpha": 1.0, "blocks": {"down_blocks": 4, "down_blocks.0.attentions.0": 6, "up_blocks": 0}}
    )
    ranks = {name: tensor.shape[0] for name, tensor in tensors(folder).items() if "lora_A" in name}
    assert {rank for name, rank in ranks.items() if ".down_blocks.0.attentions.0." in name} == {6}
    assert not any(".up_blocks." in name for name in ranks)
    assert {rank for name, rank in ranks.items() if ".mid_block." in name} == {2}
    assert {group.scale for group in facts.adapted} == {0.5}


def test_v_prediction_changes_the_scheduler_that_makes_images(run):
    facts, _ = run(
        diffusion={"prediction": "v_prediction", "zero_terminal_snr": True}, samples={"count": 1, "steps": 1}
    )
    (note,) = [note for note in facts.notes if "scheduler" in note]
    assert "prediction_type='v_prediction'" in note
    assert "rescale_betas_zero_snr=True" in note


def test_images_over_time(run, tmp_path):
    """From the same prompts and seeds; as files, and in the report as a grid."""
    facts, folder = run(
        training={"max_steps": 3},
        prior={"prompt": "a cat", "images": 1, "steps": 1, "folder": str(tmp_path / "class")},
        samples={"every": 1, "count": 2, "steps": 1, "seed": 4},
    )
    assert [sample.title for sample in facts.samples] == ["a sks cat", "a cat"]
    page = (folder / "report.html").read_text()
    for sample in facts.samples:
        assert [label for label, _ in sample.images] == ["step 0, base", "step 1", "step 2", "step 3, adapter"]
        for _, data in sample.images:
            assert data in page
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            assert picture.height == 2 * picture.width, "two images, one below the other"
    files = sorted(str(path.relative_to(folder / "samples")) for path in (folder / "samples").rglob("*.png"))
    assert len(files) == 4 * 2 * 2
    assert "step-000000-base/prompt-1-image-1.png" in files
    # The last ones are those that the saved adapter makes.
    lora = LoraPipeline(build("sd"))
    lora.load(folder / "adapter")
    generator = torch.Generator().manual_seed(5)
    made = lora.pipe("a cat", num_inference_steps=1, generator=generator, height=16, width=16).images[0]
    kept = Image.open(folder / "samples" / "step-000003" / "prompt-2-image-2.png")
    assert max(abs(a - b) for a, b in zip(made.tobytes(), kept.tobytes(), strict=True)) <= 1


def test_what_is_said_without_eval_images(run):
    facts, _ = run()
    assert any("measured on the training images" in note for note in facts.notes)
    facts, _ = run("held", data={"eval_fraction": 0.34})
    assert {part.name: part.rows for part in facts.data} == {"train": 2, "eval": 1}
    assert not any("measured on the training images" in note for note in facts.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"text_encoders": ["text_encoder_2"]}}, "There are: text_encoder"),
        ({"adapter": {"blocks": {"middle": 4}}}, "no layer to adapt lies in 'middle'.*mid_block"),
        ({"adapter": {"init": "olora"}}, "take true, false, gaussian or orthogonal"),
        ({"adapter": {"blocks": {"mid_block": 0, "down_blocks": 0, "up_blocks": 0}}}, "nothing is left to adapt"),
        ({"model": {"quantization": {"vae": "nf4"}}}, "no part 'vae' that can be quantized"),
        ({"model": {"config": "x"}}, "model.config: it is for a single file"),
        ({"data": {"resolution": 8, "bucket_step": 64}}, "less than one step"),
        ({"samples": {"count": 1, "height": 17}}, "multiples of 2"),
        ({"training": {"optimizer": "sgd", "optimizer_options": {"betas": 1}}}, "sgd does not take them"),
        ({"diffusion": {"guidance": 3.0}}, "guidance"),
    ],
)
def test_wrong_recipes_are_refused_before_anything_is_written(run, tmp_path, changes, message):
    with pytest.raises(LoraAdaptersError, match=message):
        run(**changes)
    assert not (tmp_path / "run").exists()


def test_commands_take_the_run(run, tmp_path):
    """inspect, push and generate on the folder, and the code in its card."""
    _, folder = run()
    adapter = folder / "adapter"

    def here(*arguments):
        done = CliRunner().invoke(cli.cli, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, (done.output, done.exception)
        return json.loads(done.stdout)

    assert here("inspect", adapter)["layers"] > 0
    pushed = here("push", folder, "me/cat", "--dry-run")
    assert {one["name"] for one in pushed["files"]} == {"README.md", "pytorch_lora_weights.safetensors"}
    (sample,) = here("generate", folder, "--prompt", "a sks cat", "samples.steps=1", "samples.count=2")
    assert [name for name, _ in sample["parts"]] == ["base", "run"]
    for _, paths in sample["parts"]:
        assert [Image.open(path).size for path in paths.split()] == [(16, 16), (16, 16)]
    card = (adapter / "README.md").read_text()
    assert "pipe.load_lora_weights(adapter)" in card
    assert "library_name: diffusers" in card


def test_a_base_in_a_single_file_is_the_one_in_a_folder(run, place, tmp_path):
    file = tmp_path / "base.safetensors"
    single_files.write(build("sd"), file, "sd1")
    where = {"name": str(file), "config": str(place / "base")}
    for stored in (None, "nf4"):
        told = {"quantization": stored, "device": "cpu"}
        _, expected = run(f"folder-{stored}", model={"name": str(place / "base"), **told})
        _, found = run(f"file-{stored}", model={**where, **told})
        assert tensors(found).keys() == tensors(expected).keys()
        for name, tensor in tensors(expected).items():
            torch.testing.assert_close(tensors(found)[name], tensor, rtol=1e-4, atol=1e-6)

"""What runs do not show by themselves: each option reaches the place where it takes effect."""

import sys
from pathlib import Path

import pytest
import torch
from lora_adapters_diffusers import LoraPipeline
from lora_adapters_diffusers.dreambooth import base_pipeline
from lora_adapters_diffusers.dreambooth.families import family_of
from lora_adapters_diffusers.dreambooth.in_memory import recipe_from
from lora_adapters_diffusers.dreambooth.runner import DreamBoothRunner
from lora_adapters_diffusers.dreambooth.sampling import Sampler
from lora_adapters_diffusers.dreambooth.session import batches_for, task_for
from lora_adapters_diffusers.recipes import PipelineModel, Samples

from lora_adapters.errors import RequestError
from lora_adapters.inject import routes
from lora_adapters.recipes.reading import validate
from lora_adapters.runs.folder import RunFolder

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
import single_files
from photos import photos, write_photos
from pipelines import build

DATA = {"prompt": "a sks cat", "images": "in memory", "resolution": 16, "bucket_step": 8, "min_side": 16}


def runner_of(**options):
    """Return a runner on a pipeline in memory, of a checked recipe."""
    recipe = recipe_from({"rank": 2, **options}, DATA, None, None)
    recipe |= {"model": {"name": "x", "device": "cpu"}, "output": "unused"}
    return DreamBoothRunner(validate(recipe, "dreambooth"), LoraPipeline(build("sd")), photos(3, square=True))


# ---- the adapter -----------------------------------------------------------------------------------------------------


def planned(**options):
    """Return name -> planned layer; each with its rank and its scale."""
    return {layer.name: layer for layer in runner_of(**options).made_plan.layers}


def test_which_layers_are_adapted():
    every = planned().keys()
    assert all(name.split(".")[-1] in ("to_q", "to_k", "to_v", "0") for name in every)
    assert {name.split(".")[-1] for name in planned(targets=["to_q"])} == {"to_q"}
    assert any(".resnets." in name for name in planned(targets="attention+conv"))
    assert planned(exclude=["to_q"]).keys() == {name for name in every if not name.endswith("to_q")}
    assert planned(layers=[0]).keys() == {name for name in every if ".up_blocks.1" not in name}
    # What is said of the denoiser's names and numbers is not of the encoders.
    both = planned(text_encoders=True, exclude=["to_q"], layers=[0])
    assert {name.split(".")[-1] for name in both if name.startswith("text_encoder.")} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
    }
    assert {name.split(".")[-1] for name in planned(text_encoders=True, text_targets="mlp")} >= {"fc1", "fc2"}
    assert {name.split(".")[0] for name in planned(text_encoders=["text_encoder"])} == {"unet", "text_encoder"}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_scales(rslora, alpha):
    """alpha / rank, or alpha / sqrt(rank) (arXiv:2312.03732); other ranks of blocks and encoders do not change it."""
    found = planned(alpha=alpha, rslora=rslora, blocks={"mid_block": 8}, text_encoders=True, text_rank=5)
    assert {layer.rank for layer in found.values()} == {2, 5, 8}
    expected = (alpha or 2) / (2**0.5 if rslora else 2)
    assert [layer.scaling for layer in found.values()] == pytest.approx([expected] * len(found))


def attached(**options):
    """Return the unet's handle, as a run attaches it."""
    runner = runner_of(**options)
    torch.manual_seed(0)
    (handle,) = runner.lora.attach(components=["unet"], **runner.arguments(runner.lora.pipe)["unet"]).values()
    return handle


def test_how_layers_begin_and_compute():
    def first(letter, **options):
        return next(p.detach() for name, p in attached(**options).base.named_parameters() if f"lora_{letter}" in name)

    starts = [first("A"), first("A", init="gaussian"), first("A", init="orthogonal")]
    assert all(not torch.equal(one, other) for i, one in enumerate(starts) for other in starts[:i])
    assert not first("B", init="gaussian").any()
    assert first("B", init=False).any()

    def layer(**options):
        return next(m for m in attached(**options).base.modules() if hasattr(m, "lora_dropout"))

    assert layer(dropout=0.25).lora_dropout["default"].p == 0.25
    assert layer(dora=True).use_dora["default"]
    for fused, path in (("auto", "split"), (False, "parent")):
        handle = attached(fused=fused)
        assert {route.path for route in routes(handle.base, handle.plan).values()} == {path}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "affine"}, "adapter.norm: 'affine' is none of eval"),
        ({"liger": True}, "adapter.liger"),
        ({"liger": "auto"}, "adapter.liger"),
        ({"modules_to_save": ["x"]}, "adapter.modules_to_save"),
        ({"text_rank": 4}, "no effect without text_encoders"),
        ({"text_targets": "mlp"}, "no effect without text_encoders"),
        ({"text_learning_rate": 1e-4}, "no effect without adapter.text_encoders"),
        ({"mask_floor": 0.5}, "no effect without masks"),
        ({"max_aspect": 3.0, "buckets": False}, "no effect without buckets"),
        ({"keep_tags": 3}, "no effect without shuffle_tags or tag_dropout"),
        ({"crop": "random", "data": {"cache_latents": "disk"}}, "encodes each image once"),
        ({"shuffle_tags": True, "data": {"cache_text": "disk"}}, "encodes each caption once, and its tags change"),
        ({"text_encoders": True, "data": {"cache_text": "disk"}}, "encodes each caption once, and text encoders"),
    ],
)
def test_what_would_have_no_effect_is_refused(options, message):
    with pytest.raises(RequestError, match=message):
        runner_of(**options)


# ---- the base --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with float32 weights and an fp16 variant that differs, and a single file."""
    place = tmp_path_factory.mktemp("bases")
    build("sd").save_pretrained(place / "folder")
    other = build("sd")
    torch.nn.init.zeros_(other.unet.conv_in.bias)
    other.to(torch.float16).save_pretrained(place / "folder", variant="fp16", max_shard_size="100KB")
    single_files.write(build("sd"), place / "file.safetensors", dtype=torch.bfloat16)
    return place


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        ("folder", {}, torch.float32),
        ("folder", {"variant": "fp16"}, torch.float16),
        ("folder", {"variant": "fp16", "dtype": "float32"}, torch.float32),
        ("folder", {"dtype": "bfloat16"}, torch.bfloat16),
        ("file.safetensors", {"config": "folder"}, torch.bfloat16),
        ("file.safetensors", {"config": "folder", "dtype": "float32"}, torch.float32),
    ],
)
def test_the_base_is_what_the_recipe_names(bases, name, options, dtype):
    """auto is the dtype that the denoiser's files have; the plan knows it without them."""
    if "config" in options:
        options = {**options, "config": str(bases / options["config"])}
    section = PipelineModel(name=str(bases / name), **options)
    pipe, plan = base_pipeline.load(section), base_pipeline.skeleton(section)
    assert {getattr(pipe, part).dtype for part in ("unet", "vae", "text_encoder")} == {dtype}
    assert (plan.unet.dtype, plan.unet.device.type) == (dtype, "meta")
    assert bool(pipe.unet.conv_in.bias.any()) == ("variant" not in options)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("folder", {"revision": "v1"}),
        ("file.safetensors", {"revision": "v1"}),
        ("file.safetensors", {"variant": "fp16"}),
        ("folder", {"config": "folder"}),
    ],
)
def test_what_a_base_has_not_is_refused(bases, name, option):
    section = PipelineModel(name=str(bases / name), **option)
    for read in (base_pipeline.skeleton, base_pipeline.load):
        with pytest.raises(RequestError, match=f"model.{next(iter(option))}: "):
            read(section)


def test_a_revision_on_the_hub(bases, tmp_path, monkeypatch):
    """As the Hub's cache holds two of them, without a network."""
    for commit, revision in (("a" * 40, "main"), ("b" * 40, "v1")):
        folder = tmp_path / "models--me--base"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        pipe = build("sd")
        pipe.unet.conv_in.bias.data.fill_(len(revision))
        pipe.to(torch.bfloat16).save_pretrained(folder / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "v1"):
        section = PipelineModel(name="me/base", revision=revision)
        assert base_pipeline.load(section).unet.conv_in.bias[0] == len(revision or "main")
        assert base_pipeline.load(section).unet.dtype == torch.bfloat16
        assert base_pipeline.skeleton(section).unet.device.type == "meta"
    with pytest.raises(RequestError, match="the Hub gave no such pipeline"):
        base_pipeline.skeleton(PipelineModel(name="me/base", revision="v2"))


def test_what_is_quantized():
    def stored(how):
        return base_pipeline.quantization_of(how, "unet", ["text_encoder"])

    assert stored(None) == {}
    assert stored("nf4") == {"unet": "nf4", "text_encoder": "nf4"}
    assert stored({"unet": {"attention": "nf4"}}) == {"unet": {"attention": "nf4"}}


# ---- images ----------------------------------------------------------------------------------------------------------


def test_images_are_the_pipelines_of_the_options():
    pipe = build("sd")
    options = {"negative_prompt": "a dog", "guidance_scale": 2.0, "height": 24, "width": 32}
    section = Samples(count=2, steps=3, seed=7, **options)
    (made,) = Sampler(family_of(pipe), section, ["a cat"], 16).images()
    for index, image in enumerate(made):
        generator = torch.Generator().manual_seed(7 + index)
        stock = pipe("a cat", num_inference_steps=3, generator=generator, **options).images[0]
        assert image.size == (32, 24)
        assert image.tobytes() == stock.tobytes()
    left_out = [{k: v for k, v in options.items() if k != name} for name in ("negative_prompt", "guidance_scale")]
    for less in (*left_out, {**options, "steps": 2}):
        section = Samples(**{"count": 1, "steps": 3, "seed": 7, **less})
        ((other,),) = Sampler(family_of(pipe), section, ["a cat"], 16).images()
        assert other.tobytes() != made[0].tobytes()


def test_what_images_are_made_of():
    class_ = {"prior": {"prompt": "a cat"}}
    for options, prompts in (({}, ["a sks cat"]), (class_, ["a sks cat", "a cat"]), ({"prompts": ["x"]}, ["x"])):
        runner = runner_of(**options)
        runner.check()
        assert runner.prompts == prompts


# ---- data and losses -------------------------------------------------------------------------------------------------


def test_images_to_measure_on(tmp_path):
    runner = runner_of(eval=write_photos(tmp_path, 2, square=True))
    runner.check()
    assert len(runner.train_items) == 3
    assert [item.source.name for item in runner.eval_items] == ["0.png", "1.png"]


def test_the_loss_of_dreambooth():
    """arXiv:2208.12242, eq. 2: the mean over the subject's images plus lambda times that over the class's."""
    runner = runner_of(batch_size=2, prior={"prompt": "a cat", "weight": 0.3})
    runner.check()
    family = runner.family
    class_ = [type(item)(**{**vars(item), "prior": True}) for item in runner.train_items]
    task = task_for(runner, family, batches_for(runner, runner.train_items, class_), trained=False)
    for keys in task.keys(0):  # two images beside two, and one beside one
        inputs = task.inputs(next(task.read([keys])), 1, 0)
        half = len(keys) // 2
        assert inputs["share"].tolist() == pytest.approx([1 / half] * half + [0.3 / half] * half)
        with torch.no_grad():
            made = family.predict(
                inputs["noisy"], inputs["timesteps"], {"embeds": inputs["text embeds"]}, inputs["sizes"]
            )
            each = (made - inputs["target"]).square().mean((1, 2, 3))
            assert float(task.loss(inputs)) == pytest.approx(
                float(each[:half].mean() + 0.3 * each[half:].mean()), rel=1e-5
            )


def test_order_and_noise_follow_from_the_seed():
    orders, noise = [], []
    for seed in (0, 1):
        runner = runner_of(training={"seed": seed})
        runner.check()
        batches = batches_for(runner, runner.train_items)
        task = task_for(runner, runner.family, batches, trained=False)
        orders.append([batches.keys(epoch) for epoch in range(5)])
        noise.append(task.inputs(next(task.read([[(0, 0)]])), 1, 0)["noisy"])
    assert orders[0] != orders[1]
    assert not torch.equal(*noise)


# ---- training --------------------------------------------------------------------------------------------------------


def test_learning_rates_of_the_parts():
    options = {"learning_rate": 1e-3, "text_encoders": True, "weight_decay": 0.5, "optimizer_options": {"eps": 1e-3}}

    def groups(**more):
        runner = runner_of(**options, **more)
        pipe = runner.lora.pipe
        for name, given in runner.arguments(pipe).items():
            runner.lora.attach(components=[name], **given)
        return runner.optimizer({name: getattr(pipe, name) for name in ("unet", "text_encoder")}).param_groups

    assert [group["lr"] for group in groups()] == [1e-3, 1e-3]
    found = groups(text_learning_rate=1e-4, lora_plus=4.0)
    assert [group["lr"] for group in found] == pytest.approx([1e-3, 4e-3, 1e-4, 4e-4])
    assert {(group["weight_decay"], group["eps"]) for group in found} == {(0.5, 1e-3)}


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, True),
        ({"cuda_graphs": True}, True),
        ({"cuda_graphs": False}, False),
        ({"text_encoders": True}, False),
        ({"dropout": 0.1, "gradient_checkpointing": True}, False),
        ({"dropout": 0.1}, True),
    ],
)
def test_when_steps_are_cuda_graphs(options, graphs):
    runner = runner_of(**options)
    runner.device = torch.device("cuda")
    assert runner.cuda_graphs == graphs


def test_times_and_rates(tmp_path):
    """One run: its learning rates, where it logs, measures and saves, and to whom else it reports."""
    pytest.importorskip("tensorboard")
    made = LoraPipeline(build("sd")).dreambooth(
        photos(3, square=True),
        "a sks cat",
        data={key: DATA[key] for key in ("resolution", "bucket_step", "min_side")},
        samples={"count": 0},
        rank=2,
        epochs=2.5,
        batch_size=2,
        learning_rate=1e-3,
        schedule="linear",
        warmup=2,
        log_every=2,
        eval_every=3,
        save_every=3,
        keep_checkpoints=2,
        report_to=["tensorboard"],
        output=tmp_path / "run",
        quiet=True,
    )
    assert (made.facts.steps, made.facts.epochs) == (5, 2.5)  # two batches an epoch
    rows = RunFolder(tmp_path / "run").history()
    assert {row["step"]: row["learning_rate"] for row in rows if "loss" in row} == pytest.approx(
        {1: 0.0, 2: 5e-4, 4: 1e-3 * 2 / 3}
    )
    assert [row["step"] for row in rows if "eval_loss" in row] == [3]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "checkpoint-3",
        "checkpoint-5",
    ]
    assert list((tmp_path / "run" / "logs").rglob("events.out.*"))


def test_gradients_are_scaled_down_to_a_norm():
    """A step of plain SGD moves B by the learning rate times the norm of its gradient; A's is 0, as B is."""
    made = LoraPipeline(build("sd")).dreambooth(
        photos(3, square=True),
        "a sks cat",
        steps=1,
        data={key: DATA[key] for key in ("resolution", "bucket_step", "min_side")},
        samples={"count": 0},
        rank=2,
        optimizer="sgd",
        learning_rate=2.0,
        max_grad_norm=1e-4,
        quiet=True,
    )
    moved = [p.detach() for n, p in made.adapters["unet"].base.named_parameters() if "lora_B" in n]
    assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(2e-4, rel=1e-3)

"""LoraCallback under transformers' Trainer: training, saving, resuming, evaluating, merging, pushing, and misuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import llama, perturb
from lora_adapters_transformers import LoraCallback
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import lora_adapters as la
from lora_adapters.errors import RequestError, StateError
from lora_adapters.weights import guard_cpu_repacking

#: Whatever belongs to a base model's own files.
BASE_FILES = ("model.safetensors", "pytorch_model.bin", "config.json", "generation_config.json")


def rows(count=16, length=6, seed=5):
    ids = torch.randint(3, 32, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def labelled(count=16, seed=5):
    """The label is whether the first token is in the upper half."""
    return [row | {"labels": torch.tensor(int(row["input_ids"][0] >= 16))} for row in rows(count, seed=seed)]


def arguments(folder, **options):
    settings = dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=11,
    )
    return TrainingArguments(**settings | options)


def classifier(seed=0):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama().config.__class__(**llama().config.to_dict() | {"num_labels": 2}))


def ids():
    return torch.randint(3, 32, (3, 6), generator=torch.Generator().manual_seed(9))


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids()).logits


def adapter_tensors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def keys(folder):
    return sorted(load_file(Path(folder) / "adapter_model.safetensors"))


def four_bit(folder):
    """A base that transformers itself loaded in 4 bits."""
    llama().save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})


def make(kind, folder):
    """Return the callback over each kind of base, and the same base anew."""
    if kind == "loaded in 4 bits":
        return LoraCallback(four_bit(folder), rank=2), lambda: four_bit(folder)
    if kind == "quantized here":
        return LoraCallback(llama(), rank=2, quantization="nf4"), lambda: base_like(llama(), "nf4")
    return LoraCallback(llama(), rank=2), llama


def base_like(model, quantization):
    """Quantize a model as the callback does."""
    return model if quantization is None else la.attach(model, rank=2, quantization=quantization).detach()


# ---- training and saving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "loaded in 4 bits", "quantized here"])
def test_trains_logs_and_saves_the_adapter_alone(kind, tmp_path, capsys):
    lora, fresh = make(kind, tmp_path / "base")
    base = {n: p.detach().clone() for n, p in lora.model.named_parameters() if not p.requires_grad}
    before = adapter_tensors(lora.model)
    assert isinstance(lora.model, PeftModel)
    trainer = Trainer(model=lora.model, args=arguments(tmp_path / "run"), train_dataset=rows(), callbacks=[lora])
    trainer.train()
    printed = capsys.readouterr().out
    assert all(torch.equal(p, base[n]) for n, p in lora.model.named_parameters() if n in base)
    assert all(not torch.equal(p, before[n]) for n, p in adapter_tensors(lora.model).items())

    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    norms = [entry["adapter_norm"] for entry in logged]
    assert 0 < norms[0] < norms[-1]
    assert logged[-1]["adapter_norm_max"] == pytest.approx(lora.adapter.norms()["max"])
    plan = lora.adapter.plan
    trained = sum(p.numel() for p in before.values())
    assert logged[0]["trainable_share"] == pytest.approx(trained / (plan.total_parameters + trained))
    assert printed.count("adapter_norm_max") == 4
    assert "trainable_share" in printed

    for step in (2, 4):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        assert not [f for f in BASE_FILES if (folder / f).exists()]
        assert len(keys(folder)) == len(before)
        assert all(k.startswith("base_model.model.model.layers.") and ".lora_" in k for k in keys(folder))
        saved = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert all("adapter_norm" in entry for entry in saved)
    expected = logits(lora.model)
    ours, theirs = fresh(), fresh()
    guard_cpu_repacking(theirs)  # on CPUs with AVX512-BF16 a stock base of this size can't be evaluated without it
    la.restore(ours, tmp_path / "run" / "checkpoint-4")
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=0)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "run" / "checkpoint-4")
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)


def test_a_whole_config_and_options_reach_attach():
    lora = LoraCallback(llama(), config=LoraConfig(r=3, target_modules=["q_proj"]))
    assert {layer.rank for layer in lora.adapter.plan.layers} == {3}
    lora = LoraCallback(llama(), r=2, targets="mlp", adapter_name="mine")
    assert {layer.role for layer in lora.adapter.plan.layers} == {"mlp"}
    assert {layer.rank for layer in LoraCallback(llama(), targets="mlp").adapter.plan.layers} == {16}
    with pytest.raises(RequestError, match="rank"):
        LoraCallback(llama(), rank=8, config=LoraConfig(r=3))
    with pytest.raises(RequestError, match="rank and r"):
        LoraCallback(llama(), rank=8, r=8)


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"quantization": "nf4"}, {"adapter_name": "mine"}], ids=str)
def test_resuming_is_bit_identical(options, tmp_path):
    """Dropout in the adapter and shuffling on: 2N steps are the same as N, new objects, and N more."""

    def run(folder, steps, resume=None):
        lora = LoraCallback(llama(), rank=2, dropout=0.3, seed=4, **options)
        args = arguments(folder, max_steps=8, save_steps=4, data_seed=17)
        trainer = Trainer(model=lora.model, args=args, train_dataset=rows(24), callbacks=[lora, *_stop(steps)])
        trainer.train(resume_from_checkpoint=resume)
        return adapter_tensors(lora.model), trainer.optimizer.state_dict(), trainer.state

    whole, optimizer, state = run(tmp_path / "whole", 8)
    half, _, _ = run(tmp_path / "parts", 4)
    torch.rand(7)  # another process would be elsewhere in the random stream
    again, optimizer_again, state_again = run(tmp_path / "parts", 8, str(tmp_path / "parts" / "checkpoint-4"))
    assert state.global_step == state_again.global_step == 8
    assert whole.keys() == again.keys()
    assert any(not torch.equal(whole[name], half[name]) for name in whole)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert optimizer["state"].keys() == optimizer_again["state"].keys()
    assert optimizer["state"]
    for key, moments in optimizer["state"].items():
        assert all(torch.equal(value, optimizer_again["state"][key][name]) for name, value in moments.items())
    assert [e["loss"] for e in state.log_history if "loss" in e] == [
        e["loss"] for e in state_again.log_history if "loss" in e
    ]


def _stop(step):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return [Stop()]


# ---- evaluation ------------------------------------------------------------------------------------------------------


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
def test_the_best_checkpoint_is_loaded_at_the_end(adapter_name, tmp_path):
    """What is learnt is wrong for the evaluation data, so that an early checkpoint is the best one."""
    lora = LoraCallback(llama(), rank=2, adapter_name=adapter_name)
    args = arguments(
        tmp_path, max_steps=5, save_steps=1, eval_steps=1, eval_strategy="steps", load_best_model_at_end=True,
        learning_rate=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    always_five = [row | {"labels": torch.full_like(row["labels"], 5)} for row in rows()]
    trainer = Trainer(
        model=lora.model, args=args, train_dataset=always_five, eval_dataset=rows(8, seed=6), callbacks=[lora]
    )
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=losses.__getitem__)
    assert len(losses) == 5
    assert best < 5
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    fresh = llama()
    la.restore(fresh, trainer.state.best_model_checkpoint)
    torch.testing.assert_close(logits(lora.model), logits(fresh), rtol=0, atol=0)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_classifier_trains_saves_and_restores_its_head(quantization, tmp_path):
    lora = LoraCallback(classifier(), rank=2, quantization=quantization)
    before = adapter_tensors(lora.model)
    assert any("score.modules_to_save" in name for name in before)
    args = arguments(tmp_path, max_steps=40, eval_strategy="steps", eval_steps=20, save_steps=40)
    data = labelled(16)
    trainer = Trainer(
        model=lora.model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[lora],
        compute_metrics=accuracy,
    )
    trainer.train()
    scores = [e["eval_accuracy"] for e in trainer.state.log_history if "eval_accuracy" in e]
    assert len(scores) == 2
    assert scores[-1] >= 0.9
    assert all(not torch.equal(value, before[name]) for name, value in adapter_tensors(lora.model).items())
    folder = tmp_path / "checkpoint-40"
    assert [k for k in keys(folder) if ".lora_" not in k] == ["base_model.model.score.weight"]
    expected = logits(lora.model)

    ours = base_like(classifier(), quantization)
    la.restore(ours, folder)
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=0)
    theirs = PeftModel.from_pretrained(base_like(classifier(), quantization), folder)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)


def test_predict_and_the_auto_classes_read_a_checkpoint(tmp_path):
    """transformers' own from_pretrained reads the checkpoint, as for any PEFT adapter."""
    base = classifier()
    base.save_pretrained(tmp_path / "base")
    stock = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"]),
    )
    perturb(stock)
    stock.save_pretrained(tmp_path / "stock")
    if not torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock")), logits(stock)):
        pytest.skip("this version of transformers loses the head of stock PEFT's checkpoints too (5.17 does)")
    lora = LoraCallback(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), rank=2)
    trainer = Trainer(model=lora.model, args=arguments(tmp_path / "run"), train_dataset=labelled(8), callbacks=[lora])
    trainer.train()
    predicted = torch.from_numpy(trainer.predict(labelled(4, seed=8)).predictions)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-4")
    fresh = Trainer(model=model, args=arguments(tmp_path / "other"))
    torch.testing.assert_close(torch.from_numpy(fresh.predict(labelled(4, seed=8)).predictions), predicted)


# ---- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_gradient_checkpointing_gives_the_same_gradients(quantization, tmp_path):
    def gradients(**options):
        lora = LoraCallback(llama(), rank=2, seed=4, quantization=quantization)
        perturb(lora.model)
        grabbed = {}

        class Grab(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                grabbed.update({n: p.grad.clone() for n, p in lora.model.named_parameters() if p.grad is not None})

        args = arguments(tmp_path, max_steps=1, save_strategy="no", **options)
        Trainer(model=lora.model, args=args, train_dataset=rows(), callbacks=[lora, Grab()]).train()
        return grabbed

    plain = gradients()
    assert plain
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    for reentrant in (True, False):
        kwargs = {"use_reentrant": reentrant}
        checkpointed = gradients(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
        assert checkpointed.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_merge_at_end(quantization, tmp_path):
    lora = LoraCallback(llama(), rank=2, quantization=quantization, merge_at_end=True)
    data = rows(8)
    trainer = Trainer(
        model=lora.model, args=arguments(tmp_path), train_dataset=data, eval_dataset=data, callbacks=[lora]
    )
    trainer.train()
    assert lora.adapter.merged
    merged = logits(lora.model)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "final"))
    assert not [f for f in BASE_FILES if (tmp_path / "final" / f).exists()]
    assert keys(tmp_path / "final") == keys(tmp_path / "checkpoint-4")

    lora.adapter.unmerge()
    torch.testing.assert_close(logits(lora.model), merged, rtol=1e-4, atol=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)
    restored = base_like(llama(), quantization)
    la.restore(restored, tmp_path / "final")
    torch.testing.assert_close(logits(restored), logits(lora.model), rtol=0, atol=0)


def test_training_goes_on_after_a_merge(tmp_path):
    """The base is given back first, so the second run starts where the first ended."""
    lora = LoraCallback(llama(), rank=2, merge_at_end=True)
    trainer = Trainer(model=lora.model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[lora])
    trainer.train()
    first = adapter_tensors(lora.model)
    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 6
    assert lora.adapter.merged
    assert all(not torch.equal(value, first[name]) for name, value in adapter_tensors(lora.model).items())
    merged = logits(lora.model)
    plain = lora.adapter.merge(unload=True)
    assert {type(m) for m in plain.modules()} == {type(m) for m in llama().modules()}
    torch.testing.assert_close(logits(plain), merged)


# ---- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that is a folder: uploads are copied there, as the patterns say."""
    from huggingface_hub import CommitInfo, HfApi, RepoUrl
    from huggingface_hub.utils import filter_repo_objects

    root = tmp_path / "hub"

    def create_repo(self, repo_id, **options):
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=None, run_as_future=False, **options):
        names = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            target = root / repo_id / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, target)
        return CommitInfo(f"https://huggingface.co/{repo_id}/commit/0", "", "", "0")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return root


def test_push_to_hub(hub, tmp_path):
    lora = LoraCallback(llama(), rank=2)
    args = arguments(tmp_path / "run", push_to_hub=True, hub_model_id="me/trained", hub_strategy="end")
    trainer = Trainer(model=lora.model, args=args, train_dataset=rows(), callbacks=[lora])
    trainer.train()
    trainer.push_to_hub()
    lora.adapter.push_to_hub("me/adapter")
    for name in ("me/trained", "me/adapter"):
        pushed = {str(p.relative_to(hub / name)) for p in (hub / name).rglob("*") if p.is_file()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= pushed
        assert pushed <= {"adapter_config.json", "adapter_model.safetensors", "README.md", "training_args.bin"}
        fresh = llama()
        la.restore(fresh, hub / name)
        torch.testing.assert_close(logits(fresh), logits(lora.model), rtol=0, atol=0)


# ---- misuse ----------------------------------------------------------------------------------------------------------


def test_the_bare_model_is_refused_at_once(tmp_path):
    model = llama()
    lora = LoraCallback(model, rank=2)
    with pytest.raises(StateError, match=r"Trainer\(model=lora.model"):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[lora])


@pytest.mark.parametrize("kind", ["loaded in 4 bits", "quantized here"])
def test_a_bare_quantized_model_is_refused_by_trainer_itself(kind, tmp_path):
    lora, _ = make(kind, tmp_path / "base")
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model=lora.adapter.base, args=arguments(tmp_path), train_dataset=rows(), callbacks=[lora])


def test_another_model_is_refused_at_once(tmp_path):
    lora = LoraCallback(llama(), rank=2)
    with pytest.raises(StateError, match="another model"):
        Trainer(model=llama(), args=arguments(tmp_path), train_dataset=rows(), callbacks=[lora])


def test_model_init_is_refused_at_once(tmp_path):
    def fresh():
        return llama()

    lora = LoraCallback(llama(), rank=2)
    with pytest.raises(StateError, match="instead of model_init"):
        Trainer(model_init=fresh, args=arguments(tmp_path), train_dataset=rows(), callbacks=[lora])


def test_model_init_that_first_gives_the_adapted_model_is_refused_when_training_begins(tmp_path):
    lora = LoraCallback(llama(), rank=2)
    given = iter([lora.model])
    trainer = Trainer(
        model_init=lambda: next(given, None) or llama(),
        args=arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[lora],
    )
    with pytest.raises(StateError, match="instead of model_init"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("bare", [True, False])
def test_add_callback_after_construction_is_refused_when_training_begins(bare, tmp_path):
    model = llama()
    lora = LoraCallback(model, rank=2)
    trainer = Trainer(model=model if bare else lora.model, args=arguments(tmp_path), train_dataset=rows())
    trainer.add_callback(lora)
    before = adapter_tensors(lora.model)
    with pytest.raises(StateError, match="after Trainer was constructed"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in adapter_tensors(lora.model).items())

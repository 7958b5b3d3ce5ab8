"""LoraCallback under TRL's trainers: supervised fine-tuning, and GRPO against a reference policy.

TRL's own defaults hold where nothing else is said: bfloat16 autocast around the trained model, gradient checkpointing.
"""

import gc
import random

import pytest
import torch
from helpers import llama
from lora_adapters_transformers import LoraCallback
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import lora_adapters as la
from lora_adapters.errors import RequestError, StateError

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

#: Releases before 1.16 compute every loss in a Triton kernel, which has no CPU form.
trains = pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="TRL before 1.16 trains on a GPU only")

WORDS = [f"w{n}" for n in range(28)]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)


def tokenizer():
    """One token for each word; the numbers are those of helpers.llama."""
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def sentences(length=6, count=16):
    chance = random.Random(3)
    return [" ".join(chance.choices(WORDS, k=length)) for _ in range(count)]


def data(kind):
    if kind == "text":
        return datasets.Dataset.from_dict({"text": sentences()})
    if kind == "prompt":
        return datasets.Dataset.from_dict({"prompt": sentences(3)})
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        for asked, answered in zip(sentences(3), sentences(5), strict=True)
    ]
    return datasets.Dataset.from_dict({"messages": turns})


def settings(folder, **options):
    common = dict(
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
    return common | options


def sft(lora, folder, kind="text", **options):
    return trl.SFTTrainer(
        model=lora.model,
        args=trl.SFTConfig(**settings(folder, max_length=16, **options)),
        train_dataset=data(kind),
        processing_class=tokenizer(),
        callbacks=[lora],
    )


def early_words(completions, **columns):
    """Reward the share of words from the first half of the vocabulary."""
    early = set(WORDS[:14])
    return [sum(word in early for word in text.split()) / 8 for text in completions]


def grpo(lora, folder, callbacks=(), **options):
    options = dict(beta=0.5, num_generations=4, max_completion_length=8) | options
    return trl.GRPOTrainer(
        model=lora.model,
        reward_funcs=early_words,
        args=trl.GRPOConfig(**settings(folder, **options)),
        train_dataset=data("prompt"),
        processing_class=tokenizer(),
        callbacks=[lora, *callbacks],
    )


def logits(model):
    ids = torch.randint(3, 32, (3, 6), generator=torch.Generator().manual_seed(9))
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def base(quantization):
    model = llama()
    return la.attach(model, rank=2, quantization=quantization).detach() if quantization else model


def check_checkpoint(folder, lora, quantization):
    """The folder's own files are the adapter alone, and it computes what the trained model does, here and in PEFT."""
    assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & {path.name for path in folder.iterdir()}
    tensors = load_file(folder / "adapter_model.safetensors")
    values = trained(lora.model)
    assert {key.replace("_A.", "_A.default.").replace("_B.", "_B.default.") for key in tensors} == values.keys()
    # TRL computes in bfloat16 by wrapping the forward of what it trains; the base itself is asked without that.
    expected = logits(lora.adapter.base)
    ours = base(quantization)
    la.restore(ours, folder)
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=0)
    theirs = PeftModel.from_pretrained(base(quantization), folder)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    assert (expected - logits(base(quantization))).abs().max() > 1e-3


# ---- supervised fine-tuning ------------------------------------------------------------------------------------------


@trains
@pytest.mark.parametrize(
    "quantization, kind, options",
    [
        (None, "text", {}),
        ("nf4", "text", {}),
        (None, "messages", {"assistant_only_loss": True}),
        ("nf4", "text", {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "bf16": False}),
    ],
    ids=["dense", "nf4", "dense chat", "nf4 reentrant"],
)
def test_sft_trains_and_saves_the_adapter_alone(quantization, kind, options, tmp_path):
    lora = LoraCallback(llama(), rank=2, quantization=quantization)
    before, untrained = frozen(lora.model), trained(lora.model)
    trainer = sft(lora, tmp_path, kind, **options)
    assert trainer.args.gradient_checkpointing
    trainer.train()
    after = trained(lora.model)
    assert after.keys() == untrained.keys()
    assert all(not torch.equal(value, untrained[name]) for name, value in after.items())
    now = frozen(lora.model)
    assert now.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in now.items())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert 0 < logged[0]["adapter_norm"] < logged[-1]["adapter_norm"]
    check_checkpoint(tmp_path / "checkpoint-4", lora, quantization)
    trainer.save_model(str(tmp_path / "final"))
    check_checkpoint(tmp_path / "final", lora, quantization)


@trains
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_sft_learns(quantization, tmp_path):
    # With the usual small initial values the head of a model this small could express next to nothing.
    lora = LoraCallback(llama(initializer_range=0.3), rank=4, quantization=quantization)
    trainer = sft(lora, tmp_path, max_steps=40, save_strategy="no", logging_steps=10)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@trains
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("start", ["sft", "grpo"])
def test_the_adapter_of_a_quantized_base_keeps_its_dtype(start, dtype, tmp_path):
    """TRL casts it to bfloat16, whose steps are larger than the updates of a usual learning rate."""
    lora = LoraCallback(llama(), rank=2, quantization="nf4", **({} if dtype is None else {"dtype": dtype}))
    wanted = dtype or torch.float32
    make = {"sft": sft, "grpo": grpo}[start]
    make(lora, tmp_path, max_steps=2).train()
    assert {value.dtype for value in trained(lora.model).values()} == {wanted}
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {wanted}


@trains
def test_sft_resumes_bit_identically(tmp_path):
    def run(folder, resume=None):
        lora = LoraCallback(llama(), rank=2, quantization="nf4", dropout=0.2, seed=4)
        sft(lora, folder).train(resume_from_checkpoint=resume)
        return trained(lora.model)

    whole = run(tmp_path)
    again = run(tmp_path / "again", str(tmp_path / "checkpoint-2"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_sft_refuses_the_bare_model_at_once(tmp_path):
    lora = LoraCallback(llama(), rank=2)
    with pytest.raises(StateError, match=r"Trainer\(model=lora.model"):
        trl.SFTTrainer(
            model=lora.adapter.base,
            args=trl.SFTConfig(**settings(tmp_path)),
            train_dataset=data("text"),
            processing_class=tokenizer(),
            callbacks=[lora],
        )


# ---- GRPO ------------------------------------------------------------------------------------------------------------


def storages():
    """Address -> bytes of every parameter's memory, in all modules that are alive in this process."""
    gc.collect()
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    parameters = [p for module in modules for p in module.parameters(recurse=False) if p.device.type != "meta"]
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}


@trains
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_grpo_measures_the_divergence_without_a_second_base(quantization, tmp_path):
    lora = LoraCallback(llama(), rank=2, quantization=quantization)
    before, untrained = frozen(lora.model), trained(lora.model)
    expected = logits(base(quantization))
    alive = storages()
    trainer = grpo(lora, tmp_path)
    assert trainer.ref_model is None
    trainer.train()

    # New since then are copies of the adapter at most: TRL keeps one of its initial values, named "ref".
    factors = {p.untyped_storage().data_ptr() for n, p in lora.model.named_parameters() if "lora_" in n}
    new = storages().keys() - alive.keys()
    assert not new - factors
    assert len(new) <= 2 * len(untrained)

    divergence = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert len(divergence) == 4
    assert divergence[0] == pytest.approx(0, abs=1e-7)
    assert all(value > 1e-6 for value in divergence[1:])

    assert all(not torch.equal(value, untrained[name]) for name, value in trained(lora.model).items())
    now = {name: value for name, value in frozen(lora.model).items() if name in before}
    assert all(torch.equal(value, before[name]) for name, value in now.items())
    assert now.keys() == before.keys()
    with lora.adapter.disabled():
        torch.testing.assert_close(logits(lora.adapter.base), expected, rtol=0, atol=0)

    check_checkpoint(tmp_path / "checkpoint-4", lora, quantization)
    trainer.save_model(str(tmp_path / "final"))
    check_checkpoint(tmp_path / "final", lora, quantization)
    lora.adapter.save(tmp_path / "ours")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    check_checkpoint(tmp_path / "ours", lora, quantization)


@trains
def test_grpo_resumes_and_goes_on(tmp_path):
    def run(folder, resume=None):
        lora = LoraCallback(llama(), rank=2, seed=4)
        trainer = grpo(lora, folder)
        trainer.train(resume_from_checkpoint=resume)
        return lora, trainer

    lora, trainer = run(tmp_path)
    again, trainer_again = run(tmp_path / "again", str(tmp_path / "checkpoint-2"))
    assert trainer_again.state.global_step == 4
    whole, parts = trained(lora.model), trained(again.model)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert [e["kl"] for e in trainer.state.log_history if "kl" in e] == [
        e["kl"] for e in trainer_again.state.log_history if "kl" in e
    ]

    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 6
    assert all(not torch.equal(value, whole[name]) for name, value in trained(lora.model).items())


def test_training_resumes_beside_a_frozen_adapter(tmp_path):
    """As GRPO has it, with Trainer's own training, which runs everywhere."""
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer()(sentences(), return_tensors="pt")["input_ids"]]

    def run(folder, resume=None):
        lora = LoraCallback(llama(), rank=2, seed=4)
        lora.model.add_adapter("ref", lora.model.peft_config["default"])
        args = TrainingArguments(**settings(folder))
        trainer = Trainer(model=lora.model, args=args, train_dataset=rows, callbacks=[lora])
        trainer.train(resume_from_checkpoint=resume)
        return trained(lora.model)

    whole = run(tmp_path)
    again = run(tmp_path / "again", str(tmp_path / "checkpoint-2"))
    assert whole.keys() == again.keys()
    assert all(".default." in name for name in whole)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


@trains
def test_grpo_starts_from_what_sft_trained(tmp_path):
    """The reference is then the policy after SFT, not the base, and stays so when training is resumed elsewhere."""
    lora = LoraCallback(llama(), rank=2, seed=4)
    sft(lora, tmp_path / "sft").train()
    tuned = trained(lora.model)
    trainer = grpo(lora, tmp_path / "grpo")
    trainer.train()
    divergence = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergence[0] == pytest.approx(0, abs=1e-7)

    again = LoraCallback(llama(), rank=2, seed=4)
    resumed = grpo(again, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "grpo" / "checkpoint-2"))
    assert [entry["kl"] for entry in resumed.state.log_history if "kl" in entry] == divergence
    reference = {n: p for n, p in again.model.named_parameters() if ".ref." in n}
    assert len(reference) == len(tuned)
    assert all(torch.equal(value, tuned[name.replace(".ref.", ".default.")]) for name, value in reference.items())


@trains
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_after_grpo_the_adapter_merges_and_leaves(quantization, tmp_path):
    lora = LoraCallback(llama(), rank=2, quantization=quantization)
    grpo(lora, tmp_path, max_steps=2).train()
    expected = logits(lora.adapter.base)
    with pytest.raises(RequestError, match="delete_adapter"):
        lora.adapter.merge(unload=True)
    torch.testing.assert_close(logits(lora.adapter.base), expected, rtol=0, atol=0)
    lora.model.delete_adapter("ref")
    lora.adapter.merge()
    torch.testing.assert_close(logits(lora.adapter.base), expected, rtol=1e-4, atol=1e-5)
    plain = lora.adapter.detach()
    torch.testing.assert_close(logits(plain), logits(base(quantization)), rtol=0, atol=0)
    assert [type(module) for module in plain.modules()] == [type(module) for module in base(quantization).modules()]

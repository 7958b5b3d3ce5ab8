"""The engine on CUDA: loading in 4 bits, training through LoraCallback, saving, restoring, merging, detaching."""

import copy

import pytest
import torch
from helpers import llama, perturb
from lora_adapters_transformers import LoraCallback
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import lora_adapters as la
from lora_adapters.memory import measure_step
from lora_adapters.weights import store_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.bfloat16]


def model(dtype=torch.bfloat16):
    return llama(hidden_size=64, intermediate_size=96).to("cuda", dtype)


def ids(rows=3):
    return torch.randint(3, 32, (rows, 6), generator=torch.Generator().manual_seed(9)).cuda()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits


def quantized_weights(model):
    stores = {n: store_for(m) for n, m in model.named_modules()}
    return {n: s.read(torch.float32) for n, s in stores.items() if s is not None and s.format != "dense"}


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_loading_and_quantizing_in_memory_give_the_same_weights(format, tmp_path):
    model(torch.float16).save_pretrained(tmp_path)
    loaded = la.load(str(tmp_path), quantization=format, device="cuda")
    in_memory = la.load(str(tmp_path), device="cuda")
    la.attach(in_memory, rank=2, quantization=format).detach()
    theirs, ours = quantized_weights(loaded), quantized_weights(in_memory)
    assert theirs.keys() == ours.keys()
    assert theirs
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.items())
    assert torch.equal(logits(loaded), logits(in_memory))


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(quantization, checkpointing, tmp_path):
    lora = LoraCallback(model(), rank=4, targets="all-linear", quantization=quantization)
    base = {n: p.detach().clone() for n, p in lora.model.named_parameters() if not p.requires_grad}
    rows = [{"input_ids": row, "labels": row} for row in ids(8).cpu()]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1,
        save_steps=20, report_to=[], disable_tqdm=True, bf16=True, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer = Trainer(model=lora.model, args=args, train_dataset=rows, callbacks=[lora])
    trainer.train()
    trainer.accelerator.unwrap_model(lora.model, keep_fp32_wrapper=False)  # evaluate without its mixed precision
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, base[n]) for n, p in lora.model.named_parameters() if n in base)
    fresh = model()
    if quantization:
        la.attach(fresh, rank=2, quantization=quantization).detach()
    again = copy.deepcopy(fresh)
    la.restore(fresh, tmp_path / "checkpoint-20")
    theirs = PeftModel.from_pretrained(again, tmp_path / "checkpoint-20")
    expected = logits(lora.model)
    torch.testing.assert_close(logits(fresh), expected, rtol=0, atol=0)
    # Both round to 16 bits, in another order.
    assert (logits(theirs) - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_merge_unmerge_detach(quantization, dtype):
    base = model(dtype)
    adapter = la.attach(base, rank=4, targets="all-linear", quantization=quantization)
    plain = {n: p.detach().clone() for n, p in base.named_parameters() if "lora_" not in n}
    perturb(adapter.model)
    expected = logits(base)
    adapter.merge()
    size = expected.abs().max().item()
    assert (logits(base) - expected).abs().max().item() <= (2e-2 if dtype == torch.bfloat16 else 2e-3) * size
    adapter.unmerge()
    assert torch.equal(logits(base), expected)
    adapter.detach()
    now = dict(base.named_parameters())
    assert len(now) == len(plain)
    assert all(torch.equal(now[name.replace(".base_layer", "")], value) for name, value in plain.items())


def test_a_plan_predicts_the_memory_of_a_step():
    base = llama(
        hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4,
        vocab_size=4000, max_position_embeddings=1024,
    ).to("cuda", torch.bfloat16)  # fmt: skip
    plan = la.plan(base, rank=16, targets="all-linear", quantization="nf4")
    predicted = plan.memory(batch_size=2, sequence_length=512, autocast=torch.bfloat16)
    adapter = la.attach(base, rank=16, targets="all-linear", quantization="nf4")
    tokens = torch.randint(3, 4000, (2, 512), device="cuda")
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    measured = measure_step(adapter.model, inputs, autocast=torch.bfloat16)
    assert predicted.total == pytest.approx(measured.total, rel=0.1), (predicted, measured)

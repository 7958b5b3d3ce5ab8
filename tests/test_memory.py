"""Predicted memory of a training step, against the tracker, against torch's allocator, and against counting by hand."""

import copy
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from lora_adapters.errors import RequestError, UnsupportedError
from lora_adapters.memory import StepMemory, measure_step, predict_step

LLAMA = dict(
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=512,
    vocab_size=500,
    pad_token_id=0,
)


TINY = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128)


def llama(device="cpu", dtype=torch.float32, checkpointing=False, **changes):
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})).to(dtype)
        config = LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def batch(rows, length, vocabulary=500):
    ids = torch.randint(1, vocabulary, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def close(predicted: StepMemory, measured: StepMemory) -> bool:
    for name in ("weights", "adapter", "gradients", "optimizer"):
        assert getattr(predicted, name) == getattr(measured, name), name
    assert predicted.activations == pytest.approx(measured.activations, rel=0.1)
    return predicted.total == pytest.approx(measured.total, rel=0.1)


def allocator_peak(model, inputs, autocast=None) -> int:
    """Peak of what torch's CPU allocator handed out in the second step; knows nothing of the tracker."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()

    def step():
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    return highest


@pytest.mark.parametrize(
    "rows, length, dtype, checkpointing, autocast",
    [
        (4, 128, torch.float32, False, None),
        (4, 128, torch.float32, True, None),
        (1, 96, torch.bfloat16, False, None),
        (3, 32, torch.float32, False, torch.bfloat16),
    ],
)
def test_llama_from_meta_is_as_measured_and_as_allocated(rows, length, dtype, checkpointing, autocast):
    size = {} if rows == 4 else TINY
    model, inputs = llama("cpu", dtype, checkpointing, **size), batch(rows, length)
    predicted = predict_step(llama("meta", dtype, checkpointing, **size), inputs, autocast=autocast)
    measured = measure_step(model, inputs, autocast=autocast)
    assert close(predicted, measured)
    fixed = measured.weights + measured.adapter + measured.optimizer
    assert predicted.total == pytest.approx(fixed + allocator_peak(model, inputs, autocast), rel=0.1)
    assert predicted.total - fixed == pytest.approx(allocator_peak(model, inputs, autocast), rel=0.1)


def test_checkpointing_can_be_asked_for_and_saves_activations():
    model, inputs = llama("meta", **TINY), batch(4, 128)
    plain = predict_step(model, inputs)
    asked = predict_step(model, inputs, checkpointing=True)
    assert asked.activations < 0.8 * plain.activations
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert asked == predict_step(llama("meta", checkpointing=True, **TINY), inputs)


def test_meta_inputs_work_and_overestimate_at_most_the_mask():
    model, inputs = llama("meta", **TINY), batch(2, 128)
    meta = {name: t.to("meta") for name, t in inputs.items()}
    assert predict_step(model, meta).total == pytest.approx(predict_step(model, inputs).total, rel=0.1)


def test_padding_is_seen_in_real_inputs():
    inputs = batch(2, 128)
    inputs["attention_mask"][0, :50] = 0
    assert close(predict_step(llama("meta", **TINY), inputs), measure_step(llama(**TINY), inputs))


def test_bert_classifier():
    config = BertConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, vocab_size=300
    )
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(BertForSequenceClassification(config), lora)
    inputs = {**batch(8, 64, 300), "labels": torch.zeros(8, dtype=torch.long)}
    assert close(predict_step(model, inputs), measure_step(model, inputs))


def test_sequence_classifier_that_looks_for_padding():
    with torch.device("meta"):
        model = LlamaForSequenceClassification(LlamaConfig(**LLAMA | TINY))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    inputs = {**batch(2, 32), "labels": torch.zeros(2, dtype=torch.long)}
    real = copy.deepcopy(model).to_empty(device="cpu")
    for p in real.parameters():
        nn.init.normal_(p, std=0.02)
    assert close(predict_step(model, inputs), measure_step(real, inputs))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
        )
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.dropout(self.body(x).mean((2, 3))))


def test_conv_net_without_a_loss_takes_the_sum():
    model = get_peft_model(ConvNet(), LoraConfig(r=4, target_modules=r"body\.[04]"))
    inputs = {"x": torch.randn(8, 3, 64, 64)}
    assert close(predict_step(model, inputs), measure_step(model, inputs))


@pytest.mark.parametrize("quantization", ["nf4", "fp4-plain", "int8"])
def test_bitsandbytes_llama(quantization):
    bnb = pytest.importorskip("bitsandbytes")
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | dict(num_hidden_layers=2)))
    dense = sum(p.numel() * 4 for p in model.parameters())
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in n]:
        if quantization == "int8":
            new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            kind, nested = quantization[:3], quantization == "nf4"
            new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(linear.weight.data, quant_type=kind, compress_statistics=nested)
            new.support_avx512bf16_for_cpu = False
        model.set_submodule(name, new.to("cpu"))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantization == "int8", quantization != "int8"
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    inputs = batch(2, 64)
    predicted, measured = predict_step(model, inputs), measure_step(model, inputs)
    assert close(predicted, measured)
    assert predicted.weights < (0.5 if quantization == "int8" else 0.42) * dense


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused", "sgd", "adafactor", None])
def test_optimizers(optimizer):
    model, inputs = llama(**TINY | dict(num_hidden_layers=1)), batch(1, 16)
    assert close(predict_step(model, inputs, optimizer=optimizer), measure_step(model, inputs, optimizer=optimizer))


def test_adamw_state_is_two_moments_and_a_counter():
    model = llama("meta", **TINY)
    memory = predict_step(model, batch(1, 16))
    count = sum(1 for p in model.parameters() if p.requires_grad)
    assert memory.optimizer == 2 * memory.adapter + 4 * count


def test_8bit_adamw_state():
    layer = nn.Linear(256, 64)  # 16384 weights in 8 bits with 64 scales, 64 biases in fp32
    assert predict_step(layer, {"input": torch.randn(2, 256)}, optimizer="adamw_8bit").optimizer == (
        2 * (16384 + 4 * 64) + 8 * 64
    )


def test_optimizer_of_ones_own():
    layer, inputs = nn.Linear(64, 64, bias=False), {"input": torch.randn(2, 64)}
    memory = predict_step(layer, inputs, optimizer=lambda params: torch.optim.SGD(params, momentum=0.9))
    assert memory.optimizer == 64 * 64 * 4


class Chain(nn.Module):
    """exp of exp of (x * w): every tensor can be counted by hand."""

    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return (x * self.w).exp().exp()


def test_a_chain_counted_by_hand():
    size = 1000
    n = 4 * size  # bytes of one fp32 vector
    for memory in (
        predict_step(Chain(size), {"x": torch.randn(size)}, optimizer=None),
        measure_step(Chain(size), {"x": torch.randn(size)}, optimizer=None),
    ):
        # Saved: x, exp1, exp2. sum() leaves a scalar (4 bytes), backward starts with a scalar one, expanded as a view.
        # exp2's backward: x, exp1, exp2 and its gradient: 4n. exp1's: x, exp1, two gradients, exp2 freed: 4n.
        assert memory.activations == pytest.approx(4 * n, abs=16)
        assert (memory.weights, memory.adapter, memory.gradients, memory.optimizer) == (0, n, n, 0)
        assert memory.total == pytest.approx(n + 4 * n, abs=16)


def test_a_shared_weight_counts_once():
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | TINY, tie_word_embeddings=True))
    untied = LlamaForCausalLM(LlamaConfig(**LLAMA | TINY, tie_word_embeddings=False))
    difference = predict_step(untied, batch(1, 8)).adapter - predict_step(model, batch(1, 8)).adapter
    assert difference == 500 * 64 * 4


def everything(model):
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    return tensors, {n: m.training for n, m in model.named_modules()}, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("step", [predict_step, measure_step])
def test_nothing_is_changed(step):
    model = get_peft_model(ConvNet(), LoraConfig(r=4, target_modules=["head"], lora_dropout=0.5)).eval()
    model.base_model.model.body.train()
    model.base_model.model.head.lora_A["default"].weight.grad = torch.ones(4, 32)
    before, rng, python = everything(model), torch.get_rng_state(), random.getstate()
    parts = {n: (id(m), set(vars(m))) for n, m in model.named_modules()}
    step(model, {"x": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))})
    after = everything(model)
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert before[1:] == after[1:]
    assert torch.equal(rng, torch.get_rng_state())
    assert python == random.getstate()
    assert parts == {n: (id(m), set(vars(m))) for n, m in model.named_modules()}
    assert all(type(p).__name__ == "Parameter" for p in model.parameters())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        x = self.inner(x)
        return x if x.sum() > 0 else -x


def test_control_flow_on_values_is_named():
    with pytest.raises(UnsupportedError, match=r"can't be simulated: DataDependent.* in Branching"):
        predict_step(Branching(), {"x": torch.randn(2, 4)})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cuda_without_cuda_keeps_dropout_masks_as_cuda_does(checkpointing, monkeypatch):
    """The CPU keeps each mask in the input's dtype, CUDA in a byte an element."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    inputs, rows = batch(2, 64), 2 * 64
    meta = llama("meta", checkpointing=checkpointing)
    cpu, cuda = predict_step(meta, inputs), predict_step(meta, inputs, device="cuda")
    assert cuda.adapter == cpu.adapter
    # In one layer: q, k, v, o, gate and up take 256 features, down takes 512.
    masks = (6 * 256 + 512) * rows * 3 * (1 if checkpointing else LLAMA["num_hidden_layers"])
    assert cpu.activations - cuda.activations == pytest.approx(masks, rel=0.1)


def test_an_error_of_the_forward_is_named():
    with pytest.raises(UnsupportedError, match=r"RuntimeError in Linear: .+"):
        predict_step(Branching(), {"x": torch.randn(2, 5)})


def test_bad_requests():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(RequestError, match="trainable"):
        predict_step(frozen, {"input": torch.ones(1, 2)})
    with pytest.raises(RequestError, match="adamw_8bit"):
        predict_step(nn.Linear(2, 2), {"input": torch.ones(1, 2)}, optimizer="adam8")
    with pytest.raises(RequestError, match="meta"):
        measure_step(nn.Linear(2, 2, device="meta"), {"input": torch.ones(1, 2)})
    with pytest.raises(UnsupportedError, match="gradient_checkpointing_enable"):
        predict_step(nn.Linear(2, 2), {"input": torch.ones(1, 2)}, checkpointing=True)

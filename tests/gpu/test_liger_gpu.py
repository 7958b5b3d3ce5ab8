"""Liger's kernels on a GPU: the loss and every gradient are those without them, and detaching gives the model back."""

import pytest
import torch
from helpers import assert_same, perturb, state

import lora_adapters as la
from lora_adapters.errors import StateError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
pytest.importorskip("liger_kernel")

SMALL = dict(
    hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    vocab_size=320, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EVERYTHING = ("fused linear cross entropy", "norm", "MLP", "rotary embedding")


_attached = []


@pytest.fixture(autouse=True)
def _own_rotary_embedding():
    """Detach what a test attached: the rotary kernel is shared by all models of a type."""
    yield
    for adapter in reversed(_attached):
        adapter.detach()
    _attached.clear()


def build(family, dtype, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | options)
    return AutoModelForCausalLM.from_config(config).to("cuda", dtype)


def batch():
    ids = torch.randint(3, 320, (3, 33), generator=torch.Generator().manual_seed(9))
    labels = ids.clone()
    labels[:, :5] = -100
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    labels[1, 20:] = -100
    return {k: v.cuda() for k, v in dict(input_ids=ids, attention_mask=mask, labels=labels).items()}


def adapted(family, dtype, liger, *, checkpointing=False, settings=(), **options):
    model = build(family, dtype, **dict(settings))
    options = {"targets": "all-linear"} | options
    adapter = la.attach(model, rank=4, seed=1, liger=liger, **options)
    _attached.append(adapter)
    perturb(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.train(), adapter


def step(model, **more):
    model.zero_grad()
    output = model(**batch(), **more)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output, gradients


def distance(one, other):
    return ((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-6)).item()


def distances(ours, theirs):
    (output, gradients), (expected, their_gradients) = ours, theirs
    assert gradients.keys() == their_gradients.keys()
    found = {name: distance(gradients[name], gradient) for name, gradient in their_gradients.items()}
    return {"loss": distance(output.loss, expected.loss), **found}


def assert_close(ours, theirs, tolerance):
    far = {name: d for name, d in distances(ours, theirs).items() if not d <= tolerance}
    assert not far


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "phi3", "olmo2"])
def test_fp32(family, quantization, checkpointing):
    options = dict(quantization=quantization, checkpointing=checkpointing)
    plain, _ = adapted(family, torch.float32, False, **options)
    model, adapter = adapted(family, torch.float32, True, **options)
    assert all(name in adapter.summary() for name in EVERYTHING)
    assert "left out" not in adapter.summary()
    ours, theirs = step(model), step(plain)
    assert ours[0].logits is None
    assert_close(ours, theirs, 1e-3 if quantization else 1e-4)
    with torch.no_grad():
        assert distance(model.eval()(**batch()).logits, plain.eval()(**batch()).logits) < 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bf16_is_as_near_to_fp32_as_without(family, checkpointing):
    plain, _ = adapted(family, torch.bfloat16, False, checkpointing=checkpointing)
    model, _ = adapted(family, torch.bfloat16, True, checkpointing=checkpointing)
    exact, _ = adapted(family, torch.bfloat16, False)
    exact.float()
    reference = step(exact)
    theirs = distances(step(plain), reference)
    ours = distances(step(model), reference)
    assert not {name: (d, theirs[name]) for name, d in ours.items() if not d <= 2 * theirs[name] + 1e-2}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bf16_on_a_4_bit_base(family):
    options = dict(quantization="nf4", checkpointing=True)
    ours = step(adapted(family, torch.bfloat16, True, **options)[0])
    assert_close(ours, step(adapted(family, torch.bfloat16, False, **options)[0]), 8e-2)


def test_autocast():
    ours, theirs = (adapted("llama", torch.float32, liger)[0] for liger in (True, False))
    with torch.autocast("cuda", torch.bfloat16):
        assert_close(step(ours), step(theirs), 8e-2)


@pytest.mark.parametrize(
    "options",
    [
        dict(targets="attention+head"),
        dict(modules_to_save=["lm_head"]),
        dict(modules_to_save=["norm"]),
        dict(fused=False),
    ],
)
def test_heads_and_norms_that_are_trained(options):
    plain, _ = adapted("llama", torch.float32, False, **options)
    model, adapter = adapted("llama", torch.float32, True, **options)
    assert_close(step(model), step(plain), 1e-4)
    head = "head" in str(options)
    assert ("fused loss is left out" in adapter.summary()) is head


def test_an_adapter_that_comes_to_the_head_later():
    plain, _ = adapted("llama", torch.float32, False)
    model, _ = adapted("llama", torch.float32, True)
    for one in (plain, model):
        _attached.append(la.attach(one, rank=2, targets="head", adapter_name="second", seed=2))
        perturb(one)
    assert_close(step(model.train()), step(plain.train()), 1e-4)


def test_num_items_in_batch_as_trainer_gives_it():
    plain, _ = adapted("llama", torch.float32, False)
    model, _ = adapted("llama", torch.float32, True)
    count = torch.tensor(50, device="cuda")
    assert_close(step(model, num_items_in_batch=count), step(plain, num_items_in_batch=count), 1e-4)


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_gradient():
    model, _ = adapted("llama", torch.float32, "auto")
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(StateError, match="retain_graph"):
        loss.backward()
    # Without labels there is no fused loss, and the MLPs say it.
    logits = model(input_ids=batch()["input_ids"]).logits
    logits.sum().backward(retain_graph=True)
    with pytest.raises(StateError, match="retain_graph"):
        logits.sum().backward()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_detach_gives_the_model_back(family):
    model = build(family, torch.bfloat16)
    before = state(model)
    with torch.no_grad():
        expected = model(**batch())
    adapter = la.attach(model, rank=4, targets="all-linear", liger=True)
    perturb(model)
    step(model.train())
    model.zero_grad()
    adapter.detach()
    assert_same(model, before)
    with torch.no_grad():
        found = model.eval()(**batch())
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_other_models_of_the_type_go_on():
    other = build("llama", torch.float32).cpu().eval()
    ids = batch()["input_ids"].cpu()
    expected = other(ids).logits
    model, _ = adapted("llama", torch.bfloat16, True)
    step(model)
    assert torch.equal(other(ids).logits, expected)
    partial = build("phi3", torch.float32, partial_rotary_factor=0.5).eval()
    expected = partial(ids.cuda()).logits
    adapted("phi3", torch.bfloat16, True)
    assert distance(partial(ids.cuda()).logits, expected) < 1e-5


def test_compiled():
    plain, _ = adapted("llama", torch.float32, False)
    model, _ = adapted("llama", torch.float32, True)
    output = torch.compile(model)(**batch())
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert_close((output, gradients), step(plain), 1e-3)

"""A model quantized in memory against the same model quantized by from_pretrained."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers.models.llama import LlamaForCausalLM
from transformers.trainer_utils import validate_quantization_for_training

from lora_adapters.weights import (
    guard_cpu_repacking,
    layer_kind,
    mark_quantized,
    quantize_modules,
    quantized_format,
    quantizer_for,
    store_for,
)

SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 64}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
GPT2 = GPT2Config(n_embd=96, n_layer=1, n_head=4, vocab_size=64, n_positions=32)
#: transformers moves quantized models to a GPU if there is one; the comparison is on the CPU.
CPU = {"device_map": {"": "cpu"}}
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    paths = {}
    for name, model in (("llama", LlamaForCausalLM(LLAMA)), ("gpt2", GPT2LMHeadModel(GPT2))):
        paths[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(paths[name])
    return paths


def in_memory(folder, request, dtype):
    """Return the dense model quantized by us, and the function that takes the flags back."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    quantizer = quantizer_for(request)
    names = [n for n, m in model.named_modules() if layer_kind(m) == "linear" and n != "lm_head"]
    quantize_modules(model, dict.fromkeys(names, quantizer), dtype)
    return model, mark_quantized(model, quantizer, dtype), names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_same_bits_as_from_pretrained(folders, architecture, name, dtype):
    config = BitsAndBytesConfig(**CONFIGS[name])
    theirs = AutoModelForCausalLM.from_pretrained(folders[architecture], dtype=dtype, quantization_config=config, **CPU)
    guard_cpu_repacking(theirs)
    ours, _, names = in_memory(folders[architecture], config, dtype)
    assert len(names) >= 4
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for key, tensor in other.items():
        assert mine[key].dtype == tensor.dtype, key
        assert torch.equal(mine[key], tensor), key
    for n in names:
        one, two = ours.get_submodule(n), theirs.get_submodule(n)
        assert type(one) is type(two)
        assert name == "int8" or one.compute_dtype == two.compute_dtype
        assert torch.equal(store_for(one).read(dtype), store_for(two).read(dtype))
    ids = torch.arange(12)[None]
    assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)
    flags = ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
    assert {f: getattr(ours, f, None) for f in flags} == {f: getattr(theirs, f, None) for f in flags}
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
    assert quantized_format(ours) == quantized_format(theirs) == name


@pytest.mark.parametrize("name", CONFIGS)
def test_trainer_treats_it_as_a_quantized_model_and_undo_takes_that_back(folders, name):
    untouched = AutoModelForCausalLM.from_pretrained(folders["llama"])
    before = (set(vars(untouched)), untouched.config.to_dict())
    model, undo, _ = in_memory(folders["llama"], name, torch.float32)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    model._hf_peft_config_loaded = True
    validate_quantization_for_training(model)
    with pytest.raises(ValueError, match="not supported"):
        model.half()
    del model._hf_peft_config_loaded
    undo()
    assert (set(vars(model)), model.config.to_dict()) == before
    validate_quantization_for_training(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_by_transformers_and_read_back(folders, name, tmp_path):
    model, _, names = in_memory(folders["llama"], name, torch.float32)
    partly = [n for n in names if "mlp" not in n]
    expected = {n: store_for(model.get_submodule(n)).read() for n in names}
    model.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", **CPU)
    guard_cpu_repacking(again)
    for n in names:
        assert torch.equal(store_for(again.get_submodule(n)).read(torch.float32), expected[n].float())
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    quantize_modules(model, dict.fromkeys(partly, quantizer_for(name)), torch.float32)
    mark_quantized(model, quantizer_for(name), torch.float32)
    model.save_pretrained(tmp_path / "part")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "part", **CPU)
    formats = {n: store_for(again.get_submodule(n)).format for n in names}
    assert formats == {n: name if n in partly else "dense" for n in names}


def test_a_model_transformers_loaded_can_be_mended(folders):
    """hidden_size 96: on a CPU with AVX512-BF16 its first evaluation would raise; the flag is forced here."""
    config = BitsAndBytesConfig(**CONFIGS["nf4"])
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=config, **CPU)
    reference = copy.deepcopy(model)
    guard_cpu_repacking(reference)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    ids = torch.arange(12)[None]
    with pytest.raises(RuntimeError), torch.no_grad():
        model.eval()(ids)
    assert guard_cpu_repacking(model) == len(layers) == 14
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, reference.eval()(ids).logits)
    gradients = []
    for net in (model, reference):
        embeddings = torch.linspace(-1, 1, 96 * 4).reshape(1, 4, 96).requires_grad_()
        net.train()(inputs_embeds=embeddings).logits.sum().backward()
        gradients.append(embeddings.grad)
    assert torch.equal(*gradients)

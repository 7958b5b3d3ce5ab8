"""Small models for the engine's tests."""

import subprocess
import sys

import torch
from torch import nn

from lora_adapters.testing.commands import run_command


class Net(nn.Module):
    """Embedding, grouped convolution, repeated blocks and a head."""

    def __init__(self, width: int = 32, classes: int = 5) -> None:
        super().__init__()
        self.emb = nn.Embedding(40, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=4)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(3)]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(self.emb(x).transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(self.norm(hidden))


def net(seed: int = 0, **options) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def llama(seed: int = 0, **options):
    """A two-layer Llama with random weights, grouped keys and values, and a vocabulary of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**settings | options))


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(seed))


def perturb(model: nn.Module, seed: int = 3) -> None:
    """Give every trainable parameter values of its own, so that the adapter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_((0.1 * noise).to(parameter.dtype))


def state(model: nn.Module) -> dict:
    """Everything that must be as before: tensors (bits), flags, classes, hooks, attributes."""
    tensors = {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items() if torch.is_tensor(v)}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    classes = {n: type(m) for n, m in model.named_modules()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    names = {n: sorted(k for k in vars(m) if not k.startswith("_")) for n, m in model.named_modules()}
    return {"tensors": tensors, "flags": flags, "classes": classes, "hooks": hooks, "names": names}


def assert_same(model: nn.Module, before: dict) -> None:
    """Assert that the model is as `state` saw it, bit for bit."""
    now = state(model)
    for key in ("flags", "classes", "hooks", "names"):
        assert now[key] == before[key], key
    assert now["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert now["tensors"][name].dtype == tensor.dtype, name
        assert torch.equal(_bits(now["tensors"][name]), _bits(tensor)), name


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN equals NaN when compared as bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def run_cli(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run `lora-adapters` in a process of its own, as its console script does.

    Args:
        before: code to run first; without any the process is forked with the libraries imported, which is quicker.
    """
    if not before:
        done = run_command(*arguments)
        return subprocess.CompletedProcess(arguments, done.status, done.stdout, done.stderr)
    code = (
        f"{before}import sys; sys.argv = ['lora-adapters', *{arguments!r}]; from lora_adapters.cli import main; main()"
    )
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)

"""Compares the roles we give with what the oracle saw, one registered model at a time."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from lora_adapters_transformers.backend import TransformersBackend
from lora_adapters_transformers.targets import TARGET_MAPS
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from sweep_build import Case, build
from sweep_trace import Trace, trace
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_adapters.targets import Classification, ModelInfo, candidates

ATTENTION = {"q", "k", "v", "o", "qkv", "kv"}
#: The end of the reason that marks a module as read directly, and modules that only fused kernels read.
READ = "where an adapter would do nothing"
FUSED = re.compile(r"(mamba|mixer|temporal_block|linear_attn)\.")
ADAPTED = {*ATTENTION, "mlp", "other"}

#: Where our roles and the oracle's or PEFT's differ on purpose: (type, regex of module names, reason).
EXPLAINED: tuple[tuple[str, str, str], ...] = (
    (
        "deepseek_v4",
        r"compressor\.gate_proj$",
        "weighs the keys and values that are pooled into one; it projects neither",
    ),
    *(
        (family, r"sconv\.weight_proj$", "makes the weights of a convolution over keys or values")
        for family in ("inkling2", "inkling2_text", "inkling2_loop_text")
    ),
)


@dataclass
class Outcome:
    """One row of the table. `verdict` is ok, wrong, refused, not built or not traced."""

    case: Case
    verdict: str
    detail: str = ""
    family: str = ""
    roles: Counter[str] = field(default_factory=Counter)
    default: str = ""
    attentions: int = 0
    notes: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)


def check(case: Case) -> Outcome:
    """Build, classify and trace one model, and say where the two disagree."""
    torch.manual_seed(0)  # layers dropped at random would make another table every time
    try:
        model = build(case)
    except Exception as error:  # whatever the library raises is the reason the table shows
        return Outcome(case, "not built", f"{type(error).__name__}: {_one_line(error)}")
    backend = TransformersBackend()
    info = ModelInfo("transformers", backend.family(model), candidates(model), model)
    classes = backend.classify(info, TARGET_MAPS)
    outcome = Outcome(
        case, "ok", "", info.family, Counter(classes.roles.values()), classes.default, notes=tuple(classes.notes)
    )
    outcome.problems += check_structure(model, info, classes, backend.heads_to_train(model), case.task)
    outcome.problems += check_against_peft(info, classes)
    try:
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        seen = _trace(model, backend.example_inputs(model, 1, 64, case.device))
    except Exception as error:
        outcome.verdict, outcome.detail = "not traced", f"{type(error).__name__}: {_one_line(error)}"
    else:
        outcome.attentions = len(seen.attentions)
        outcome.problems += check_against_trace(model, info, classes, seen)
    if outcome.problems:
        outcome.verdict = "wrong"
    return outcome


def _trace(model: nn.Module, inputs: dict[str, Any]) -> Trace:
    try:
        return trace(model, inputs)
    except (ValueError, RuntimeError, IndexError):  # a loss can depend on values that don't exist on the meta device
        return trace(model, {k: v for k, v in inputs.items() if k != "labels"})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def check_structure(
    model: nn.Module, info: ModelInfo, classes: Classification, heads: tuple[str, ...], task: str
) -> list[str]:
    """Facts that hold for any model: the output layer is a head, an embedding layer an embedding."""
    problems = []
    output = model.get_output_embeddings() if task != "sequence-classification" else None
    for name, module in info.modules.items():
        role = classes.roles.get(name)
        if role is None:
            problems.append(f"{name}: no role")
        if (output is module or any(name == h or name.startswith(h + ".") for h in heads)) and role in ADAPTED:
            problems.append(f"{name}: a head has the role {role}")
        if isinstance(module, nn.Embedding) != (role == "embedding"):
            problems.append(f"{name}: {type(module).__name__} has the role {role}")
    if task == "sequence-classification" and not heads:
        problems.append("no head to train")
    if task != "sequence-classification" and heads:
        problems.append(f"{heads}: a language model needs no new head")
    return problems


def check_against_peft(info: ModelInfo, classes: Classification) -> list[str]:
    """Every module that PEFT adapts by default must be one that "all-linear" adapts here."""
    wanted = PEFT_TARGETS.get(info.family)
    if wanted is None:
        return []
    problems = []
    for name in info.modules:
        matched = re.fullmatch(wanted, name) if isinstance(wanted, str) else name.rpartition(".")[2] in wanted
        role = classes.roles[name]
        if matched and (role not in ADAPTED or name in classes.never) and not _explained(info.family, name):
            problems.append(f"{name}: PEFT adapts it, its role is {role}, never={classes.never.get(name, '')!r}")
    return problems


def _explained(family: str, name: str) -> bool:
    return any(family == f and re.search(pattern, name) for f, pattern, _ in EXPLAINED)


def check_against_trace(model: nn.Module, info: ModelInfo, classes: Classification, seen: Trace) -> list[str]:
    """Compare with what the forward pass did."""
    problems: list[str] = []
    expected = expected_roles(info, seen)
    for name, module in info.modules.items():
        if isinstance(module, nn.Embedding):
            continue
        role, want = classes.roles[name], expected.get(name)
        fixed = _explained(info.family, name)
        convolution = isinstance(module, nn.Conv1d) and max(module.kernel_size) > 1  # mixes q, k or v over time
        if want and not _fits(role, want) and not fixed and not (convolution and role == "conv"):
            problems.append(f"{name}: role {role}, the forward pass shows {'/'.join(sorted(want))}")
        reached = f"{name}.weight" in seen.inputs
        used = not reached or _feeds_attention(name, seen, expected) or _is_linear_attention(name, classes, expected)
        if not want and role in ATTENTION and not fixed and not used:
            problems.append(f"{name}: role {role}, but no softmax attention uses it")
        if f"{name}.weight" in seen.read_directly and name not in classes.never and role in ADAPTED:
            problems.append(f"{name}: its weight is read without a call, and it is not marked so")
        called = reached and f"{name}.weight" not in seen.read_directly
        if called and classes.never.get(name, "").endswith(READ) and role in ADAPTED and not FUSED.search(name):
            problems.append(f"{name}: marked as read without a call, but it is called")
    for weight in seen.logits:
        name = weight.removesuffix(".weight")
        if classes.roles.get(name) in ADAPTED and not _explained(info.family, name):
            problems.append(f"{name}: makes the logits, its role is {classes.roles[name]}")
    for weight in seen.routed:
        name = weight.removesuffix(".weight")
        if classes.roles.get(name) == "mlp":
            problems.append(f"{name}: its output is sorted to choose experts, its role is mlp")
    return problems


def expected_roles(info: ModelInfo, seen: Trace) -> dict[str, set[str]]:
    """Return module name -> the parts of attention it plays."""
    expected: dict[str, set[str]] = {}
    for attention in seen.attentions:
        for part, weights in (("q", attention.q), ("k", attention.k), ("v", attention.v), ("o", attention.out)):
            for weight in weights:
                name = weight.removesuffix(".weight")
                if name in info.modules and isinstance(info.modules[name], nn.Linear | Conv1D | nn.Conv1d):
                    expected.setdefault(name, set()).add(part)
    return expected


def _fits(role: str, want: set[str]) -> bool:
    if role == "qkv":
        return "q" in want and bool(want & {"k", "v"})
    if role == "kv":
        return bool(want & {"k", "v"}) and "o" not in want
    return role in want


def _feeds_attention(name: str, seen: Trace, expected: dict[str, set[str]]) -> bool:
    """True for a stage of a projection (low rank, convolution) whose every reader, or every source, is in attention."""
    readers = {w.removesuffix(".weight") for w in seen.consumers(f"{name}.weight")}
    sources = {w.removesuffix(".weight") for w in seen.inputs[f"{name}.weight"].sources}
    after = bool(sources) and all("o" in expected.get(s, ()) for s in sources)
    inside = name.rpartition(".")[0] + "."
    before = bool(readers & set(expected)) and all(r in expected or r.startswith(inside) for r in readers)
    return after or before


def _is_linear_attention(name: str, classes: Classification, expected: dict[str, set[str]]) -> bool:
    """True inside a module that makes queries and an output but runs no softmax: the oracle can't see its products."""
    for levels in (1, 2):
        inside = name.rsplit(".", levels)[0] + "."
        siblings = {r for n, r in classes.roles.items() if n.startswith(inside)}
        no_softmax = not any(n.startswith(inside) for n in expected)
        if no_softmax and siblings & {"q", "qkv"} and "o" in siblings:
            return True
    return False

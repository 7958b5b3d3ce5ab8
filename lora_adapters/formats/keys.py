"""Tensor names: which layer a key belongs to, which of its factors it is, and the factors that a layer's tensors make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter_config import MAX_ALPHA, MAX_RANK
from ..errors import CheckpointError, UnsupportedError
from .factors import Factors, LohaFactors, LokrFactors, LoraFactors

#: End of a key -> which factor it is. "_lora" is of diffusers' first attention processors (to_q_lora.down.weight).
_ENDS = {
    **{".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_down.weight": "a", ".lora_up.weight": "b"},
    **{".lora.down.weight": "a", ".lora.up.weight": "b", "_lora.down.weight": "a", "_lora.up.weight": "b"},
    **{".lora_linear_layer.down.weight": "a", ".lora_linear_layer.up.weight": "b"},
    **{".lora_mid.weight": "mid", ".lora_B.bias": "bias", ".alpha": "alpha", ".dora_scale": "dora_scale"},
    **{".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude"},
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_LOHA = ("w1_a", "w1_b", "w2_a", "w2_b")
#: What else files of these families hold, which no factors here are: part of the key -> what it is.
_OTHERS = {
    ".diff_b": "a bias trained whole",
    ".diff": "a weight trained whole",
    ".w_norm": "a norm's weight trained whole",
    ".b_norm": "a norm's bias trained whole",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".a1.": "GLoRA",
    ".a2.": "GLoRA",
    ".b1.": "GLoRA",
    ".b2.": "GLoRA",
    ".on_input": "IA3",
    "bundle_emb.": "a textual inversion beside the adapter",
    ".lora_A.bias": "a bias of A",
}


@dataclass(frozen=True)
class Layer:
    """The tensors of one adapted layer: what they are ("a", "hada_w1_a", "alpha", ...) -> tensor."""

    name: str
    parts: Mapping[str, Tensor]


def split_key(key: str) -> tuple[str, str] | None:
    """Return (layer's name as the file has it, which factor), or None for a key of another kind."""
    found = [end for end in _ENDS if key.endswith(end)]
    if not found:
        return None
    end = max(found, key=len)
    return key[: -len(end)], _ENDS[end]


def layers_of(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Layer]:
    """Group tensors by layer.

    Raises:
        UnsupportedError: keys that are not of LoRA, LoHa or LoKr; the message names them and says what they are.
        CheckpointError: two keys say the same.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            foreign.append(key)
            continue
        name, part = split
        if part in parts.setdefault(name, {}):
            raise CheckpointError(f"{origin} is damaged: it holds {part} of {name!r} twice, under two names.")
        parts[name][part] = tensor
    if foreign:
        raise refused_keys(foreign, origin)
    return {name: Layer(name, found) for name, found in parts.items()}


def refused_keys(keys: Iterable[str], origin: str) -> UnsupportedError:
    """Return an error that names keys which nothing here is made of."""
    keys = sorted(keys)
    shown = [f"{key[:120]}{_said(key)}" for key in keys[:5]]
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return UnsupportedError(
        f"{origin} holds tensors that are not of LoRA, LoHa or LoKr, or of layers that are not known here: "
        f"{', '.join(shown)}{more}. Leaving them out would change what the adapter does, so nothing was read. If you "
        "don't need them, remove them from the file first."
    )


def _said(key: str) -> str:
    return next((f" ({what})" for part, what in _OTHERS.items() if part in key), "")


def factors_of(layer: Layer, origin: str, kernel: tuple[int, ...] = ()) -> Factors:
    """Make factors of a layer's tensors.

    Args:
        layer: its tensors, floating, any of the three kinds.
        origin: the file, for messages.
        kernel: the layer's kernel as far as its name tells, for LoHa and LoKr of flattened convolutions.

    Raises:
        CheckpointError: a tensor is missing, or shapes don't fit together.
    """
    parts, name = dict(layer.parts), layer.name
    alpha_tensor = parts.pop("alpha", None)
    magnitudes = {part: parts.pop(part) for part in ("magnitude", "dora_scale") if part in parts}
    kind = {"a": "LoRA", "b": "LoRA", "mid": "LoRA", "bias": "LoRA"}
    kinds = {kind.get(part, part.partition("_")[0]) for part in parts}
    if len(kinds) != 1:
        what = " and ".join(sorted(kinds)) or "an alpha or a magnitude alone"
        raise CheckpointError(f"{origin}: {name[:200]!r} has tensors of {what}. Copy or download the file again.")
    made = {"LoRA": _lora, "hada": _loha, "lokr": _lokr}[kinds.pop()](parts, kernel)
    if isinstance(made, str):
        raise CheckpointError(
            f"{origin} is damaged: {name[:200]!r} {made} "
            f"({', '.join(f'{part} {list(value.shape)}' for part, value in parts.items())}). Copy or download it again."
        )
    values: dict = {"alpha": float(made.rank) if alpha_tensor is None else number(alpha_tensor, name, origin)}
    for part, tensor in magnitudes.items():
        axis = _magnitude_axis(part, tuple(tensor.shape), made.shape)
        if len(magnitudes) > 1 or not axis:
            raise CheckpointError(
                f"{origin} is damaged: the magnitude of {name[:200]!r} has shape {list(tensor.shape)} for a layer of "
                f"{list(made.shape)}, or is there twice."
            )
        values |= {"magnitude": tensor.reshape(-1), "magnitude_axis": axis}
    return replace(made, **values)


def number(tensor: Tensor, name: str, origin: str) -> float:
    """Value of an alpha tensor.

    Raises:
        CheckpointError: it is not one finite number of a possible size.
    """
    value = tensor.item() if tensor.numel() == 1 else math.nan
    if not math.isfinite(value) or abs(value) > MAX_ALPHA:
        raise CheckpointError(f"{origin} is damaged: alpha of {name[:200]!r} is no number up to {MAX_ALPHA:g}.")
    return float(value)


def _fits(*shapes: tuple[int, ...]) -> bool:
    return all(0 not in shape for shape in shapes)


def _lora(parts: dict[str, Tensor], kernel: tuple[int, ...]) -> LoraFactors | str:
    if "a" not in parts or "b" not in parts:
        return f"has no {'lora_B (or lora_up)' if 'a' in parts else 'lora_A (or lora_down)'}"
    a, b, mid, bias = parts["a"], parts["b"], parts.get("mid"), parts.get("bias")
    if a.dim() not in (2, 3, 4, 5) or b.dim() not in (2, a.dim()) or not _fits(a.shape, b.shape):
        return "has factors that are no matrices or kernels"
    if b.dim() == 2 and a.dim() > 2:
        b = b.reshape(*b.shape, *[1] * (a.dim() - 2))
    if a.shape[0] != b.shape[1] or a.shape[0] > MAX_RANK or any(side != 1 for side in b.shape[2:]):
        return "has factors of different ranks"
    if mid is not None and (
        mid.dim() != a.dim() or mid.shape[:2] != (a.shape[0],) * 2 or any(side != 1 for side in a.shape[2:])
    ):
        return "has a core that does not fit its factors"
    if bias is not None and bias.shape != (b.shape[0],):
        return "has a bias of another size"
    return LoraFactors(alpha=0.0, a=a, b=b, mid=mid, bias=bias)


def _loha(parts: dict[str, Tensor], kernel: tuple[int, ...]) -> LohaFactors | str:
    values = {part.removeprefix("hada_"): tensor for part, tensor in parts.items()}
    if missing := set(_LOHA) - set(values):
        return f"has no hada_{min(missing)}"
    cores = [values.get("t1"), values.get("t2")]
    w1_a, w1_b, w2_a, w2_b = (values[part] for part in _LOHA)
    if (cores[0] is None) != (cores[1] is None):
        return "has one core where LoHa has two or none"
    if any(values[part].dim() != 2 for part in _LOHA) or not _fits(*(tensor.shape for tensor in values.values())):
        return "has factors that are no matrices"
    for half, core in (("w1", cores[0]), ("w2", cores[1])):
        a, b = values[f"{half}_a"], values[f"{half}_b"]
        ranks = (a.shape[1], b.shape[0]) if core is None else (a.shape[0], b.shape[0])
        if (core is None and ranks[0] != ranks[1]) or (core is not None and tuple(core.shape[:2]) != ranks):
            return "has factors of different ranks"
    sizes = [
        (values[f"{half}_a"].shape[0 if cores[0] is None else 1], values[f"{half}_b"].shape[1]) for half in ("w1", "w2")
    ]
    if sizes[0] != sizes[1] or (cores[0] is not None and cores[0].shape[2:] != cores[1].shape[2:]):  # type: ignore[union-attr]
        return "has two matrices of different sizes"
    kernel = () if cores[0] is not None or sizes[0][1] % math.prod(kernel) else kernel
    made = LohaFactors(alpha=0.0, kernel=kernel, w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b)
    return replace(made, t1=cores[0], t2=cores[1])


def _lokr(parts: dict[str, Tensor], kernel: tuple[int, ...]) -> LokrFactors | str:
    values = {part.removeprefix("lokr_"): tensor for part, tensor in parts.items()}
    if not _fits(*(tensor.shape for tensor in values.values())):
        return "has an empty factor"
    for half in ("w1", "w2"):
        pair = [f"{half}_a" in values, f"{half}_b" in values]
        if (half in values) == any(pair) or (any(pair) and not all(pair)):
            return f"must have lokr_{half}, or lokr_{half}_a and lokr_{half}_b"
    matrices = [values[part] for part in ("w1", "w1_a", "w1_b", "w2_a", "w2_b") if part in values]
    if any(matrix.dim() != 2 for matrix in matrices) or ("w2" in values and values["w2"].dim() not in (2, 3, 4, 5)):
        return "has factors that are no matrices or kernels"
    if "w1_a" in values and values["w1_a"].shape[1] != values["w1_b"].shape[0]:
        return "has factors of different ranks"
    core = values.get("t2")
    if core is not None and (
        "w2" in values or tuple(core.shape[:2]) != (values["w2_a"].shape[0], values["w2_b"].shape[0])
    ):
        return "has a core that does not fit its factors"
    if core is None and "w2_a" in values and values["w2_a"].shape[1] != values["w2_b"].shape[0]:
        return "has factors of different ranks"
    if core is not None or "w2" in values or values["w2_b"].shape[1] % math.prod(kernel):
        kernel = ()
    return replace(LokrFactors(alpha=0.0, kernel=kernel), **values)


def _magnitude_axis(part: str, sides: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Return what a magnitude counts, "" if it does not fit the layer.

    PEFT: (out,) or (1, out, 1, ...). dora_scale of LyCORIS: (out, 1, ...) or (1, in, 1, ...).
    """
    out, inside, ones = shape[0], shape[1], (1,) * (len(shape) - 2)
    if part == "magnitude":
        return "output" if sides in ((out,), (1, out, *ones)) else ""
    if sides in ((out,), (out, 1, *ones)):
        return "output"
    return "input" if sides == (1, inside, *ones) else ""


def tensors_for(factors: Factors, style: str) -> dict[str, Tensor]:
    """Return end of a key -> tensor, the inverse of `factors_of`.

    Args:
        factors: of any kind.
        style: "peft" (lora_A, lora_magnitude_vector; alpha is not a tensor) or "kohya" (lora_down, dora_scale, alpha).
    """
    made: dict[str, Tensor] = {}
    if isinstance(factors, LoraFactors):
        down, up = ("lora_A", "lora_B") if style == "peft" else ("lora_down", "lora_up")
        made = {f".{down}.weight": factors.a, f".{up}.weight": factors.b}
        if factors.mid is not None:
            made[".lora_mid.weight"] = factors.mid
        if factors.bias is not None:
            made[".lora_B.bias"] = factors.bias
    else:
        prefix = ".hada_" if isinstance(factors, LohaFactors) else ".lokr_"
        made = {f"{prefix}{name}": tensor for name, tensor in factors.tensors.items() if name != "magnitude"}
    if factors.magnitude is not None:
        made |= _magnitude_tensor(factors, factors.magnitude, style)
    if style == "kohya":
        made[".alpha"] = alpha_tensor(factors)
    return made


def _magnitude_tensor(factors: Factors, magnitude: Tensor, style: str) -> dict[str, Tensor]:
    ones = [1] * (len(factors.shape) - 2)
    if style == "peft":
        return {".lora_magnitude_vector": magnitude.reshape(1, -1, *ones) if ones else magnitude}
    if factors.magnitude_axis == "output":
        return {".dora_scale": magnitude.reshape(-1, 1, *ones)}
    return {".dora_scale": magnitude.reshape(1, -1, *ones)}


def alpha_tensor(factors: Factors) -> Tensor:
    """Return the alpha of files whose scaling is alpha / rank: a float32 scalar, float64 where that would round it."""
    alpha = factors.scaling * factors.rank if getattr(factors, "rank_stabilised", False) else factors.alpha
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)

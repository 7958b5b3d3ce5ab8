"""What a user asks `attach` for, checked before anything is looked at or changed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .error_text import did_you_mean
from .errors import RequestError

if TYPE_CHECKING:
    from .targets import Part

#: PEFT's names for what `attach` calls otherwise.
PEFT_NAMES: Mapping[str, str] = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "layers_to_transform": "layers",
    "exclude_modules": "exclude",
}
#: LoraConfig fields that the engine carries out itself. Any other field that differs from PEFT's default is carried out
#: by PEFT's own injection.
ENGINE_FIELDS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "rank_pattern",
        "revision",
        "task_type",
        "use_rslora",
    }
)
MAX_RANK = 65536


@dataclass(frozen=True)
class AttachRequest:
    """One request, free of contradictions. `AttachRequest.make` is the way to build it.

    Attributes:
        rank: default rank.
        alpha: default alpha; None means alpha = rank, so that the scale is 1.
        targets: role expression, names, mapping or "re:..."; see `lora_adapters.attach`.
        peft_targets: True if `targets` came as PEFT's `target_modules` and so has PEFT's meaning.
        dropout: probability in [0, 1).
        quantization: None, a quantizer's name, a BitsAndBytesConfig or a mapping role -> name.
        adapter_name: name among the model's adapters.
        layers: indices of the repeated blocks to adapt (negative ones count from the end), or None for all.
        exclude: names (suffixes) or "re:..." that must not be adapted.
        modules_to_save: names of modules to train and save whole; None lets the backend name a new task head.
        seed: makes lora_A's initial values, together with each module's name; None takes torch's current seed.
        dtype: dtype of the adapter's parameters; None means float32 (float64 on a float64 base).
        fused: "auto", fast forwards wherever they are exact, or False, PEFT's forward everywhere.
        liger: True, "auto" (where they can be had) or False: Liger's kernels in the base.
        norm: "eval", "train" or "affine": what becomes of BatchNorm's running statistics; see `lora_adapters.attach`.
        exact: full module name -> (rank, alpha), instead of targets: what a checkpoint says.
        exact_parts: full module name -> the parts of a fused projection that its ranks in `exact` are for.
        peft_fields: LoraConfig fields given by their own names.
    """

    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] | Mapping[str, Any] = "auto"
    peft_targets: bool = False
    dropout: float = 0.0
    quantization: Any = None
    adapter_name: str = "default"
    layers: tuple[int, ...] | None = None
    exclude: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] | None = None
    seed: int | None = None
    dtype: Any = None
    fused: Any = "auto"
    liger: Any = False
    norm: Any = "eval"
    exact: Mapping[str, tuple[int, float]] | None = None
    exact_parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    peft_fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, config: Any = None, **given: Any) -> AttachRequest:
        """Build a request from `attach`'s arguments, PEFT's names for them, or a whole LoraConfig.

        Raises:
            RequestError: an unknown name, a value out of range, or one thing given twice.
        """
        values = {name: value for name, value in given.items() if value is not _UNSET}
        if config is not None:
            values = _merge_config(config, values)
        peft_targets = "target_modules" in values
        for peft_name, name in PEFT_NAMES.items():
            if peft_name in values:
                if name in values:
                    raise RequestError(f"{name} and {peft_name} are the same thing: give one of them.")
                values[name] = values.pop(peft_name)
        own = {f.name for f in fields(cls)} - {"peft_fields", "peft_targets"}
        peft_fields = {name: values.pop(name) for name in list(values) if name not in own}
        if peft_fields:
            _check_names(peft_fields, own)
        if values.get("targets", "auto") is None:
            values.pop("targets")
            peft_targets = False
        return cls(**_normalise(values), peft_targets=peft_targets, peft_fields=peft_fields)

    @property
    def rslora(self) -> bool:
        """True if the scale is alpha / sqrt(rank) (rank-stabilised LoRA, arXiv 2312.03732) and not alpha / rank."""
        return bool(self.peft_fields.get("use_rslora", False))

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor of B @ A."""
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


class _Unset:
    def __repr__(self) -> str:
        return "<unset>"


_UNSET: Any = _Unset()


def _merge_config(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Take the fields of a LoraConfig that differ from its defaults; a field also given by name is an error."""
    import dataclasses

    if type(config).__name__ != "LoraConfig" and not any(c.__name__ == "LoraConfig" for c in type(config).__mro__):
        raise RequestError(f"config must be a peft.LoraConfig, got {type(config).__name__}.")
    default = type(config)()
    mine = {"r": config.r, "lora_alpha": config.lora_alpha}
    mine |= {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.init and getattr(config, f.name) != getattr(default, f.name)
    }
    renamed = {PEFT_NAMES.get(name, name): name for name in mine}
    for name in values:
        if (same := renamed.get(PEFT_NAMES.get(name, name))) is not None:
            raise RequestError(f"{name} is given by name and by config.{same}: give one of them.")
    for volatile in ("base_model_name_or_path", "peft_version", "auto_mapping"):
        mine.pop(volatile, None)
    return mine | values


def _check_names(names: Mapping[str, Any], own: set[str]) -> None:
    import dataclasses

    from peft import LoraConfig

    known = {f.name for f in dataclasses.fields(LoraConfig) if f.init} - set(PEFT_NAMES)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, sorted(known | own | set(PEFT_NAMES)))
            raise RequestError(f"Unknown argument {name!r}.{hint}")


def check_rank(value: Any, where: str = "rank") -> int:
    """Return a rank that is a whole number in 1..65536, else raise RequestError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{where} must be a whole number, got {value!r}.")
    if not 1 <= value <= MAX_RANK:
        raise RequestError(f"{where} must be in 1..{MAX_RANK}, got {value}.")
    return value


def check_alpha(value: Any, where: str = "alpha") -> float:
    """Return a finite alpha, else raise RequestError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{where} must be a finite number, got {value!r}.")
    return value


def check_fused(value: Any) -> Any:
    """Return "auto" or False, else raise RequestError."""
    if value is not False and value != "auto":
        raise RequestError(f"fused must be 'auto' or False, got {value!r}.")
    return value


def check_liger(value: Any) -> Any:
    """Return True, False or "auto", else raise RequestError."""
    if not isinstance(value, bool) and value != "auto":
        raise RequestError(f"liger must be True, False or 'auto', got {value!r}.")
    return value


def check_norm(value: Any) -> Any:
    """Return "eval", "train" or "affine", else raise RequestError."""
    if value not in ("eval", "train", "affine"):
        raise RequestError(f"norm must be 'eval', 'train' or 'affine', got {value!r}.")
    return value


def check_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a user's regular expression, else raise RequestError."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RequestError(f"{pattern!r} is no regular expression: {error}.") from None


def _names(value: Any, where: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(name, str) and name for name in names):
        raise RequestError(f"{where} must be names, got {value!r}.")
    return names


def _normalise(values: dict[str, Any]) -> dict[str, Any]:
    if "rank" in values:
        check_rank(values["rank"])
    if values.get("alpha") is not None:
        check_alpha(values["alpha"])
    if "dropout" in values:
        dropout = values["dropout"]
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise RequestError(f"dropout must be in [0, 1), got {dropout!r}.")
    check_fused(values.get("fused", "auto"))
    check_liger(values.get("liger", False))
    check_norm(values.get("norm", "eval"))
    name = values.get("adapter_name", "default")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name.startswith("lora_"):
        raise RequestError(
            f"adapter_name must be letters, digits, '_' or '-' and not start with 'lora_', got {name!r}."
        )
    if values.get("layers") is not None:
        layers = values["layers"]
        layers = (layers,) if isinstance(layers, int) else tuple(layers)
        if not layers or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
            raise RequestError(f"layers must be block indices such as range(8, 16), got {values['layers']!r}.")
        values["layers"] = layers
    values["exclude"] = _names(values.get("exclude") or (), "exclude")
    if values.get("modules_to_save") is not None:
        values["modules_to_save"] = _names(values["modules_to_save"], "modules_to_save")
    targets = values.get("targets", "auto")
    if isinstance(targets, Mapping):
        _check_target_mapping(targets)
    elif isinstance(targets, str):
        if not targets:
            raise RequestError("targets must not be empty.")
    elif isinstance(targets, (Sequence, set, frozenset)):
        targets = sorted(targets) if isinstance(targets, (set, frozenset)) else targets
        values["targets"] = _names(targets, "targets")
        if not values["targets"]:
            raise RequestError("targets must not be empty.")
    else:
        raise RequestError(f"targets must be a role expression, names, a mapping or 're:...', got {targets!r}.")
    return values


def _check_target_mapping(targets: Mapping[str, Any]) -> None:
    if not targets:
        raise RequestError("targets must not be empty.")
    for key, value in targets.items():
        if isinstance(value, Mapping):
            if unknown := set(value) - {"rank", "alpha"}:
                raise RequestError(f"targets[{key!r}]: unknown {sorted(unknown)}; give rank and/or alpha.")
            if "rank" in value:
                check_rank(value["rank"], f"targets[{key!r}]['rank']")
            if value.get("alpha") is not None:
                check_alpha(value["alpha"], f"targets[{key!r}]['alpha']")
        else:
            check_rank(value, f"targets[{key!r}]")

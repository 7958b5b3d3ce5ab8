"""A saved PEFT LoRA folder, checked in steps before a model is touched.

1. `inspect_adapter(folder)`: config and safetensors header; says which modules are adapted, with which rank.
2. `check_supported(file)`: nothing in it that can't be restored here.
3. `check_tensors(file, expected)`: exactly the keys and shapes that the model and the config ask for.
4. `read_adapter(file)`: the values, finite and equal to the digest the save wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .adapter_config import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    AdapterConfigData,
    contains,
    parse_config,
    parse_json,
    read_bounded,
)
from .errors import CheckpointError, UnsupportedError
from .naming import saved_whole
from .staging import interrupted_config
from .tensor_file import FLOATING, Header, TensorInfo, read_header, read_tensors

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
#: Metadata entries this package writes; other writers' files have none of them.
DIGEST_ENTRY, MEANING_ENTRY, VERSION_ENTRY = "lora_adapters.digest", "lora_adapters.config", "lora_adapters.version"
#: The layers whose adapter acts wherever the module is registered, joined by commas.
HELD_TWICE_ENTRY = "lora_adapters.held_twice"
#: The layers adapted in parts, see `projection_parts`, and how BatchNorm's statistics were trained, see `batch_norm`.
PARTS_ENTRY, NORM_ENTRY = "lora_adapters.parts", "lora_adapters.norm"

_FACTORS = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b"}
_EXTRAS = {".lora_B.bias": "bias", ".lora_magnitude_vector": "magnitude", ".lora_velora_embed": "velora"}
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module as the header describes it.

    Attributes:
        kind: "linear", "conv1d", "conv2d", "conv3d", "embedding", or "parameter" (PEFT's target_parameters).
        rank: its rank.
        keys: "a", "b" and, where present, "bias" (lora_bias), "magnitude" (DoRA), "velora" -> key in the file.
        shapes: the same names -> shapes, as stored: linear a (rank, in), b (out, rank); conv a (rank, in, *kernel),
            b (out, rank / groups, 1, ...); embedding a (rank, rows), b (dim, rank).
    """

    kind: str
    rank: int
    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class AdapterFile:
    """What a folder holds; see `inspect_adapter`. Keys are as in the file, module names as in the base model.

    Attributes:
        folder: where it lies.
        config: the checked adapter_config.json.
        header: the checked safetensors header.
        modules: module name -> what adapts it.
        saved: keys of modules_to_save tensors.
        biases: keys of base biases that were trained (bias="all" or "lora_only").
        tokens: keys of trained token rows (trainable_token_indices).
        copies: keys that repeat the base weight of an adapted embedding or head -> module name. PEFT writes them; they must
            equal the model's own (`check_copies`) and are never loaded.
    """

    folder: Path
    config: AdapterConfigData
    header: Header
    modules: Mapping[str, AdaptedModule]
    saved: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The string entries of the weights file (base fingerprint, plugins' entries, ...). Untrusted."""
        return self.header.metadata

    @property
    def verifiable(self) -> bool:
        """True if the file has our digest: `read_adapter` then proves that its values are as they were saved."""
        return DIGEST_ENTRY in self.metadata

    def missing_targets(self, candidates: Collection[str]) -> list[str]:
        """Return those of `candidates` that the config says are adapted but the file has no tensors for.

        Args:
            candidates: names of all modules of the model that LoRA can adapt.
        """
        expected = self.config.expected_targets(candidates)
        return sorted(expected - set(self.modules)) if expected else []


def inspect_adapter(folder: str | Path) -> AdapterFile:
    """Check a folder's config and safetensors header and say what it adapts. No tensor is read.

    Raises:
        CheckpointError: files are missing, damaged, unsafe, of two saves, or hold keys that are not an adapter's.
        UnsupportedError: another PEFT method, or a variant only stock PEFT implements.
    """
    folder = Path(folder)
    _check_present(folder)
    staged = interrupted_config(folder)
    config_path = inside(staged.parent if staged else folder, CONFIG_NAME)
    config = parse_config(read_bounded(config_path, MAX_CONFIG_BYTES))
    header = read_header(inside(folder, WEIGHTS_NAME))
    if header.metadata.get(MEANING_ENTRY, config.meaning) != config.meaning:
        raise CheckpointError(
            f"{config_path} and {WEIGHTS_NAME} are not of one save: ranks, alphas or targets in the config are not "
            "those the weights were saved with. Copy both files from one save."
        )
    return _classify(folder, config, header)


def peft_type_of(folder: Path) -> str:
    """Return the method that a folder's adapter_config.json names, such as "LORA"; "" if none.

    Raises:
        CheckpointError: the config is missing or damaged.
    """
    raw = parse_json(read_bounded(inside(folder, CONFIG_NAME), MAX_CONFIG_BYTES), CONFIG_NAME)
    return found if isinstance(found := raw.get("peft_type"), str) else ""


def _check_present(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}.")
    if (folder / WEIGHTS_NAME).exists() or (folder / WEIGHTS_NAME).is_symlink():
        return
    if (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder} holds adapter_model.bin only. That is a pickle, which can run code when read, so it is not "
            "loaded. If you trust it, load it with PeftModel.from_pretrained and save_pretrained it as safetensors."
        )
    inner = sorted(path.parent.name for path in folder.glob(f"*/{WEIGHTS_NAME}"))[:10]
    hint = f" Its subfolders {', '.join(inner)} hold adapters: give one of those." if inner else ""
    raise CheckpointError(f"{folder} holds no {WEIGHTS_NAME}.{hint or ' Give the folder that a save wrote.'}")


def inside(folder: Path, name: str) -> Path:
    """Path of a file of the folder, refused when it is a link that leaves the folder (or the Hub cache's blobs)."""
    path = folder / name
    target, root = path.resolve(), folder.resolve()
    allowed = [root] + [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path} is a link out of its folder, to {target}. Copy the file itself into the folder.")
    return path


class _Sorter:
    """Sorts the keys of one header; every key must be of a kind the config allows."""

    def __init__(self, config: AdapterConfigData, keys: Collection[str]):
        self.config = config
        self.parts: dict[str, dict[str, str]] = {}
        self.saved: list[str] = []
        self.biases: list[str] = []
        self.tokens: list[str] = []
        self.copies: dict[str, str] = {}
        self.foreign: list[str] = []
        rest = [key for key in keys if not self._own(key)]
        for key in rest:
            self._other(key)

    def _own(self, key: str) -> bool:
        if saved_whole(self.config.get("modules_to_save", []), key.removeprefix(PREFIX).rpartition(".")[0]):
            return False
        for suffix, part in (_FACTORS | _EXTRAS).items():
            if key.startswith(PREFIX) and key.endswith(suffix):
                module = key[len(PREFIX) : -len(suffix)]
                allowed = {"bias": "lora_bias", "magnitude": "use_dora", "velora": "velora_config"}.get(part)
                if allowed and not self.config.get(allowed):
                    return False
                self.parts.setdefault(module, {})[part] = key
                return True
        return False

    def _other(self, key: str) -> None:
        name = key.removeprefix(PREFIX)
        module, _, leaf = name.rpartition(".")
        bias, owner = self.config.get("bias", "none"), module.removesuffix(".base_layer")
        if not key.startswith(PREFIX):
            self.foreign.append(key)
        elif saved_whole(self.config.get("modules_to_save", []), module):
            self.saved.append(key)
        elif leaf == "bias" and (bias == "all" or (bias == "lora_only" and owner in self.parts)):
            self.biases.append(key)
        elif name.endswith(_TOKENS) and self.config.get("trainable_token_indices") is not None:
            self.tokens.append(key)
        elif leaf == "weight" and owner != module and self._is_embedding(owner):
            self.copies[key] = owner
        else:
            self.foreign.append(key)

    def _is_embedding(self, module: str) -> bool:
        """True for adapted layers whose base weight PEFT saves as well: embeddings, and the head by its usual name."""
        factor = self.parts.get(module, {}).get("a", "")
        return ".lora_embedding_" in factor or (bool(factor) and module.rpartition(".")[2] == "lm_head")


def _classify(folder: Path, config: AdapterConfigData, header: Header) -> AdapterFile:
    found = _Sorter(config, header.tensors)
    if found.foreign:
        raise _foreign_error(found.foreign)
    if not (found.parts or found.saved or found.tokens):
        raise CheckpointError(f"{folder / WEIGHTS_NAME} holds no adapter tensors. Save the adapter again.")
    _check_floating(header, set(header.tensors) - set(found.saved))
    modules = {name: _module(config, name, parts, header.tensors) for name, parts in found.parts.items()}
    _check_ranks(config, modules)
    lists = [tuple(sorted(keys)) for keys in (found.saved, found.biases, found.tokens)]
    return AdapterFile(folder, config, header, modules, *lists, copies=found.copies)


def _foreign_error(keys: list[str]) -> CheckpointError:
    shown = ", ".join(key[:120] for key in sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    if not any(key.startswith(PREFIX) for key in keys):
        return CheckpointError(
            f"Tensor names must start with {PREFIX!r} as PEFT writes them; these don't: {shown}. If the file is of "
            "another format (kohya, diffusers), convert it first: lora-adapters convert FILE FOLDER --to peft."
        )
    return CheckpointError(
        f"The adapter file holds tensors that are not its own: {shown}. Loading them would overwrite base weights (or "
        "they are leftovers). If they belong to a newly trained module, list it in modules_to_save when training; "
        "otherwise get the adapter from its author again."
    )


def _check_floating(header: Header, keys: Collection[str]) -> None:
    bad = sorted(key for key in keys if header.tensors[key].dtype not in FLOATING)
    if bad:
        raise CheckpointError(
            f"{bad[0]} has dtype {header.tensors[bad[0]].dtype}; an adapter's tensors must be {', '.join(FLOATING)}"
            + (f" ({len(bad)} such tensors)." if len(bad) > 1 else ".")
            + " Save the adapter in one of these."
        )


def _module(
    config: AdapterConfigData, name: str, keys: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> AdaptedModule:
    shapes = {part: tensors[key].shape for part, key in keys.items()}
    if "a" not in keys or "b" not in keys:
        lacking = "lora_B" if "a" in keys else "lora_A"
        raise CheckpointError(f"The adapter file is incomplete: {name} has no {lacking}. Copy or download it again.")
    a, b = shapes["a"], shapes["b"]
    if "lora_embedding" in keys["a"] or "lora_embedding" in keys["b"]:
        kind = "embedding"
    elif contains([target.rpartition(".")[0] for target in config.get("target_parameters", [])], name):
        kind = "parameter"
    else:
        kind = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}.get(len(a), "")
    if len(a) != len(b) or not kind or 0 in a or 0 in b or a[0] % b[1] or (len(a) == 2 and a[0] != b[1]):
        raise CheckpointError(
            f"The shapes of {name} don't fit together: {keys['a']} {list(a)} and {keys['b']} {list(b)} must share "
            "their rank. Copy or download the file again."
        )
    return AdaptedModule(kind, a[0], dict(keys), shapes)


def _check_ranks(config: AdapterConfigData, modules: Mapping[str, AdaptedModule]) -> None:
    ranks = config.ranks(modules)
    for name, module in modules.items():
        if module.kind != "parameter" and module.rank != ranks[name]:
            raise CheckpointError(
                f"Rank mismatch: {module.keys['a']} has shape {list(module.shapes['a'])}, so rank {module.rank}, but "
                f"{CONFIG_NAME} says {ranks[name]} for {name}. Config and weights are of different adapters; copy both "
                "files from one save."
            )


def check_supported(file: AdapterFile) -> None:
    """Check that nothing in a file asks for what can't be restored here.

    Raises:
        UnsupportedError: it does; the message names it and says what to do with the file.
    """
    file.config.check_base_unchanged()
    parameters = [name for name, module in file.modules.items() if module.kind in ("parameter", "conv3d")]
    if file.tokens:
        what = "trained token rows (PEFT's trainable_token_indices)"
    elif parameters:
        what = f"an adapter on {parameters[0]!r} (PEFT's target_parameters, or Conv3d)"
    elif file.config.get("alora_invocation_tokens"):
        # Its tensors are those of plain LoRA, but it acts on the tokens after the invocation only.
        what = "an activated LoRA (PEFT's alora_invocation_tokens)"
    elif file.config.get("init_lora_weights") == "loftq":
        what = "an adapter for a base that LoftQ changed (PEFT's init_lora_weights)"
    else:
        return
    raise UnsupportedError(
        f"The file holds {what}, which is restored by stock PEFT only: PeftModel.from_pretrained(model, folder)."
    )


def check_tensors(file: AdapterFile, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a file's tensors with what the model and the config ask for, before any is read.

    Args:
        file: what `inspect_adapter` returned.
        expected: key as in the file -> shape, of every tensor the restored adapter will have (without `file.copies`).

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; the message names it.
    """
    present = file.header.tensors.keys() - file.copies.keys()
    if missing := sorted(expected.keys() - present):
        raise CheckpointError(
            f"The adapter file lacks {len(missing)} of {len(expected)} tensors, first {', '.join(missing[:3])}. It is "
            "incomplete or made for another model."
        )
    if unexpected := sorted(present - expected.keys()):
        raise CheckpointError(
            f"The adapter file holds {len(unexpected)} tensors this model has no place for, first "
            f"{', '.join(unexpected[:3])}. It was made for another model: load that one."
        )
    for key, shape in expected.items():
        found = file.header.tensors[key].shape
        if found != tuple(shape):
            raise CheckpointError(
                f"{key} has shape {list(found)} in the file, but this model needs {list(shape)}. The adapter was made "
                "for a model of another size: load that one."
            )


def read_adapter(file: AdapterFile) -> dict[str, torch.Tensor]:
    """Read the tensors into CPU memory, in the file's dtypes. The caller commits them.

    Returns:
        key as in the file -> tensor.

    Raises:
        CheckpointError: NaN or infinite values, or the values are not those that were saved (our digest differs).
    """
    tensors, digest = read_tensors(inside(file.folder, WEIGHTS_NAME), file.header)
    if file.verifiable and file.metadata[DIGEST_ENTRY] != digest:
        raise CheckpointError(
            f"{file.folder / WEIGHTS_NAME} is damaged: its values are not those that were saved (digest mismatch). "
            "Copy or download it again, or use an earlier checkpoint."
        )
    return tensors


def check_copies(file: AdapterFile, tensors: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Check that base weights repeated in the file are the model's own.

    Args:
        file: what `inspect_adapter` returned.
        tensors: what `read_adapter` returned.
        weights: module name -> its dense weight in the model, for every module in `file.copies.values()`.

    Raises:
        CheckpointError: one differs, so the adapter was trained on another base (or would overwrite this one).
    """
    import torch

    for key, module in file.copies.items():
        own = weights[module].detach().cpu()
        if tensors[key].shape != own.shape or not torch.equal(tensors[key].to(own.dtype), own):
            raise CheckpointError(
                f"{key} would overwrite the base weight of {module} with other values: the adapter was trained on "
                "another base, or its vocabulary was changed. Load that base (or resize this one) first."
            )

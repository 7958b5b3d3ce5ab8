"""The roles of a timm model's modules, from its structure and its pretrained_cfg."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from lora_adapters.hooks.specs import TargetMap
from lora_adapters.targets import GROUPS, Classification, ModelInfo, classify_by_patterns

from .attention import projection_of, projections
from .fused_qkv import parts_of
from .heads import classifiers, embeddings
from .probe import uses_of

#: Modules that scale channels or positions: squeeze-and-excitation and its like.
_GATE = re.compile(
    r"^(SE(Module|Block)?|Effective|Squeeze|Eca|Ceca|Cbam|GatherExcite|GlobalContext$|(Simple)?Coord|EfficientLocal|Strip|"
    r"(Light)?(Channel|Spatial)Attn|SpatialAttention|SelectiveKernelAttn|SplitAttn)"
)
_MLP_CLASS = re.compile(r"Mlp|MLP|FFN|FeedForward|Glu")
_NO_MLP_CLASS = re.compile(r"Head|RelPos|Mixer")
_MLP_NAME = re.compile(r"^(mlp\d*|mlp_\w+|\w+_mlp|ffn\d*|channel_mixer)$")
_MLP_PAIRS = (("fc1", "fc2"), ("pwconv1", "pwconv2"))

#: "conv" and "other" are in the default from this part of the weights outside embeddings and heads on.
DEFAULT_SHARE = 0.1


def classify(info: ModelInfo, maps: Iterable[TargetMap]) -> Classification:
    """Return the roles of a model's modules; a TargetMap(backend="timm") for the class comes before structure.

    - head: what get_classifier() gives; embedding: the first convolution and patch embeddings.
    - q, k, v, qkv, kv, o: the projections of modules that hold queries, keys and values. "qkv" is also said of layers
      that hold q and k alone, or a feed-forward part beside them: `parts` has their rows.
    - mlp: the linear layers and 1 x 1 convolutions of feed-forward modules.
    - conv: all other convolutions, unless they belong to a gate (squeeze-and-excitation) or make up a position bias: those
      are "other", like every linear layer that is none of the above (patch merging, reductions).

    The default is "attention" and "mlp", where the model has them, and each of "conv" and "other" that holds at least
    10 % of the weights outside embeddings and heads.
    """
    structure = _Structure(info)
    roles = {name: structure.role(name) for name in info.modules}
    named = classify_by_patterns(info, [m for m in maps if m.backend == info.backend])
    roles |= named.roles
    uses = uses_of(info)
    return Classification(
        roles=roles,
        never=dict(uses.uncalled) | dict(named.never),
        default=named.default if named.roles else default_targets(info, roles, uses.uncalled),
        notes=(*uses.notes, *_other_weights(info)),
        parts={name: parts for name in info.modules if (parts := structure.parts(name, roles[name]))},
        reads=uses.reads,
        bounded=True,
    )


class _Structure:
    """What a module's place in the model says about it."""

    def __init__(self, info: ModelInfo) -> None:
        self.modules = dict(info.model.named_modules())
        # PEFT trains whole whatever ends in a classifier's name: LowFormer's pre_classifier with its classifier.
        ends = classifiers(info.model)
        self.heads = tuple(name for name in self.modules if any(name.endswith(end) for end in ends))
        self.embeddings = embeddings(info.model, info.modules)
        self._projections: dict[str, dict[str, str]] = {}

    def role(self, name: str) -> str:
        base = self.base(name)
        if isinstance(base, nn.Embedding) or name in self.embeddings:
            return "embedding"
        if any(name == head or name.startswith(head + ".") for head in self.heads):
            return "head"
        owner = self.attention(name)
        plain = isinstance(base, nn.Linear) or (set(base.kernel_size) == {1} and base.groups == 1)
        if owner is not None:
            role = self.projections(owner).get(projection_of(name[len(owner) + 1 :].lstrip(".")))
            if role and plain:
                return role
            return "other" if plain else "conv"
        if self._in_gate(name):
            return "other" if plain else "conv"
        if plain and self._in_mlp(name):
            return "mlp"
        return "other" if isinstance(base, nn.Linear) else "conv"

    def parts(self, name: str, role: str) -> Mapping[str, tuple[tuple[int, int], ...]]:
        """Return the rows of q, k and v in a fused projection, {} for any other layer."""
        owner = self.attention(name) if role in ("qkv", "kv") else None
        return {} if owner is None else parts_of(self.modules[owner], self.base(name), name[len(owner) + 1 :])

    def base(self, name: str) -> nn.Module:
        module = self.modules[name]
        return getattr(module, "get_base_layer", lambda: module)()

    def owners(self, name: str) -> Iterator[str]:
        """Yield the names of the modules around a layer, the nearest first."""
        while "." in name:
            name = name.rpartition(".")[0]
            yield name

    def attention(self, name: str) -> str | None:
        """Return the nearest attention around a layer."""
        return next((owner for owner in self.owners(name) if self.projections(owner)), None)

    def projections(self, owner: str) -> dict[str, str]:
        if owner not in self._projections:
            self._projections[owner] = projections(self.modules[owner])
        return self._projections[owner]

    def _in_gate(self, name: str) -> bool:
        if name.rpartition(".")[2] == "conv" and type(self.modules[name.rpartition(".")[0]]).__name__ == "SplitAttn":
            return False  # the block's own convolution
        return any(_GATE.match(type(self.modules[owner]).__name__) for owner in list(self.owners(name))[:2])

    def _in_mlp(self, name: str) -> bool:
        for owner in self.owners(name):
            module = self.modules[owner]
            cls = type(module).__name__
            if _NO_MLP_CLASS.search(cls):
                return False
            if _MLP_CLASS.search(cls) or _MLP_NAME.match(owner.rpartition(".")[2]):
                return True
            if any(all(hasattr(module, part) for part in pair) for pair in _MLP_PAIRS):
                return name[len(owner) + 1 :].partition(".")[0] in sum(_MLP_PAIRS, ())
        return False


def default_targets(info: ModelInfo, roles: Mapping[str, str], never: Iterable[str] = ()) -> str:
    """Return what targets="auto" means: see `classify`. Only words that the model has are in it."""
    never = set(never)
    sizes: Counter[str] = Counter()
    for name, role in roles.items():
        if name not in never and role not in ("head", "embedding"):
            word = "attention" if role in GROUPS["attention"] else role
            sizes[word] += math.prod(_shape(info.modules[name]))
    if not sizes:
        return next((role for role in ("embedding", "head") if role in roles.values()), "conv")
    enough = DEFAULT_SHARE * sum(sizes.values())
    least = {"attention": 1, "mlp": 1, "conv": enough, "other": enough}
    return "+".join(word for word, size in least.items() if sizes[word] >= max(1, size))


def _shape(module: nn.Module) -> tuple[int, ...]:
    from lora_adapters.weights import store_for

    base = getattr(module, "get_base_layer", lambda: module)()
    store = store_for(base)
    return tuple(store.shape) if store is not None else tuple(base.weight.shape)


def _other_weights(info: ModelInfo) -> Iterator[str]:
    """Yield notes on weights that no adapter can reach."""
    counts = Counter(type(module).__name__ for module in info.model.modules() if isinstance(module, nn.RNNBase))
    counts += Counter(type(m).__name__ for m in info.model.modules() if type(m).__name__ == "CondConv2d")
    counts += Counter(type(m).__name__ for m in info.model.modules() if isinstance(m, (nn.ConvTranspose2d, nn.Conv3d)))
    for cls, count in counts.items():
        yield f"{count} {cls} modules can't carry an adapter: their weights stay as they are."

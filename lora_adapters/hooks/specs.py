"""What a plugin can say (small validated dataclasses) and the hooks it says it through.

Every hook receives keyword arguments only and imports its framework inside the function, so that listing plugins stays
instant. A whole plugin can be this small:

    from lora_adapters import hookimpl
    from lora_adapters.hooks.specs import TargetMap

    @hookimpl
    def lora_adapters_target_maps():
        return [TargetMap(backend="transformers", families=("my_model",), roles={"q": (r"\\.attn\\.wq$",)})]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PluginError
from . import hookspec

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..attach_plan import AttachPlan
    from ..request import AttachRequest
    from ..targets import ModelInfo

#: The roles a module can have. "qkv" is one projection that holds q, k and v; "kv" one that holds k and v;
#: "attention" in a request means all of the first six; "time" makes or reads a denoiser's embedding of its timestep, and
#: "other" is a projection of no better-known kind (both belong to "all-linear" only).
ROLES = ("q", "k", "v", "o", "qkv", "kv", "mlp", "conv", "time", "embedding", "head", "router", "other")

_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _check_target(owner: str, target: str) -> None:
    if not _TARGET.fullmatch(target):
        raise PluginError(f"{owner}: target {target!r} must look like 'package.module:Class'.")


@dataclass(frozen=True)
class BackendSpec:
    """Says which models a backend serves. Chosen by the module names in `type(model).__mro__`, nothing imported.

    Attributes:
        name: short unique name, such as "transformers".
        module_prefixes: top-level packages whose classes this backend knows, such as ("transformers",).
        target: "package.module:Class" of a `lora_adapters.targets.Backend`, imported on first use.
        requires: import names the backend needs; a missing one gives the plugin the status "needs X".
        extra: the extra of `lora-adapters` (or a distribution's name) that installs `requires`.
        priority: the higher one wins when several backends know a model.
    """

    name: str
    module_prefixes: tuple[str, ...]
    target: str
    requires: tuple[str, ...] = ()
    extra: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        if not self.name or not self.module_prefixes:
            raise PluginError(f"BackendSpec {self.name!r}: name and module_prefixes must not be empty.")
        _check_target(f"BackendSpec {self.name!r}", self.target)


@dataclass(frozen=True)
class TargetMap:
    r"""Which modules of a family of models play which role. Pure data.

    Attributes:
        backend: the backend this map belongs to.
        families: model types (transformers' `config.model_type`, a class name elsewhere); "*" is the fallback for all.
        roles: role -> regular expressions, searched in a module's dotted name (`re.search`). The first role with a
            match wins, in the order given. A family's own map is tried before the "*" map.
        default: the role expression that targets="auto" means for these families ("" leaves it to the "*" map).
        never: regular expressions of modules that must not be adapted -> the reason shown in the plan.
        exclusive: True if the "*" map must not be consulted for what this map leaves unmatched.
    """

    backend: str
    families: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    default: str = ""
    never: Mapping[str, str] = field(default_factory=dict)
    exclusive: bool = False

    def __post_init__(self) -> None:
        for role, patterns in self.roles.items():
            if role not in ROLES:
                raise PluginError(f"TargetMap {self.families}: unknown role {role!r}; roles are {', '.join(ROLES)}.")
            if isinstance(patterns, str):
                raise PluginError(f"TargetMap {self.families}: give the patterns of role {role!r} as a tuple.")
        for pattern in [p for ps in self.roles.values() for p in ps] + list(self.never):
            try:
                re.compile(pattern)
            except re.error as error:
                raise PluginError(f"TargetMap {self.families}: {pattern!r} is no regular expression: {error}") from None


@dataclass(frozen=True)
class QuantizerSpec:
    """A way to store base weights in fewer bits.

    Attributes:
        name: the word a user writes in `quantization=`, such as "nf4".
        bits: bits a value takes, statistics not counted.
        kinds: layer kinds it can store, out of "linear", "conv1d", "conv2d".
        target: "package.module:Class" of a `lora_adapters.weights.Quantizer`.
        requires: import names it needs.
        extra: the extra of `lora-adapters` (or a distribution's name) that installs `requires`.
    """

    name: str
    bits: int
    kinds: tuple[str, ...]
    target: str
    requires: tuple[str, ...] = ()
    extra: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise PluginError(f"QuantizerSpec {self.name!r}: bits must be 1 to 16, got {self.bits}.")
        if unknown := set(self.kinds) - {"linear", "conv1d", "conv2d"}:
            raise PluginError(f"QuantizerSpec {self.name!r}: unknown layer kinds {sorted(unknown)}.")
        _check_target(f"QuantizerSpec {self.name!r}", self.target)


@dataclass(frozen=True)
class LayerSpec:
    """Says which adapter layer serves a base module's class.

    Attributes:
        base: the base class as "package.module:Class", compared with every class in `type(module).__mro__`.
        layer: "package.module:Class" of a subclass of `peft.tuners.lora.LoraLayer` made by `lora_adapters.layers`.
        kind: "linear", "conv1d", "conv2d" or "embedding".
        priority: the higher one wins when several match.
    """

    base: str
    layer: str
    kind: str
    priority: int = 0

    def __post_init__(self) -> None:
        _check_target(f"LayerSpec {self.base!r}", self.base)
        _check_target(f"LayerSpec {self.base!r}", self.layer)


@dataclass(frozen=True)
class TrainerSpec:
    """A task that `lora-adapters train` can run.

    Attributes:
        task: the word a recipe writes in `task:`, such as "causal-lm".
        summary: one line for `lora-adapters recipes`.
        config: "package.module:Class" of a `lora_adapters.recipes.sections.Recipe`; importing it must stay cheap.
        target: "package.module:Class" of a `lora_adapters.runs.runner.Runner`, imported when a recipe is run.
        examples: "package:folder" of recipes (`TASK.yaml`, `TASK-more.yaml`) that `lora-adapters new` starts from.
        requires: import names it needs.
        extra: the extra of `lora-adapters` (or a distribution's name) that installs `requires`.
    """

    task: str
    summary: str
    config: str
    target: str
    examples: str = ""
    requires: tuple[str, ...] = ()
    extra: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.task):
            raise PluginError(f"TrainerSpec {self.task!r}: a task is lower-case words joined by '-'.")
        _check_target(f"TrainerSpec {self.task!r}", self.config)
        _check_target(f"TrainerSpec {self.task!r}", self.target)


@dataclass(frozen=True)
class FormatSpec:
    """A format that adapters of diffusion models are read from and written in.

    Attributes:
        name: the word a user writes in `convert(..., to=...)`.
        summary: one line.
        target: "package.module:Class" of a `lora_adapters.formats.Format`, imported on first use.
    """

    name: str
    summary: str
    target: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise PluginError(f"FormatSpec {self.name!r}: a name is lower-case words joined by '-'.")
        _check_target(f"FormatSpec {self.name!r}", self.target)


@dataclass(frozen=True)
class PlanEdit:
    """A change to a plan, asked for by a plugin and made by the core.

    Attributes:
        pattern: regular expression, searched in the names of planned layers.
        rank, alpha: new values, or None to leave them.
        skip: a reason; the layers are then left out and the plan shows the reason.
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None
    skip: str = ""


@hookspec
def lora_adapters_backends():
    """Return a list of BackendSpec.

    Example:
        @hookimpl
        def lora_adapters_backends():
            return [BackendSpec("mine", ("my_models",), "my_plugin.backend:MyBackend")]
    """


@hookspec
def lora_adapters_target_maps():
    """Return a list of TargetMap.

    Example:
        @hookimpl
        def lora_adapters_target_maps():
            return [TargetMap("transformers", ("my_model",), roles={"mlp": (r"\\.ffn\\.w[123]$",)})]
    """


@hookspec(firstresult=True)
def lora_adapters_resolve_targets(info: ModelInfo, request: AttachRequest) -> Mapping[str, str] | None:
    """Return {module name: role} for this model, or None to leave it to the target maps. The first answer wins.

    Example:
        @hookimpl
        def lora_adapters_resolve_targets(info, request):
            if info.family == "my_model":
                return {name: "mlp" for name in info.modules if name.endswith(".ffn")}
    """


@hookspec
def lora_adapters_quantizers():
    """Return a list of QuantizerSpec.

    Example:
        @hookimpl
        def lora_adapters_quantizers():
            return [QuantizerSpec("int3", 3, ("linear",), "my_plugin.int3:Int3")]
    """


@hookspec
def lora_adapters_layers():
    """Return a list of LayerSpec.

    Example:
        @hookimpl
        def lora_adapters_layers():
            return [LayerSpec("my_models.layers:FusedLinear", "my_plugin.layers:LoraFusedLinear", "linear")]
    """


@hookspec
def lora_adapters_trainers():
    """Return a list of TrainerSpec.

    Example:
        @hookimpl
        def lora_adapters_trainers():
            return [TrainerSpec("my-task", "What it does.", "my_plugin.recipe:MyRecipe", "my_plugin.runner:MyRunner")]
    """


@hookspec
def lora_adapters_formats():
    """Return a list of FormatSpec. They are tried before the built-in formats, whose names they can't take.

    Example:
        @hookimpl
        def lora_adapters_formats():
            return [FormatSpec("my-format", "What writes it.", "my_plugin.files:MyFormat")]
    """


@hookspec
def lora_adapters_edit_plan(plan: AttachPlan):
    """Return a list of PlanEdit. Two plugins that ask for different values of one layer are an error that names both.

    Example:
        @hookimpl
        def lora_adapters_edit_plan(plan):
            return [PlanEdit(r"layers\\.0\\.", skip="the first layer stays as it was pretrained")]
    """


@hookspec
def lora_adapters_attached(adapter: Adapter, plan: AttachPlan):
    """Called after an adapter was attached and verified.

    Example:
        @hookimpl
        def lora_adapters_attached(adapter, plan):
            print(f"{len(plan.layers)} layers adapted")
    """


@hookspec
def lora_adapters_saving(adapter: Adapter, path: str, metadata: dict[str, Any]):
    """Called before an adapter is written; entries put into `metadata` (str to str) go into the file's header.

    Example:
        @hookimpl
        def lora_adapters_saving(adapter, path, metadata):
            metadata["my_plugin.run"] = "42"
    """


@hookspec
def lora_adapters_merged(adapter: Adapter, unload: bool):
    """Called after an adapter was merged into its base.

    Example:
        @hookimpl
        def lora_adapters_merged(adapter, unload):
            print("merged")
    """

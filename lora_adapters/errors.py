"""Every error the package raises on purpose. Each message says what happened and what to do next."""


class LoraAdaptersError(Exception):
    """Base class: `except LoraAdaptersError` catches everything raised on purpose by this package."""


class RequestError(LoraAdaptersError, ValueError):
    """An argument is wrong, or two arguments contradict each other. Nothing has been changed."""


class NoTargetError(RequestError):
    """The request matches no layer of the model. The message names the nearest names the model does have."""


class UnsupportedError(LoraAdaptersError):
    """The request is well-formed but can't be done for this model, layer, device or package version."""


class MissingDependencyError(LoraAdaptersError, ImportError):
    """An optional package is missing. The message names the extra that installs it."""


class DoesNotFitError(LoraAdaptersError, MemoryError):
    """The work needs more memory than is free. The message lists settings that would fit."""


class CheckpointError(LoraAdaptersError, ValueError):
    """An adapter file or folder is damaged, unsafe, incomplete or made for another model. The model is unchanged."""


class VerificationError(LoraAdaptersError, RuntimeError):
    """After applying a plan the model is not as planned. The model has been rolled back."""


class StateError(LoraAdaptersError, RuntimeError):
    """The adapter is in the wrong state for the call (merged, detached, ...)."""


class PluginError(LoraAdaptersError):
    """A plugin is broken or returned something a hook does not allow."""


class PluginWarning(UserWarning):
    """A plugin failed and was set aside; the run goes on without it."""


class LoraAdaptersWarning(UserWarning):
    """Something worth knowing that does not stop the run (a fallback, a skipped layer)."""


class MergeError(LoraAdaptersError, ValueError):
    """An adapter can't be merged, or merging it would give broken weights. Nothing was merged."""


class HubError(LoraAdaptersError, OSError):
    """The Hub refuses something or can't be reached. The message says what to do."""

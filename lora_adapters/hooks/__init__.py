"""Hooks: how plugins teach the engine frameworks, models and quantizers."""

import pluggy

PROJECT = "lora_adapters"
#: Version of the hook interface. A plugin may state the version it was written for as `LORA_ADAPTERS_HOOK_API`.
HOOK_API = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

__all__ = ["HOOK_API", "PROJECT", "hookimpl", "hookspec"]

"""Faster kernels for the base model's own modules, where its backend has some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from .backends import backend_for
from .errors import MissingDependencyError, UnsupportedError

if TYPE_CHECKING:
    from torch import nn

    from .attach_plan import AttachPlan
    from .targets import Kernels


@contextmanager
def with_kernels(base: nn.Module, plan: AttachPlan) -> Iterator[tuple[AttachPlan, Kernels | None]]:
    """Put in the kernels that the plan's request asks for, and take them out again if what is done inside fails.

    Yields the plan, with notes on what was put in or why nothing was, and the kernels or None.

    Raises:
        UnsupportedError, MissingDependencyError: liger=True, and there are none for this model. It is unchanged.
    """
    wanted = plan.request.liger
    if wanted is False:
        yield plan, None
        return
    kernels = None
    try:
        backend = backend_for(base)[0]
        find = getattr(backend, "liger_kernels", None)
        if find is None:
            raise UnsupportedError(f"Liger has no kernels for models of the {backend.name} backend.")
        found: Kernels = find(base, plan)
        notes = found.apply()
        kernels = found
    except (UnsupportedError, MissingDependencyError) as error:
        if wanted is True:
            raise type(error)(f"liger=True can't be had: {error} (liger='auto' goes on without.)") from error
        notes = (f"no Liger kernels: {error}",)
    try:
        yield replace(plan, notes=(*plan.notes, *notes)), kernels
    except BaseException:
        if kernels is not None:
            kernels.revert()
        raise

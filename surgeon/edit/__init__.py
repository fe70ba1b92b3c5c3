"""Editing weights along a direction of the residual stream. The package can be called: `surgeon.api.edit`."""

from __future__ import annotations

from surgeon.callable_package import make_callable

make_callable(__name__)

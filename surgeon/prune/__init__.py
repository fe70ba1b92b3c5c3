"""Pruning: what is removed, and how the rest makes up for it. The package can be called: `surgeon.api.prune`."""

from __future__ import annotations

from surgeon.callable_package import make_callable

make_callable(__name__)

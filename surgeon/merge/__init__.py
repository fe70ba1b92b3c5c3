"""Merging checkpoints: from a request to a Plan. The package can be called: `surgeon.api.merge`."""

from __future__ import annotations

from surgeon.callable_package import make_callable

make_callable(__name__)

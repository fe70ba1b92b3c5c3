"""Checks of finished models. Can be called: `surgeon.api.verify`."""

from __future__ import annotations

from surgeon.callable_package import make_callable

make_callable(__name__)

"""Packages that share their name with a public function and can be called like it.

``surgeon.merge(...)`` is a function of `surgeon.api`, and importing anything from the package `surgeon.merge`
puts the package under the same name: so the package can be called, too (decision 0006).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from surgeon import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(package: str) -> None:
    """Let calls of ``package`` ("surgeon.merge") go to the function of its name in `surgeon.api`."""
    sys.modules[package].__class__ = _Package

"""Packages that share their name with a public function and can be called like it.

``surgeon.merge(...)`` is a function of `surgeon.api`, and importing anything from the package `surgeon.merge`
puts the package under the same name: so the package can be called, too (decision 0006). Help and signature are those
of the function.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_FUNCTIONS: dict[str, str] = {}
"""Package -> "module:function"."""


class _Package(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self.__name__)(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_function(self.__name__))

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return _function(self.__name__).__doc__


def _function(package: str) -> Callable[..., Any]:
    module, _, name = _FUNCTIONS[package].partition(":")
    return getattr(importlib.import_module(module), name)


def make_callable(package: str, function: str | None = None) -> None:
    """Let calls of a package go to a function.

    Args:
        package: such as "surgeon.merge".
        function: "module:function"; default the function of the package's name in `surgeon.api`.
    """
    _FUNCTIONS[package] = function or f"surgeon.api:{package.rpartition('.')[2]}"
    sys.modules[package].__class__ = _Package

"""Evaluation: accuracy and answer length, perplexity, divergence from a reference, gates.

``surgeon.evaluate(...)`` is a function of `surgeon.api`, and importing anything from this package puts
the package under the same name: so the package can be called, too.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from surgeon.api import evaluate

        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Package

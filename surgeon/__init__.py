"""surgeon: model surgery on LLM checkpoints.

Every command is a function of this package, with the same options: `surgeon.merge`, `surgeon.prune`, ... They are loaded
on first use, so that ``import surgeon`` stays light; ``__init__.pyi`` tells them to type checkers and editors.
"""

from __future__ import annotations

__version__ = "0.1.0"

_PUBLIC = {
    "merge": "surgeon.api",
    "inspect": "surgeon.api",
    "diff": "surgeon.api",
    "verify": "surgeon.api",
    "evaluate": "surgeon.api",
    "prune": "surgeon.api",
    "edit": "surgeon.api",
    "quantize": "surgeon.api",
    "measure": "surgeon.api",
    "export": "surgeon.api",
    "report": "surgeon.api",
    "doctor": "surgeon.api",
    "push": "surgeon.deploy.push",
    "run": "surgeon.pipeline.run",
    "methods": "surgeon.python.catalogue",
    "explain": "surgeon.python.catalogue",
    "clean": "surgeon.python.cleaning",
    "bars": "surgeon.cli.bars",
    "Progress": "surgeon.python.progress",
    "Result": "surgeon.python.results",
    "SurgeonError": "surgeon.errors",
}
_PACKAGES = {"recipe"}

__all__ = ["__version__", *sorted({*_PUBLIC, *_PACKAGES})]


def __getattr__(name: str):
    import importlib

    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"surgeon.{name}")
    raise AttributeError(f"module 'surgeon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

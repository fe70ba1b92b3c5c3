"""surgeon: model surgery on LLM checkpoints.

The public functions are loaded on first use, so that ``import surgeon`` stays light.
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
    "push": "surgeon.deploy.push",
    "run": "surgeon.pipeline.run",
    "SurgeonError": "surgeon.errors",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str):
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'surgeon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

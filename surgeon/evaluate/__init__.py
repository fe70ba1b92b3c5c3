"""Evaluation: accuracy, answer length, perplexity, divergence, gates. Can be called: `surgeon.api.evaluate`."""

from __future__ import annotations

from surgeon.callable_package import make_callable

make_callable(__name__)

"""Measured speed and memory: workloads, paired timing, latency tables. Can be called: `surgeon.api.measure`."""

from __future__ import annotations

from surgeon.callable_package import make_callable

make_callable(__name__)

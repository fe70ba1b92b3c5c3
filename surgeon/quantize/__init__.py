"""Quantization: from a request to a Plan of packed tensors. The package can be called: `surgeon.api.quantize`."""

from __future__ import annotations

from surgeon.callable_package import make_callable

make_callable(__name__)

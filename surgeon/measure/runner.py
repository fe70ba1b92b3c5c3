"""Runs a model's workload once and says how long it took.

A sample is one prefill (a forward over [batch, context] that fills a new cache, logits of the last
position only, as generation does it) and a few decode steps (one token for every sequence, with a cache
that grows), each timed on its own. Token ids are random and fixed, nothing is sampled.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import UsageError
from surgeon.measure.workload import Workload

_REPLACED = {"DynamicLayer", "DynamicSlidingWindowLayer"}
"""Cache layers that put new tensors in place of old ones and never write into them."""


class Runner:
    """One model under one workload; calling it returns the seconds of the workload.

    Attributes:
        prefills: seconds of every prefill.
        steps: seconds of one decode step, mean of the steps of each sample.
    """

    def __init__(self, model: Any, workload: Workload, clock: Callable[[], float], *, seed: int = 0) -> None:
        self.model = model.eval()
        self.workload = workload
        self.clock = clock
        self.prefills: list[float] = []
        self.steps: list[float] = []
        self.decoder = is_decoder(model)
        if not self.decoder and workload.mode != "prefill":
            raise UsageError("E280", f"an encoder generates nothing, so there is no {workload.mode} to time",
                             help="--mode prefill")  # fmt: skip
        first = next(model.parameters())
        rows = workload.batch
        columns = max(workload.context, workload.first_length + workload.steps)
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, vocabulary, (rows, columns), generator=generator).to(first.device)
        accepted = inspect.signature(model.forward).parameters
        self.extra: dict[str, Any] = {"use_cache": True} if self.decoder else {}
        if self.decoder and "logits_to_keep" in accepted:
            self.extra["logits_to_keep"] = 1
        self._filled: Any = None

    def __call__(self) -> float:
        prefill = step = 0.0
        if self.workload.mode != "decode":
            prefill = self.prefill()
            self.prefills.append(prefill)
        if self.workload.mode != "prefill":
            step = self.decode()
            self.steps.append(step)
        return self.workload.seconds(prefill, step)

    @torch.inference_mode()
    def prefill(self) -> float:
        """Return the seconds of one prefill."""
        ids = self.ids[:, : self.workload.context]
        began = self.clock()
        self.model(input_ids=ids, **self.extra)
        return self.clock() - began

    @torch.inference_mode()
    def decode(self) -> float:
        """Return the mean seconds of a decode step; the prefill before it is made once and not timed."""
        if self._filled is None:
            ids = self.ids[:, : self.workload.first_length]
            self._filled = self.model(input_ids=ids, **self.extra).past_key_values
        cache = _fresh(self._filled)
        start, count = self.workload.first_length, self.workload.steps
        tokens: list[Tensor] = [self.ids[:, start + i : start + i + 1].contiguous() for i in range(count)]
        began = self.clock()
        for token in tokens:
            cache = self.model(input_ids=token, past_key_values=cache, **self.extra).past_key_values
        return (self.clock() - began) / count


def is_decoder(model: Any) -> bool:
    """Say whether a model generates text."""
    config = model.config
    section = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(section, "model_type", "") == "bert" and not getattr(section, "is_decoder", False):
        return False
    return bool(getattr(model, "can_generate", lambda: False)())


def _fresh(cache: Any) -> Any:
    """Return a cache that grows on its own, with the contents of ``cache``; the tensors are shared where that is safe."""
    layers = getattr(cache, "layers", None)
    if layers is None or any(type(layer).__name__ not in _REPLACED for layer in layers):
        return copy.deepcopy(cache)
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) for layer in layers]
    return fresh

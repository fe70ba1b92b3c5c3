"""Showing a model's modules to an observer while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgeon.calibrate.batches import Batch
from surgeon.calibrate.pieces import Piece, is_experts
from surgeon.calibrate.settings import Observer


class Watching:
    """Hands the inputs and outputs of modules to an observer, without padding.

    An observer with ``around_layer(number, module, watching)``, a context, is asked for it at every layer; what
    else it may have is told in `surgeon.calibrate.settings.Observer`.

    Attributes:
        batch: the batch that is running; None keeps everything from the observer.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._tokens: Any = getattr(observer, "observe_tokens", None)
        self.batch: Batch | None = None
        self._real: Tensor | None = None
        self._original = False

    def wants(self, module: str) -> bool:
        return self._observer.wants(module)

    @property
    def repeats(self) -> bool:
        """Say whether layers may be observed more than once."""
        return hasattr(self._observer, "again")

    def again(self, layer: int) -> bool:
        """Say whether the observer wants to see a layer once more."""
        ask = getattr(self._observer, "again", None)
        return ask is not None and bool(ask(layer))

    def begin(self, batch: Batch, *, original: bool = False) -> None:
        """Start showing a batch, of the model without replacements if ``original``."""
        self._original = original
        self.batch = batch
        self._real = batch.mask().reshape(-1) if batch.padded else None

    def end(self) -> None:
        """Stop showing."""
        self.batch = None

    def show(self, module: str, inputs: Tensor, outputs: Tensor | None) -> None:
        """Hand one module's rows to the observer."""
        assert self.batch is not None
        rows = self.rows(inputs)
        if rows.shape[0]:
            if self._original:
                self._observer.observe_original(module, rows.detach())  # type: ignore[attr-defined]
                return
            if self._tokens is not None:
                samples = self._samples(inputs).to(rows.device)
                self._tokens(module, rows.detach(), None, samples)
                return
            shown = None if outputs is None else self.rows(outputs)
            self._observer.observe(
                module, rows.detach(), None if shown is None else shown.detach(), self.batch.sample
            )

    def rows(self, value: Tensor) -> Tensor:
        """Return the rows [tokens, features] that belong to tokens.

        ``value`` is [batch, tokens, ..., features], [batch * tokens, features], [batch * tokens * heads,
        features], heads before tokens [batch, heads, tokens, features], or one row per sample [batch,
        features]. Modules applied to each head see one row per token and head.
        """
        assert self.batch is not None
        width = value.shape[-1]
        if self._real is None:
            return value.reshape(-1, width)
        count, length = len(self.batch.samples), self.batch.length
        real = self._real.to(value.device)
        if value.ndim == 2 and value.shape[0] == count * length:
            return value[real]
        if value.ndim >= 3 and tuple(value.shape[:2]) == (count, length):
            return value.flatten(0, 1)[real].reshape(-1, width)
        if value.ndim == 4 and (value.shape[0], value.shape[2]) == (count, length):
            return value.transpose(1, 2).flatten(0, 1)[real].reshape(-1, width)
        if value.ndim == 2 and value.shape[0] == count:
            return value
        if value.ndim == 2 and value.shape[0] % (count * length) == 0:
            return value.reshape(count * length, -1, width)[real].reshape(-1, width)
        raise AssertionError(f"activations of shape {tuple(value.shape)} in a batch of {count} x {length}")

    def _samples(self, value: Tensor) -> Tensor:
        """Return the sample of each row of `rows`, int64."""
        assert self.batch is not None
        count, length = len(self.batch.samples), self.batch.length
        places = torch.tensor(self.batch.samples)
        if count == 1:
            return places.expand(self.rows(value[..., :1]).shape[0])
        if tuple(value.shape[:2]) == (count, length):
            spread = places[:, None].expand(count, length).reshape(count, length, *[1] * (value.ndim - 2))
            return self.rows(spread.expand(*value.shape[:-1], 1))[:, 0]
        assert value.ndim == 2 and value.shape[0] == count * length, tuple(value.shape)
        return self.rows(places.repeat_interleave(length)[:, None])[:, 0]

    def layer(self, number: int, root: nn.Module) -> AbstractContextManager[None]:
        """Let an observer that looks at more than single modules (``around_layer``) attach to a layer.

        Args:
            number: of the layer.
            root: its module, loaded.
        """
        around = getattr(self._observer, "around_layer", None)
        return nullcontext() if around is None else around(number, root, self)

    @contextmanager
    def attached(
        self, root: nn.Module, pieces: Mapping[str, Sequence[Piece]], when: Callable[[], bool] = lambda: True
    ) -> Iterator[None]:
        """Watch the wanted modules inside ``root``.

        Args:
            root: where to look.
            pieces: parameter name inside ``root`` -> its pieces.
            when: asked at each call; False keeps it from the observer.
        """
        handles: list[Any] = []
        watched: list[Any] = []
        try:
            for path, module in root.named_modules():
                if is_experts(module):
                    watch = self._experts(path, module, pieces, when)
                    if watch is not None:
                        module.surgeon_watch = watch  # type: ignore[assignment]
                        watched.append(module)
                    continue
                listed = pieces.get(f"{path}.weight" if path else "weight", ())
                if (
                    isinstance(module, (nn.Embedding, nn.Conv1d))  # no rows of features enter either
                    or len(listed) != 1
                    or not self._observer.wants(listed[0].module)
                ):
                    continue
                handles.append(
                    module.register_forward_hook(self._hook(listed[0].module, when), with_kwargs=True)
                )
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in watched:
                del module.surgeon_watch

    def _hook(self, name: str, when: Callable[[], bool]) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if self.batch is None or not when():
                return
            inputs = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(
                output, Tensor
            ):  # routers return scores and choices; what counts is the product
                precision = output[0].dtype if isinstance(output[0], Tensor) else inputs.dtype
                bias = getattr(module, "bias", None)
                output = functional.linear(
                    inputs.to(precision),
                    module.weight.to(precision),
                    None if bias is None else bias.to(precision),
                )
            self.show(name, inputs, output)

        return hook

    def _experts(
        self, path: str, module: Any, pieces: Mapping[str, Sequence[Piece]], when: Callable[[], bool]
    ) -> Any:
        """Return the function an expert module reports to, or None when no expert of it is wanted."""
        table: dict[tuple[int, str], list[tuple[str, Any]]] = {}
        for name, _ in module.named_parameters(recurse=False):
            for piece in pieces.get(f"{path}.{name}" if path else name, ()):
                if (
                    piece.name.endswith(".bias")
                    or piece.expert is None
                    or not self._observer.wants(piece.module)
                ):
                    continue
                columns = piece.index[-1] if len(piece.index) > 1 else slice(None)
                table.setdefault((piece.expert, name), []).append((piece.module, columns))
        if not table:
            return None

        def watch(
            expert: int, name: str, rows: Tensor, inputs: Tensor, outputs: Tensor, gates: Tensor | None
        ) -> None:
            wanted = table.get((expert, name))
            # Routing differs between the model with and without replacements, so rows have no counterparts there.
            if wanted is None or self.batch is None or self._original or not when():
                return
            if self._real is not None:
                keep = self._real.to(rows.device)[rows]
                rows, inputs, outputs = rows[keep], inputs[keep], outputs[keep]
                gates = None if gates is None else gates[keep]
            if inputs.shape[0]:
                if self._tokens is not None:
                    samples = torch.tensor(self.batch.samples, device=rows.device)[rows // self.batch.length]
                    shown = None if gates is None else gates.detach()
                    for module_name, _ in wanted:
                        self._tokens(module_name, inputs.detach(), shown, samples)
                    return
                for module_name, columns in wanted:
                    self._observer.observe(
                        module_name, inputs.detach(), outputs[:, columns].detach(), self.batch.sample
                    )

        return watch


def finite(value: Tensor) -> bool:
    """Say whether all values are numbers."""
    return bool(torch.isfinite(value).all())

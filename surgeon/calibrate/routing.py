"""What a pass shows of routing: choices, weights, sizes of the experts' outputs, and the stream around them.

    route(checkpoint, samples, settings, observer, experts=experts_of(checkpoint))

One `surgeon.calibrate.walk.Walk`; the observer gets a `Routed` for every layer of experts and batch, without
padding. Nothing is recomputed from a router: choices and weights are those the layer multiplied with, after
renormalisation, correction biases, groups and scales, so they are right for every kind of router. Of an
expert's outputs only norms, peaks and (when asked for) sums are kept, so memory does not grow with the number
of experts, and layers whose experts are read one at a time show the same.

The stream: h enters the sublayer, before its norm, and ``rho * r`` is what the routed experts add to it, shared
experts excluded. Where that is, the family's record says (`surgeon.architectures.expert_records.record.Taps`); the
running layer is held against it, so a record that does not fit is refused. Three kinds of families differ:

- Granite scales the branch: rho is its residual_multiplier.
- MiniMax adds ``alpha * h + beta * r`` where h is behind the norm: only rho = beta / alpha decides about direction.
- a norm behind the block (AFMoE, FlexOlmo) mixes routed and shared experts: the update is the block's whole
  normalised contribution, and ``separable`` is False.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.architectures.expert_records.record import Taps
from surgeon.calibrate.pieces import is_experts
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.calibrate.watching import Watching
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError
from surgeon.structure.experts.parts import Experts

__all__ = ["Routed", "RoutingObserver", "Together", "route"]


@dataclass(frozen=True)
class Routed:
    """One batch in one layer of experts: T tokens, K slots, E experts, d hidden; padding removed.

    Attributes:
        layer: number of the layer in the checkpoint.
        samples: int64 [T], numbers of the samples.
        positions: int64 [T], within the sample.
        index: int64 [T, K], the chosen experts; E marks a slot that was not routed, its weight is 0.
        weights: float32 [T, K], exactly those the layer multiplies with.
        norms: float32 [T, K], L2 norm of each chosen expert's output before its weight, as wide as experts write
            (Nemotron-H may project their sum up to the stream afterwards).
        peaks: float32 [T, K], largest magnitude in that output.
        residual: [T, d], h: the stream that enters the sublayer, before its norm.
        update: [T, d], rho times the weighted sum of routed experts; see ``separable``.
        logits: float32 [T, E], the router's, None where the observer does not want them.
        separable: False where a norm follows the block: ``update`` is then its whole normalised contribution.
        on_input: True where the weight multiplies the expert's input (Llama-4): outputs, and so ``norms``,
            contain it already.
    """

    layer: int
    samples: Tensor
    positions: Tensor
    index: Tensor
    weights: Tensor
    norms: Tensor
    peaks: Tensor
    residual: Tensor
    update: Tensor
    logits: Tensor | None = None
    separable: bool = True
    on_input: bool = False

    @property
    def contributions(self) -> Tensor:
        """float32 [T, K]: the norm of what each chosen expert adds to the sum, g * ||f||."""
        return self.norms if self.on_input else self.weights * self.norms


class RoutingObserver(Protocol):
    """What looks at routing.

    It may also have ``state() -> dict[str, np.ndarray]`` and ``restore(state)``, as observers of a walk, and
    ``expert_sums(layer, sums)``, called once a layer with float64 [E, d], the sum over its tokens of each
    expert's outputs before their weights, when ``wants_sums``.

    Attributes:
        identity: separates observers whose states must not be mixed.
        wants_logits: hand over the router's logits.
        wants_sums: add up each expert's outputs.
    """

    identity: str
    wants_logits: bool
    wants_sums: bool

    def routed(self, batch: Routed) -> None:
        """Look at one batch in one layer; its tensors may be overwritten afterwards, so what is kept is copied."""
        ...

    def expert_sums(self, layer: int, sums: Tensor) -> None:
        """Look at a layer's sums of outputs, after its last batch; only when ``wants_sums``."""
        ...


class Together:
    """Several observers in one pass."""

    def __init__(self, *observers: RoutingObserver) -> None:
        self._observers = observers
        self.identity = " ".join(map(_identity, observers))
        self.wants_logits = any(observer.wants_logits for observer in observers)
        self.wants_sums = any(observer.wants_sums for observer in observers)

    def routed(self, batch: Routed) -> None:
        for observer in self._observers:
            observer.routed(batch)

    def expert_sums(self, layer: int, sums: Tensor) -> None:
        for observer in self._observers:
            if observer.wants_sums:
                observer.expert_sums(layer, sums)

    def state(self) -> dict[str, np.ndarray]:
        return {
            f"{number}:{name}": value
            for number, observer in enumerate(self._observers)
            for name, value in observer.state().items()  # type: ignore[attr-defined]
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> bool:
        """Give every observer its state back; False when one of them cannot take it up."""
        done = [
            observer.restore(  # type: ignore[attr-defined]
                {n.partition(":")[2]: v for n, v in state.items() if n.partition(":")[0] == str(number)}
            )
            for number, observer in enumerate(self._observers)
        ]
        return False not in done


def route(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    observer: RoutingObserver,
    *,
    experts: Experts,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
    resume: bool = False,
) -> int:
    """Run a model over samples and show an observer how tokens are routed; return the model's number of layers.

    Args:
        checkpoint: the model, any view of one.
        samples: token ids, one array a sample.
        settings: device, precision, memory, spill folder.
        observer: sees every running layer of experts.
        experts: where the experts of this model are.
        progress, stop, resume: as `surgeon.calibrate.walk.Walk.run`.

    Raises:
        InputError: E430 something is not finite, with layer, sample and token; E406 a layer of experts whose
            stream cannot be followed; whatever a walk raises.
    """
    with Walk(checkpoint, samples, settings) as walk:
        config: Any = walk.skeleton.model.config
        showing = _Showing(observer, experts, config.get_text_config())
        walk.run(showing, progress=progress, stop=stop, resume=resume)
        return walk.layers


def _identity(observer: RoutingObserver) -> str:
    kind = type(observer)
    return f"{kind.__module__}.{kind.__qualname__}({observer.identity})"


class _Showing:
    """The observer of a walk behind a `RoutingObserver`."""

    def __init__(self, observer: RoutingObserver, experts: Experts, config: Any) -> None:
        self._observer = observer
        self._counts = {layer.index: layer.count for layer in experts.running}
        self._taps = experts.record.taps
        self._on_input = experts.record.router.gate_on == "input"
        self._factor = _scale(config, self._taps.branch_scale) / _scale(config, self._taps.stream_scale)
        routers = {
            tensor.name.removesuffix(".weight") for layer in experts.running for tensor in layer.of("router")
        }
        self._routers = routers if observer.wants_logits else set()
        self._logits: Tensor | None = None
        self.identity = f"{_identity(observer)} logits={observer.wants_logits} sums={observer.wants_sums}"
        if hasattr(observer, "state"):
            self.state = observer.state  # type: ignore[attr-defined]
            self.restore = observer.restore  # type: ignore[attr-defined]

    def wants(self, module: str) -> bool:
        return module in self._routers

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        assert outputs is not None
        self._logits = outputs.float()

    @contextmanager
    def around_layer(self, number: int, root: nn.Module, watching: Watching) -> Iterator[None]:
        """Look at a layer while it runs, if it has experts."""
        if number not in self._counts:
            yield
            return
        wants_sums = self._observer.wants_sums
        tap = _Tap(number, root, watching, self._counts[number], self._taps, self._factor, wants_sums)
        with tap.attached(self._show):
            yield
        if not tap.shown:
            raise _untapped(number, "its experts did not run")
        if tap.sums is not None:
            self._observer.expert_sums(number, tap.sums)

    def _show(self, batch: Routed) -> None:
        logits, self._logits = self._logits, None
        if self._routers and (logits is None or len(logits) != len(batch.index)):
            raise _untapped(batch.layer, "its router does not show its logits")
        self._observer.routed(replace(batch, logits=logits, on_input=self._on_input))


def _scale(config: Any, key: str | None) -> float:
    return 1.0 if key is None else float(getattr(config, key))


class _Tap:
    """Follows one layer of experts while batches run through it."""

    def __init__(
        self,
        number: int,
        root: nn.Module,
        watching: Watching,
        count: int,
        taps: Taps,
        factor: float,
        sums: bool,
    ) -> None:
        self._number = number
        self._root = root
        self._watching = watching
        self._count = count
        self._taps = taps
        self._factor = factor
        self._wants_sums = sums
        self.sums: Tensor | None = None
        self.shown = False
        path, self._module = _expert_module(number, root)
        self._block = self._inside(taps.block)
        self._norm = self._inside(taps.norm) if taps.norm else None
        if path.rpartition(".")[0] != taps.block:
            raise _untapped(number, f"its experts are {path}, not inside {taps.block}")
        self._sizes: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._forget()

    def _inside(self, path: str) -> Any:
        try:
            return self._root.get_submodule(path)
        except AttributeError:
            raise _untapped(self._number, f"it has no module {path}") from None

    def _forget(self) -> None:
        self._through: tuple[Tensor, Tensor] | None = None  # the norm's input and output
        self._entering: Tensor | None = None
        self._left: Tensor | None = None
        self._normed: Tensor | None = None
        self._chosen: tuple[Tensor, Tensor, Tensor] | None = None

    @contextmanager
    def attached(self, show: Callable[[Routed], None]) -> Iterator[None]:
        """Follow the layer; ``show`` gets every batch."""
        handles = [
            self._block.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._block.register_forward_hook(self._leave, with_kwargs=True),
            self._root.register_forward_hook(lambda module, args, out: self._done(show)),
        ]
        if self._norm is not None:
            handles.append(self._norm.register_forward_hook(self._norm_ran, with_kwargs=True))
        for module in self._root.children():
            if module is not self._block:
                handles.append(module.register_forward_hook(self._behind_block, with_kwargs=True))
        for module in self._block.children():
            if module is not self._module:
                handles.append(module.register_forward_hook(self._behind_experts, with_kwargs=True))
        self._module.surgeon_routing = self
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            del self._module.surgeon_routing
            self._sizes.clear()
            self._forget()

    # ---- the experts' own reports --------------------------------------------------------------

    def output(self, expert: int, rows: Tensor, slots: Tensor, out: Tensor, top_k_index: Tensor) -> None:
        """Note the sizes of one expert's outputs [rows, hidden], before their weights."""
        batch = self._watching.batch
        if batch is None:
            return
        if batch.samples not in self._sizes:
            self._sizes[batch.samples] = _no_sizes(top_k_index)
        norms, peaks = self._sizes[batch.samples]
        # In 16 bits a square overflows and a sum of squares has three digits.
        norms[rows, slots] = torch.linalg.vector_norm(out.float(), dim=-1)
        peaks[rows, slots] = out.abs().amax(-1).float()
        if self._wants_sums:
            if self.sums is None:
                self.sums = torch.zeros(self._count, out.shape[-1], dtype=torch.float64)
            if batch.padded:
                out = out[batch.mask().reshape(-1).to(rows.device)[rows]]
            self.sums[expert] += out.sum(0, dtype=torch.float64).cpu()

    def chosen(self, top_k_index: Tensor, top_k_weights: Tensor, total: Tensor) -> None:
        """Note choices and weights [tokens, k] and the weighted sum [tokens, hidden]."""
        if self._watching.batch is not None:
            self._chosen = top_k_index, top_k_weights, total

    # ---- what surrounds them -------------------------------------------------------------------

    def _norm_ran(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = _first(args, kwargs)
        if self._watching.batch is not None and given is not None and self._entering is None:
            self._through = given, output

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._watching.batch is None:
            return
        self._entering = _first(args, kwargs)
        if self._entering is None:
            raise _untapped(self._number, f"{self._taps.block} is given no hidden states")
        if self._norm is not None and (self._through is None or not _same(self._through[1], self._entering)):
            raise _untapped(self._number, f"{self._taps.block} is not given what {self._taps.norm} returns")

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._watching.batch is not None:
            self._left = output[0] if isinstance(output, tuple) else output

    def _behind_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Note what a norm makes of the block's output."""
        given = _first(args, kwargs)
        if self._left is None or given is None or not _same(given, self._left):
            return
        if not self._taps.normalised:
            raise _untapped(
                self._number, f"what {self._taps.block} returns does not go straight to the stream"
            )
        self._normed = output

    def _behind_experts(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Follow the sum of experts through what is applied to it inside the block (a latent projection)."""
        given = _first(args, kwargs)
        if self._chosen is not None and given is not None and _same(given, self._chosen[2]):
            self._chosen = *self._chosen[:2], output

    # ---- one batch -----------------------------------------------------------------------------

    def _done(self, show: Callable[[Routed], None]) -> None:
        batch = self._watching.batch
        if batch is None:
            return
        if self._chosen is None or self._entering is None:
            raise _untapped(self._number, "its experts did not run")
        index, weights, total = self._chosen
        stream = self._entering
        if self._through is not None and self._taps.stream == "input":
            stream = self._through[0]
        if self._taps.normalised and self._normed is None:
            raise _untapped(self._number, f"no norm follows {self._taps.block}")
        update = total * self._factor if self._normed is None else self._normed
        if update.shape[-1] != stream.shape[-1]:
            raise _untapped(self._number, "the sum of its experts is not as wide as the stream")
        norms, peaks = self._sizes.pop(batch.samples, None) or _no_sizes(index)
        rows = self._watching.rows
        empty = index >= self._count
        places = torch.arange(len(batch.samples) * batch.length)[batch.mask().reshape(-1)]
        found = Routed(
            layer=self._number,
            samples=torch.tensor(batch.samples)[places // batch.length],
            positions=places % batch.length,
            index=rows(index.masked_fill(empty, self._count)),
            weights=rows(weights.float().masked_fill(empty, 0.0)),
            norms=rows(norms),
            peaks=rows(peaks),
            residual=rows(stream),
            update=rows(update),
            separable=self._normed is None,
        )
        self._forget()
        _check_finite(found)
        self.shown = True
        show(found)


def _no_sizes(index: Tensor) -> tuple[Tensor, Tensor]:
    """Return norms and peaks [tokens, k] of a batch nothing is known of yet."""
    return tuple(torch.zeros(index.shape, dtype=torch.float32, device=index.device) for _ in range(2))  # type: ignore[return-value]


def _expert_module(number: int, root: nn.Module) -> tuple[str, Any]:
    found = [(path, module) for path, module in root.named_modules() if is_experts(module)]
    if len(found) != 1:
        raise _untapped(number, f"it has {len(found)} sets of experts, not one")
    return found[0]


def _first(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor a module was called with."""
    given = args[0] if args else next(iter(kwargs.values()), None)
    return given if isinstance(given, Tensor) else None


def _same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are the same values in memory, whatever their shape."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _check_finite(batch: Routed) -> None:
    named = {
        "the residual stream": batch.residual,
        "a routing weight": batch.weights,
        "an expert's output": batch.norms,
        "the sum of the experts": batch.update,
    }
    for what, value in named.items():
        good = torch.isfinite(value).all(-1)
        if bool(good.all()):
            continue
        row = int((~good).nonzero()[0, 0])
        raise InputError(
            "E430", f"{what} is not finite in layer {batch.layer}, sample {int(batch.samples[row])}, "
            f"token {int(batch.positions[row])}",
            help="the model overflows in this precision, or its weights are damaged: try float32, and surgeon verify",
        )  # fmt: skip


def _untapped(layer: int, why: str) -> InputError:
    return InputError("E406", f"routing of layer {layer} cannot be followed: {why}",
                      help="this kind of model is not supported for methods that look at routing")  # fmt: skip

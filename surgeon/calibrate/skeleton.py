"""A transformers model without its weights, filled one layer at a time from a checkpoint.

The library's own model is built on the meta device: all modules, no data. Its forward runs as it
is, with the layers' own ``forward`` replaced, so embeddings, scalings, masks, rotary tables and
final norms are the library's and never rewritten here.

    skeleton = Skeleton(checkpoint, settings)

    # 1. the input of layer 0 and what every layer is called with beside its hidden states
    recording = skeleton.record(ids)                   # ids [batch, tokens]; .hidden, .calls[layer]

    # 2. one layer: weights in, compute, weights out
    with skeleton.loaded(layer) as module:             # an nn.Module with real parameters
        hidden = skeleton.call(layer, hidden, recording.calls[layer])

    # 3. everything after the last layer
    final = skeleton.finish(ids, hidden)               # the base model's last hidden state

Nothing here switches gradients off: under ``torch.enable_grad`` a layer is recomputed from its
stored input, `record` and `finish` are differentiable too. Parameters are loaded with
``requires_grad=False``; switch it on with ``module.requires_grad_(True)`` inside the context.

Mapping parameters back to the checkpoint: ``skeleton.pieces(layer)`` gives, for each name in
``module.named_parameters()`` (and stored buffers), a list of `Piece`. ``parameter[piece.index]``,
and so ``parameter.grad[piece.index]``, is the piece in the order it is stored; ``piece.name`` is the
checkpoint's name, per expert for stacked experts whatever the storage; ``piece.tensor`` and
``piece.stored`` say where it lies in the files. ``skeleton.outer_pieces()`` does the same for what lies
outside the layers (``skeleton.outer()`` yields those parameters); the embedding holds only the rows
of the tokens at hand: ``skeleton.embedding_rows`` are their token ids, in the order of its rows.

Attention and numerics: the library's default attention for the family is kept (sdpa where it
exists, else eager), so results equal the stock model's. Buffers that are not stored are computed by
the model's own initialisation; one that it leaves undefined is refused (see `buffers`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon import architectures
from surgeon.calibrate import experts
from surgeon.calibrate.buffers import compute_buffers
from surgeon.calibrate.pieces import Piece, is_experts, load_expert, load_parameter, read_tensor, resolve
from surgeon.calibrate.placement import Placement
from surgeon.calibrate.settings import Observer, Settings
from surgeon.calibrate.stock_model import base_of, build, kept_in_float32
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where

__all__ = ["Call", "Observer", "Piece", "Recording", "Settings", "Skeleton"]

GAP = 64
"""Rows of the embedding read without being asked for, when that joins two reads."""


@dataclass(frozen=True)
class Call:
    """What a layer is called with after its hidden states; tensors lie on the layer's device."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """The input of layer 0 [batch, tokens, hidden] and the call of every layer."""

    hidden: Tensor
    calls: tuple[Call, ...]


class Skeleton:
    """The stock model of a checkpoint, without data.

    Attributes:
        model: the transformers model with its head, on the meta device except what is loaded.
        base: the part without head.
        base_prefix: what the names of its parameters begin with in ``model``, such as "model.".
        stack: path of the layers in ``model``, such as "model.layers".
        layers: how many there are.
        causal: whether a token sees only earlier ones.
        dtype: precision of weights and activations.
        placement: which device computes which layer.
        phase: while the base model runs: "before", "inside" or "after" the layers; else empty.
        embedding_module: path of the token embedding in ``model``.
        head_module: path of the output embedding in ``model``, None without one.
        embedding_rows: token ids of the embedding rows loaded by the last `record`, sorted.

    Raises (constructor):
        InputError: E380 a type of model that cannot be run here, E381 quantized, E382 weights and
            configuration do not fit.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.checkpoint = checkpoint
        self.settings = settings
        self.dtype = settings.torch_dtype
        self.model = build(checkpoint, self.dtype)
        record = architectures.get(self.model.config.model_type)
        assert record is not None  # build refuses others
        self.base, self.base_prefix = base_of(self.model, record.stack)
        self.stack = self.base_prefix + record.stack
        self._layers: list[nn.Module] = list(self.model.get_submodule(self.stack))
        self.layers = len(self._layers)
        self.causal = self.model.config.model_type != "bert" or bool(self.model.config.is_decoder)
        self._pieces = resolve(self.model, checkpoint)
        self._fp32 = kept_in_float32(self.model, self.dtype)
        self.placement = Placement.of(settings.device, self.layers)
        self.embedding_rows: Tensor = torch.empty(0, dtype=torch.int64)
        self.embedding_module = self._path_of(self.model.get_input_embeddings())
        head = self.model.get_output_embeddings()
        self.head_module: str | None = None if head is None else self._path_of(head)
        self._outer_loaded = False
        self.phase = ""
        self._rotary: list[Any] = [
            m for m in self.model.modules() if hasattr(m, "rope_type") and hasattr(m, "inv_freq")
        ]
        self._check_complete()
        experts.install(self.model)

    # ---- names ---------------------------------------------------------------------------------

    def _path_of(self, wanted: nn.Module) -> str:
        return next(path for path, module in self.model.named_modules() if module is wanted)

    def layer_path(self, layer: int) -> str:
        return f"{self.stack}.{layer}"

    def pieces(self, layer: int) -> dict[str, list[Piece]]:
        """Return the pieces of a layer's parameters and stored buffers, by the name inside the layer."""
        start = self.layer_path(layer) + "."
        return {
            name.removeprefix(start): pieces
            for name, pieces in self._pieces.items()
            if name.startswith(start)
        }

    def outer_pieces(self) -> dict[str, list[Piece]]:
        """Return the pieces of everything outside the layers and the head, by full name in ``model``."""
        return {name: self._pieces[name] for name in self._outer_names() if name in self._pieces}

    def head_pieces(self) -> dict[str, list[Piece]]:
        """Return the pieces of the output embedding ("weight", "bias"); of the embedding when tied."""
        if self.head_module is None:
            return {}
        start = self.head_module + "."
        return {
            name.removeprefix(start): pieces
            for name, pieces in self._pieces.items()
            if name.startswith(start)
        }

    def _outer_names(self) -> list[str]:
        inside = self.stack + "."
        head = None if self.head_module is None else self.head_module + "."
        return [
            name
            for name in self.model.state_dict()
            if not name.startswith(inside) and not (head and name.startswith(head))
        ]

    def _check_complete(self) -> None:
        needed = [name for name, _ in self.base.named_parameters()]
        prefix = self.base_prefix
        missing = [prefix + name for name in needed if prefix + name not in self._pieces]
        missing = [name for name in missing if not name.startswith(f"{prefix}pooler.")]
        if missing:
            raise InputError(
                "E382", f"{self.checkpoint.label} has no weights for {printable(missing[0])}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                where=Where(tensor=printable(missing[0])),
                help="quantized models must be dequantized first; otherwise the checkpoint is incomplete",
            )  # fmt: skip

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.hidden_size)

    @property
    def widest(self) -> int:
        """The widest activation of a layer, in numbers per token."""
        return max(max(p.shape[-2:]) for layer in self._layers for p in layer.parameters() if p.ndim >= 2)

    @property
    def most_tokens(self) -> int | None:
        """The longest sample a model with learned positions takes, None for others."""
        for name, parameter in self.base.named_parameters():
            if name in ("wpe.weight", "embeddings.position_embeddings.weight"):
                return int(parameter.shape[0])
        return None

    def bytes_outside(self) -> int:
        """Return the bytes of what stays loaded outside the layers, the embedding left out."""
        state = self.model.state_dict()
        size = torch.empty(0, dtype=self.dtype).element_size()
        skip = f"{self.embedding_module}.weight"
        return sum(state[name].numel() * size for name in self._outer_names() if name != skip)

    # ---- loading -------------------------------------------------------------------------------

    def bytes_of_layer(self, layer: int, *, experts_too: bool = True) -> int:
        """Return the bytes of a layer's parameters in the compute precision."""
        module = self._layers[layer]
        streamed = set() if experts_too else {name for name, _ in experts.stacked_parameters(module)}
        size = torch.empty(0, dtype=self.dtype).element_size()
        return sum(p.numel() * size for name, p in module.named_parameters() if name not in streamed)

    def read_layer(self, layer: int, *, experts_too: bool = True) -> dict[str, Tensor]:
        """Read a layer's tensors to its device; safe in a background thread.

        With ``experts_too=False`` the stacked parameters of experts are left out (see `experts`).
        """
        module = self._layers[layer]
        skip = set() if experts_too else {name for name, _ in experts.stacked_parameters(module)}
        pieces = self.pieces(layer)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        device = self.placement.of_layer(layer)
        return {
            name: self._read(f"{self.layer_path(layer)}.{name}", listed, state[name], device)
            for name, listed in pieces.items()
            if name not in skip and name in state
        }

    def _read(self, full: str, pieces: list[Piece], like: Tensor, device: torch.device) -> Tensor:
        dtype = torch.float32 if self._fp32 is not None and self._fp32.search(full) else like.dtype
        value = load_parameter(self.checkpoint, pieces, tuple(like.shape), dtype)
        return self.placement.send(value, device)

    def fill(self, layer: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Put tensors from `read_layer` into a layer, compute its other buffers, and return it."""
        module = self._layers[layer]
        _put(module, tensors)
        compute_buffers(self.model, module, self.placement.of_layer(layer))
        return module

    def replace(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Put new values into a loaded layer.

        Args:
            tensors: checkpoint names -> values of the stored shape; other tensors stay as they are.
        """
        parameters = dict(self._layers[layer].named_parameters())
        for name, pieces in self.pieces(layer).items():
            if name not in parameters or parameters[name].is_meta:  # a buffer; experts read one at a time
                continue
            target = parameters[name].data
            for piece in pieces:
                value = tensors.get(piece.tensor)
                if value is None:
                    continue
                place = target[piece.index] if piece.index else target
                place.copy_(value[piece.stored] if piece.stored else value)

    def empty(self, layer: int) -> None:
        """Take a layer's data away again."""
        module = self._layers[layer]
        for part in module.modules():
            for name, value in list(part._parameters.items()):
                if value is not None and not value.is_meta:
                    part._parameters[name] = nn.Parameter(
                        torch.empty_like(value, device="meta"), requires_grad=False
                    )
            for name, value in list(part._buffers.items()):
                if value is not None and not value.is_meta:
                    part._buffers[name] = torch.empty_like(value, device="meta")

    @contextmanager
    def loaded(self, layer: int) -> Iterator[nn.Module]:
        """Hold a layer's weights in memory for the duration of the context."""
        try:
            yield self.fill(layer, self.read_layer(layer))
        finally:
            self.empty(layer)

    def outer(self) -> dict[str, nn.Parameter]:
        """Return the loaded parameters outside the layers and the head, by full name in ``model``.

        The embedding is among them with only the rows `embedding_rows`.
        """
        self._load_outer()
        names = set(self._outer_names())
        return {name: p for name, p in self.model.named_parameters() if name in names and not p.is_meta}

    def _load_outer(self) -> None:
        """Load what lies outside the layers, except the embedding; it stays for the whole pass."""
        if self._outer_loaded:
            return
        state = self.model.state_dict()
        device = self.placement.outer
        tensors = {
            name: self._read(name, self._pieces[name], state[name], device)
            for name in self._outer_names()
            if name in self._pieces and name != f"{self.embedding_module}.weight"
        }
        _put(self.model, tensors)
        for path, module in self.model.named_modules():
            if not path.startswith(self.stack + ".") and path != self.stack:
                compute_buffers(self.model, module, device, recurse=False)
        self._outer_loaded = True

    def _load_embedding(self, ids: Tensor) -> Tensor:
        """Load the rows of the tokens in ``ids`` and return the ids renumbered to those rows."""
        name = self._pieces[f"{self.embedding_module}.weight"][0].tensor
        rows, width = self.checkpoint.tensors[name].shape
        unique = torch.unique(ids)  # sorted
        if len(unique) and not 0 <= int(unique[0]) <= int(unique[-1]) < rows:
            raise InputError("E383", f"a token id is outside the vocabulary of {rows}: {int(unique[0])}..{int(unique[-1])}",
                             help="the text was tokenized for another model")  # fmt: skip
        module: Any = self.model.get_submodule(self.embedding_module)
        if not torch.equal(unique, self.embedding_rows) or module.weight.is_meta:
            table = torch.empty(len(unique), width, dtype=self.dtype)
            for place, first, last in _runs(unique):
                block = read_tensor(self.checkpoint, name, first * width, last * width, self.dtype)
                inside = unique[place : place + int(((unique >= first) & (unique < last)).sum())] - first
                table[place : place + len(inside)] = block.reshape(-1, width)[inside]
            module.padding_idx = None  # row numbers are not token ids any more; it only matters in training
            module.weight = nn.Parameter(
                self.placement.send(table, self.placement.outer), requires_grad=False
            )
            self.embedding_rows = unique
        return torch.searchsorted(unique, ids)

    # ---- running -------------------------------------------------------------------------------

    def record(self, ids: Tensor, mask: Tensor | None = None) -> Recording:
        """Run the embedding of a batch and record the arguments of every layer.

        Args:
            ids: token ids [batch, tokens], int64.
            mask: 1 for tokens and 0 for padding [batch, tokens]; only models that look at later
                tokens need it, padding on the right is invisible to the others.
        """
        self._load_outer()
        calls: list[Call] = []
        first: list[Tensor] = []

        def note(layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if layer == 0:
                first.append(hidden)
            calls.append(self._call_of(layer, args, kwargs))
            return hidden

        embedding = self.model.get_submodule(self.embedding_module)
        rows = self._load_embedding(ids).to(self.placement.outer)
        handle = embedding.register_forward_pre_hook(lambda module, args: (rows, *args[1:]))
        try:
            self._run_base(ids, mask, note)
        finally:
            handle.remove()
        return Recording(first[0], tuple(calls))

    def call(self, layer: int, hidden: Tensor, call: Call) -> Tensor:
        """Run a loaded layer on hidden states [batch, tokens, hidden]."""
        hidden = self.placement.send(hidden, self.placement.of_layer(layer))
        out = self._layers[layer](hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def finish(self, ids: Tensor, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run what follows the layers, and return the base model's last hidden state."""
        self._load_outer()
        given = self.placement.send(hidden, self.placement.outer)

        def replace(layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return given if layer == self.layers - 1 else hidden

        with self._blank_embedding(ids):
            return self._run_base(ids, mask, replace).last_hidden_state

    def calls(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Call, ...]:
        """Record the arguments of every layer again, without reading the embedding.

        They depend on the number of samples and tokens and on the mask, never on the tokens.
        """
        self._load_outer()
        found: list[Call] = []

        def note(layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found.append(self._call_of(layer, args, kwargs))
            return hidden

        with self._blank_embedding(ids):
            self._run_base(ids, mask, note)
        return tuple(found)

    def _call_of(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> Call:
        device = self.placement.of_layer(layer)
        return Call(self.placement.send(args, device), self.placement.send(kwargs, device))

    @contextmanager
    def _blank_embedding(self, ids: Tensor) -> Iterator[None]:
        """Let the embedding return zeros for runs whose hidden states do not matter before the last layer."""
        embedding: Any = self.model.get_submodule(self.embedding_module)
        blank = torch.zeros(
            *ids.shape, embedding.embedding_dim, dtype=self.dtype, device=self.placement.outer
        )
        embedding.forward = lambda *args, **kwargs: blank
        try:
            yield
        finally:
            del embedding.forward

    def _run_base(self, ids: Tensor, mask: Tensor | None, stand_in: Any) -> Any:
        """Run the base model with every layer's forward replaced by ``stand_in(layer, hidden, ...)``."""
        device = self.placement.outer
        self._forget_rotary_state()
        self.phase = "before"

        def counted(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = stand_in(number, hidden, *args, **kwargs)
            self.phase = "after" if number == self.layers - 1 else "inside"
            return out

        try:
            for number, layer in enumerate(self._layers):
                layer.forward = _bound(counted, number)  # type: ignore[method-assign]
            return self.base(
                input_ids=ids.to(device),
                attention_mask=None if mask is None else mask.to(device),
                use_cache=False,
            )
        finally:
            self.phase = ""
            for layer in self._layers:
                layer.__dict__.pop("forward", None)

    def _forget_rotary_state(self) -> None:
        """Undo what a longer batch left in rotary tables that depend on the length ("dynamic" scaling)."""
        for module in self._rotary:
            if "dynamic" in str(module.rope_type) and not module.inv_freq.is_meta:
                module.inv_freq = module.original_inv_freq.clone()
                module.max_seq_len_cached = module.original_max_seq_len

    @property
    def length_dependent(self) -> bool:
        """Say whether rotary tables depend on the longest sample of a batch, so that lengths must not be mixed."""
        return any(
            word in str(module.rope_type) for module in self._rotary for word in ("dynamic", "longrope")
        )

    def head_input(self, final: Tensor) -> Tensor:
        """Return what the output embedding is applied to: ``final``, transformed first in BERT's head."""
        if self.head_module is None or "." not in self.head_module:
            return final
        transform = getattr(self.model.get_submodule(self.head_module.rpartition(".")[0]), "transform", None)
        if transform is None:
            return final
        self._load_outer()
        return transform(final)

    def expert_module(self, layer: int) -> nn.Module | None:
        """Return a layer's expert module, or None for a dense layer."""
        return next((module for module in self._layers[layer].modules() if is_experts(module)), None)

    def read_expert(
        self, layer: int, expert: int, replaced: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Read one expert's slices of a layer's stacked parameters, by parameter name; safe in a thread.

        Tensors in ``replaced`` (checkpoint names) come from there instead of the checkpoint.
        """
        device = self.placement.of_layer(layer)
        found = {}
        start = self.layer_path(layer) + "."
        for name, parameter in experts.stacked_parameters(self._layers[layer]):
            pieces = [piece for piece in self._pieces[start + name] if piece.expert == expert]
            value = load_expert(self.checkpoint, pieces, tuple(parameter.shape[1:]), parameter.dtype)
            for piece in pieces:
                new = None if replaced is None else replaced.get(piece.tensor)
                if new is None:
                    continue
                value = value.clone()  # a view of memory would change its checkpoint
                place = value[piece.index[1:]] if piece.index[1:] else value
                place.copy_(new[piece.stored] if piece.stored else new)
            found[name.rpartition(".")[2]] = self.placement.send(value, device)
        return found


def _bound(stand_in: Any, number: int) -> Any:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return stand_in(number, hidden, *args, **kwargs)

    return forward


def _runs(rows: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (index of the first row, first row, last row + 1) of reads that cover sorted rows."""
    if not len(rows):
        return
    listed = rows.tolist()
    start = place = 0
    for at in range(1, len(listed) + 1):
        if at == len(listed) or listed[at] - listed[at - 1] > GAP or listed[at] - listed[start] > 4096:
            yield place, listed[start], listed[at - 1] + 1
            start = place = at


def _put(root: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = root.get_submodule(path) if path else root
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

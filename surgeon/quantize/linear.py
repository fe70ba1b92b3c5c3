"""The linear modules of a model: which may be quantized, which stay, and what configuration files must list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgeon.calibrate.matrices import Matrix, matrices_of
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.patterns import matches, select
from surgeon.errors import InputError, Where
from surgeon.traits import head_name, is_tied, part_of


@dataclass(frozen=True)
class Linear:
    """What can be quantized in a model, and what lies beside it.

    Attributes:
        layers: matrices by layer, in the order of the model.
        head: the output head where it is a matrix of its own, else None. It is quantized only where it is named.
        others: names of linear modules that are never quantized here: routers, and what belongs to no known kind.
    """

    layers: tuple[tuple[Matrix, ...], ...]
    head: Matrix | None
    others: tuple[str, ...]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All matrices of layers, in their order."""
        return tuple(matrix for layer in self.layers for matrix in layer)


def linear_of(checkpoint: Checkpoint, settings: Settings, ignore: Sequence[str] = ()) -> Linear:
    """Return the linear modules of a checkpoint of plain numbers.

    Args:
        ignore: patterns of tensors or modules that stay; the head needs none, it is never taken by itself.

    Raises:
        UsageError: E218 a pattern that matches nothing.
        InputError: E317 nothing is left; E231 matrices that no reader takes; E380-E383 the model is not known.
    """
    skeleton = Skeleton(checkpoint, replace(settings, device="cpu", spill=None))
    head = head_name(checkpoint.tensors)
    if head is not None and is_tied(checkpoint):
        head = None
    skipped = [name for pattern in ignore for name in _named(pattern, checkpoint, "--ignore")]
    layers = matrices_of(checkpoint, skeleton, ignore=[name for name in skipped if name != head])
    for matrix in (matrix for layer in layers for matrix in layer):
        _check(matrix, (checkpoint.config or {}).get("model_type"))
    taken = {matrix.tensor for layer in layers for matrix in layer}
    others = tuple(
        name.removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and name not in taken and name != head
        and part_of(name) not in ("embedding", "norm")
    )  # fmt: skip
    own = None
    if head is not None and head not in skipped:
        rows, columns = checkpoint.tensors[head].shape
        own = Matrix(head, len(layers), head.removesuffix(".weight"), False, None, rows, columns, False)
    elif head is not None:
        others = (*others, head.removesuffix(".weight"))
    return Linear(layers, own, others)


def _named(pattern: str, checkpoint: Checkpoint, option: str) -> list[str]:
    """Return the tensors a pattern names; a module's name stands for its weight."""
    if f"{pattern}.weight" in checkpoint.tensors:
        return [f"{pattern}.weight"]
    if pattern == "lm_head":  # the usual word, also for models whose head is the embedding
        return [name] if (name := head_name(checkpoint.tensors)) is not None else []
    return list(select(pattern, checkpoint.tensors, option))


def named(pattern: str, linear: Linear, checkpoint: Checkpoint) -> set[str]:
    """Return the matrices that a pattern of ``--scheme`` names, by tensor or by module.

    Raises:
        UsageError: E218 it matches no tensor.
        InputError: E231 it matches nothing that can be quantized.
    """
    known = {m.tensor for m in linear.matrices} | ({linear.head.tensor} if linear.head else set())
    found = {n for n in known if matches(pattern, n) or matches(pattern, n.removesuffix(".weight"))}
    if not found and pattern in ("lm_head", "lm_head.weight") and linear.head is None:
        raise InputError("E231", f'--scheme "{pattern}=...": the output head is the embedding, which stays as it is',
                         help="leave the pattern out; untie the two before, if the head has to be quantized")  # fmt: skip
    if not found:
        select(
            pattern,
            [*checkpoint.tensors, *(n.removesuffix(".weight") for n in checkpoint.tensors)],
            "--scheme",
        )
        raise InputError("E231", f'--scheme "{printable(pattern)[:60]}" names nothing that can be quantized',
                         help="embeddings, norms and routers stay, and so does a head that is the embedding")  # fmt: skip
    return found


def _check(matrix: Matrix, model_type: str | None) -> None:
    where = Where(tensor=printable(matrix.tensor))
    if matrix.expert is not None:
        own = "; gpt-oss is published in a four-bit form of its own, MXFP4" if model_type == "gpt_oss" else ""
        raise InputError(
            "E231", f"{printable(matrix.tensor)} holds all experts of a layer in one tensor; readers of quantized forms look for each matrix by itself",
            where=where, help=f"--ignore it, or start from a checkpoint that stores each expert by itself{own}",
        )  # fmt: skip
    if matrix.transposed:
        raise InputError(
            "E231", f"{printable(matrix.tensor)} is stored [in, out] (Conv1D), and linear modules alone are written quantized: "
            "readers of compressed-tensors would leave it random", where=where,
            help="bitsandbytes takes Conv1D while transformers loads the plain model: BitsAndBytesConfig(load_in_4bit=True)",
        )  # fmt: skip
    if not matrix.tensor.endswith(".weight"):
        raise InputError("E231", f"{printable(matrix.tensor)} is a matrix that quantized forms have no name for: theirs end in .weight",
                         where=where, help="--ignore it")  # fmt: skip

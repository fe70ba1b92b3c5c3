"""What the readers of compressed-tensors models accept, asked before anything is quantized.

    choices(shapes, menu, Reader("vllm"))       which matrices share a scheme, and what each group of them may have
    refusals(matrices, Reader("vllm"))          why an assignment would be refused, or read wrongly

transformers (measured: 5.23 with compressed-tensors 0.20, on models of a dozen families): every dense module may have its
own scheme. It unpacks all experts of a model by one: another one gives an error or, where shapes happen to agree, wrong
values in silence. Beside quantized dense modules it looks for packed experts, unless the first group is of eight-bit
floats, which pass plain ones. It forgets the shared scale of an expert's NVFP4 matrix, and unpacks four-bit floats to
bfloat16 whatever the model's type. Zero points, embeddings, and groups that end inside a row fail.

vLLM (read in its source of 2026): matrices that are loaded as one have one scheme, and so have all experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, SurgeonError, Where
from surgeon.formats.compressed_groups import EXPERT, FORMATS
from surgeon.formats.scheme import Scheme
from surgeon.formats.told_once import told_once
from surgeon.traits import part_of

Runtime = Literal["transformers", "vllm"]
Shape = tuple[int, ...]

BITS = range(2, 9)
BLOCKS = {"nvfp4": 16, "mxfp4": 32}
"""Inputs a scale of four-bit floats covers."""

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Last parts of the names of modules that vLLM loads as one matrix."""

ACROSS = ("o_proj", "down_proj", "w2", "out_proj", "dense")
"""Last parts of the names of modules whose inputs vLLM splits between devices; of others it splits the outputs."""

VLLM_EXPERT_BITS = (2, 4, 8)
VLLM_HEAD_BITS = (4, 8)


@dataclass(frozen=True)
class Reader:
    """What decides, beside the matrices, on how a model is read.

    Attributes:
        runtime: that the model is written for.
        dtype: storage type of the model's plain tensors.
        tied: whether the output head is the embedding.
        devices: vLLM's tensor_parallel_size.
    """

    runtime: Runtime = "transformers"
    dtype: str = "BF16"
    tied: bool = False
    devices: int = 1


STOCK = Reader()


@dataclass(frozen=True)
class Choice:
    """Matrices that have to share a scheme, and the schemes they may share.

    Attributes:
        names: of the matrices, in the order of the model.
        schemes: from the menu, in its order; None leaves them as they are.
    """

    names: tuple[str, ...]
    schemes: tuple[Scheme | None, ...]


def refusals(
    matrices: Mapping[str, tuple[Shape, Scheme | None]], reader: Reader = STOCK
) -> list[SurgeonError]:
    """Return everything that speaks against a whole model, as E456; nothing when its reader reads what is meant.

    Args:
        matrices: name of every plain matrix of a linear module -> (shape, its scheme, None as it is).
    """
    found: list[SurgeonError] = []
    single = (
        (name, (scheme.name, reason))
        for name, (shape, scheme) in matrices.items()
        if scheme and (reason := storable(name, shape, scheme, reader))
    )
    for name, more, (what, reason) in told_once(single):
        found.append(_refusal((name,), f"cannot be stored as {what}", reader, reason, more))
    groups = {group[0]: group for group in ties(matrices, reader.runtime)}
    tied = []
    for first, group in groups.items():
        said = sorted({scheme.name if (scheme := matrices[name][1]) else "plain" for name in group})
        if len(said) > 1:
            tied.append((first, " and ".join(said)))
    for first, more, what in told_once(tied):
        reason = _why_tied(groups[first], reader) + (more and f"; so it is with {more}")
        found.append(_refusal(groups[first], f"cannot be {what}", reader, reason))
    if reader.runtime == "transformers":
        experts = tuple(name for name in matrices if _of_expert(name))
        dense = {scheme for name, (_, scheme) in matrices.items() if scheme and not _of_expert(name)}
        left = bool(experts) and all(matrices[name][1] is None for name in experts)
        if left and dense and all(scheme.kind != "float8" for scheme in dense):
            reason = "it then looks for packed experts, unless other modules are float8"
            found.append(_refusal(experts, "cannot stay plain beside quantized modules", reader, reason))
    return found


def _refusal(names: tuple[str, ...], what: str, reader: Reader, reason: str, alike: str = "") -> InputError:
    more = len(names) - 3
    also = f"{more} more" if more > 0 else alike
    shown = ", ".join(map(printable, names[:3])) + (f" and {also}" if also else "")
    return InputError(
        "E456", f"{shown} {what} for {reader.runtime}: {reason}", where=Where(tensor=printable(names[0])),
        help="choose other schemes for them, another runtime, or for experts a format that stores each on its own (auto-round)",
    )  # fmt: skip


def choices(
    shapes: Mapping[str, Shape], menu: Sequence[Scheme | None], reader: Reader = STOCK
) -> list[list[Choice]]:
    """Return what an allocator may choose from: alternatives, within which any combination is without `refusals`.

    Args:
        shapes: name of every plain matrix of a linear module -> shape.
        menu: schemes to choose from, and None.

    Returns:
        One list or two, each with every matrix: solve each and keep the best. A choice without schemes says that the
        menu has nothing for its matrices.
    """
    whole = []
    for group in ties(shapes, reader.runtime):
        fits = (
            s
            for s in menu
            if s is None or all(storable(name, shapes[name], s, reader) is None for name in group)
        )
        whole.append(Choice(group, tuple(fits)))
    if reader.runtime != "transformers" or not any(map(_of_expert, shapes)):
        return [whole]
    # Experts are quantized, with any schemes beside them, or they stay, and so does all that is not float8.
    quantized = _kept(whole, lambda scheme, expert: not expert or scheme is not None)
    left = _kept(whole, lambda scheme, expert: scheme is None or (not expert and scheme.kind == "float8"))
    return [option for option in (quantized, left) if all(c.schemes for c in option)] or [quantized]


def _kept(whole: list[Choice], keep: Callable[[Scheme | None, bool], bool]) -> list[Choice]:
    return [
        Choice(choice.names, tuple(s for s in choice.schemes if keep(s, _of_expert(choice.names[0]))))
        for choice in whole
    ]


def ties(names: Iterable[str], runtime: Runtime = "transformers") -> list[tuple[str, ...]]:
    """Return all matrices in groups that have to share a scheme, single ones too, in the order of their first ones."""
    names = list(names)
    first = {name: group[0] for group in fused(names) for name in group} if runtime == "vllm" else {}
    groups: dict[str, list[str]] = {}
    for name in names:
        match = EXPERT.match(name.removesuffix(".weight"))
        key = first.get(name, name)
        if match is not None:
            key = match["stack"] if runtime == "vllm" else "experts of the model"
        groups.setdefault(key, []).append(name)
    return [tuple(group) for group in groups.values()]


def fused(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the matrices that vLLM loads as one, an expert's included: NVFP4 needs one shared scale for each such."""
    kinds = {last: number for number, parts in enumerate(FUSED) for last in parts}
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        if last in kinds:
            found.setdefault((parent, kinds[last]), []).append(name)
    return [tuple(group) for group in found.values() if len(group) > 1]


def unstorable(scheme: Scheme) -> str | None:
    """Return why no matrix is stored by a scheme, None when some are."""
    if scheme.kind not in FORMATS:
        return f"compressed-tensors stores {', '.join(FORMATS)}"
    if not scheme.symmetric:
        return "transformers cannot load zero points in this format"
    if scheme.kind == "int" and scheme.bits not in BITS:
        return f"integers have {BITS[0]} to {BITS[-1]} bits"
    if scheme.kind == "int" and (scheme.group == 0 or scheme.group < -1):
        return f"{scheme.group} is no size of a group"
    if scheme.kind != "int" and scheme.bits != (8 if scheme.kind == "float8" else 4):
        return f"{scheme.kind} does not have {scheme.bits} bits"
    return None


def misfit(shape: Shape, scheme: Scheme) -> str | None:
    """Return why a tensor of this shape is not stored by a scheme that others are stored by, None when it is."""
    if len(shape) != 2:
        return f"it has {len(shape)} axes; linear modules have 2, experts are stored one by one"
    if not all(shape):
        return "it is empty"
    size = BLOCKS.get(scheme.kind, scheme.group if scheme.kind == "int" else -1)
    if size > 0 and shape[1] % size:
        return f"groups of {size} do not divide its {shape[1]} inputs"
    return None


def storable(name: str, shape: Shape, scheme: Scheme, reader: Reader = STOCK) -> str | None:
    """Return why one matrix cannot be stored by a scheme, whatever others have; None when it can.

    Args:
        name: of the plain matrix, ending in ".weight".
        shape: (out, in).
    """
    part = part_of(name)
    if part in ("embedding", "router", "norm"):
        return f"readers want {'an' if part[0] in 'aeiou' else 'a'} {part} plain"
    if part == "head" and reader.tied:
        return "it is the embedding, which readers want plain"
    reason = unstorable(scheme) or misfit(shape, scheme)
    if reason is not None:
        return reason
    if reader.runtime == "vllm":
        return _vllm_reason(name.removesuffix(".weight"), shape, scheme, reader)
    if scheme.kind == "nvfp4" and _of_expert(name):
        return "transformers drops the shared scale of an expert's matrix, and reads wrong values without an error"
    if scheme.kind in BLOCKS and reader.dtype != "BF16":
        return f"four-bit floats are unpacked to BF16, which does not run in a model of type {reader.dtype}"
    return None


def _vllm_reason(name: str, shape: Shape, scheme: Scheme, reader: Reader) -> str | None:
    last, integers = name.rpartition(".")[2], scheme.kind == "int"
    if _of_expert(name):
        if last not in ("gate_proj", "up_proj", "down_proj"):
            return "vLLM looks for the schemes of experts under gate_proj, up_proj and down_proj"
        if integers and scheme.bits not in VLLM_EXPERT_BITS:
            return f"vLLM runs experts of {', '.join(map(str, VLLM_EXPERT_BITS))} bits"
    if part_of(f"{name}.weight") == "head" and not (integers and scheme.bits in VLLM_HEAD_BITS):
        return f"vLLM runs an output head in integers of {' or '.join(map(str, VLLM_HEAD_BITS))} bits"
    across, devices = last in ACROSS, reader.devices
    if shape[across] % devices:
        return f"{devices} devices do not divide its {shape[across]} {'inputs' if across else 'outputs'}"
    inputs = shape[1] // devices if across else shape[1]
    if misfit((shape[0], inputs), scheme) is not None:
        return f"on each of {devices} devices {misfit((shape[0], inputs), scheme)}"
    if integers and inputs * scheme.bits % 32:
        return f"a row of {inputs} codes of {scheme.bits} bits does not fill words of 32"
    return None


def _why_tied(group: tuple[str, ...], reader: Reader) -> str:
    if not _of_expert(group[0]):
        return "vLLM loads them as one matrix, which has one scheme"
    return f"it has one scheme for all experts of a {'layer' if reader.runtime == 'vllm' else 'model'}"


def _of_expert(name: str) -> bool:
    return EXPERT.match(name.removesuffix(".weight")) is not None

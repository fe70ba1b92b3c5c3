"""Tensors that look as if they belonged to experts, but that the record says nothing of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from surgeon.architectures.expert_records.record import ExpertRecord
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.structure.experts.names import ROUTED, Found
from surgeon.structure.experts.sizes import Sizes

SUSPICIOUS = re.compile(r"gate|router|bias|statics|wg|tid2eid|expert")
"""What tensors with one entry per expert are called."""

EXPERTS = re.compile(r"(^|\.)experts(\.|$)")


def undescribed(
    checkpoint: Checkpoint, record: ExpertRecord, sizes: Sizes, found: Found, blocks: Mapping[str, str]
) -> Iterator[InputError]:
    """Yield every tensor that would be left behind by a cut, or belongs to experts nobody found.

    Args:
        blocks: prefix of a layer with experts -> prefix of its block of experts.
    """
    for layer in (*found.layers.values(), *found.extra.values()):
        block = blocks.get(layer.prefix)
        for name in layer.others:
            inside = block is not None and name.startswith(block)
            if _is_suspicious(checkpoint, name, name[len(layer.prefix) :], sizes.experts, inside):
                yield _finding(checkpoint, record, name)
    for name in found.outside:
        if EXPERTS.search(name):
            yield _finding(checkpoint, record, name)


def _is_suspicious(checkpoint: Checkpoint, name: str, rest: str, experts: int, inside: bool) -> bool:
    if EXPERTS.search(rest):
        return True
    one_each = experts in checkpoint.tensors[name].shape
    return one_each and bool((SUSPICIOUS if inside else ROUTED).search(rest))


def _finding(checkpoint: Checkpoint, record: ExpertRecord, name: str) -> InputError:
    shape = list(checkpoint.tensors[name].shape)
    return InputError(
        "E424", f"{checkpoint.label}: a tensor of shape {shape} seems to belong to experts, but the record of "
        f"{record.family} does not describe it",
        where=Where(tensor=printable(name)),
        help="leaving it as it is would give a wrong model; describe it in a record and give that with --expert-record",
    )  # fmt: skip

"""Packing: texts end to end, with the end-of-text token between them, in blocks of one length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

_CHARACTERS_PER_TOKEN = 4


def passages(text: str, length: int, unbroken: Collection[str] = ()) -> list[tuple[int, str]]:
    """Cut a text into passages of about ``length`` tokens: (lines before it, passage).

    Cut at the last line end of each stretch of 4 * ``length`` characters (four characters per
    token is English), else at its last blank, else where the stretch ends.

    Args:
        unbroken: strings that stand for one token, such as "<|pad|>"; no cut falls inside one.
    """
    size = max(64, _CHARACTERS_PER_TOKEN * length)
    found = []
    start = line = 0
    while start < len(text):
        stop = min(start + size, len(text))
        if stop < len(text):
            border = text.rfind("\n", start + size // 2, stop)
            if border < 0:
                border = text.rfind(" ", start + size // 2, stop)
            if border >= 0:
                stop = border + 1
            earlier = _outside(text, stop, unbroken)
            stop = earlier if earlier > start else stop
        found.append((line, text[start:stop]))
        line += text.count("\n", start, stop)
        start = stop
    return found


def _outside(text: str, cut: int, unbroken: Collection[str]) -> int:
    """Return ``cut``, or the start of the unbroken string it would fall into."""
    for token in unbroken:
        at = text.find(token, max(0, cut - len(token) + 1), cut + len(token) - 1)
        if 0 <= at < cut:
            return at
    return cut


def packed(
    queues: Mapping[str, Sequence[int]],
    tokens: Callable[[int], np.ndarray],
    blocks: int,
    length: int,
    eos: int | None,
) -> list[tuple[str, np.ndarray]]:
    """Fill at most ``blocks`` blocks of exactly ``length`` ids: (domain, int64 [length]).

    Args:
        queues: domain -> numbers of its texts, in the order they are used.
        tokens: number -> ids, [T]; empty when there is nothing in the text.
        blocks: where to stop.
        length: ids of a block.
        eos: put after every text; None for a tokenizer without one.

    The domain with the fewest tokens so far is served next, so domains fill up evenly whatever
    the lengths of their texts. Incomplete blocks at the end are left out, unless no block was
    completed: then they are all there is.
    """
    waiting = {domain: list(reversed(queue)) for domain, queue in sorted(queues.items())}
    buffers: dict[str, list[np.ndarray]] = {domain: [] for domain in waiting}
    held = dict.fromkeys(waiting, 0)
    served = dict.fromkeys(waiting, 0)
    made: list[tuple[str, np.ndarray]] = []
    end = np.asarray([] if eos is None else [eos], dtype=np.int64)
    while len(made) < blocks and any(waiting.values()):
        domain = min((d for d in waiting if waiting[d]), key=lambda d: served[d])
        ids = tokens(waiting[domain].pop())
        if not len(ids):
            continue
        buffers[domain] += [ids] if len(end) and ids[-1] == end[0] else [ids, end]
        added = sum(len(part) for part in buffers[domain]) - held[domain]
        held[domain] += added
        served[domain] += added
        if held[domain] >= length:
            whole = np.concatenate(buffers[domain])
            full = len(whole) // length
            made += [(domain, whole[i * length : (i + 1) * length]) for i in range(full)]
            buffers[domain] = [whole[full * length :]]
            held[domain] = len(whole) - full * length
    if not made:
        made = [(d, np.concatenate(b)) for d, b in buffers.items() if held[d] >= 2]
    return made[:blocks]

"""From the schemes people name to one scheme for every matrix, as the readers of the form take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgeon.calibrate.matrices import Matrix
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where, raise_all
from surgeon.formats.scheme import Scheme
from surgeon.formats.told_once import told_once
from surgeon.quantize.linear import named
from surgeon.quantize.scheme_names import Wanted, candidates, parse
from surgeon.quantize.session import Schemes, Session


@dataclass(frozen=True)
class Wishes:
    """What was asked for by name.

    Attributes:
        fixed: matrix -> what a pattern says of it; the head is among them only when it was named.
        rest: for all others; None when a target decides about them.
    """

    fixed: Mapping[str, Wanted]
    rest: Wanted | None


def wishes(session: Session) -> Wishes:
    """Return what ``--scheme`` says; of several patterns that fit a matrix the first counts."""
    request = session.request
    fixed: dict[str, Wanted] = {}
    rest = None
    for pattern, text in request.wishes:
        wanted = parse(text, request.format, group_size=request.group_size, symmetric=request.symmetric)
        if pattern is None:
            rest = wanted
            continue
        for name in sorted(named(pattern, session.linear, session.checkpoint)):
            fixed.setdefault(name, wanted)
    return Wishes(fixed, rest)


def assigned(session: Session) -> Schemes:
    """Return the scheme of every matrix where schemes were named and no target is given.

    Raises:
        InputError: E231 a group size that does not fit; what the form refuses.
    """
    asked = wishes(session)
    assert asked.rest is not None
    wanted = {m.tensor: asked.fixed.get(m.tensor, asked.rest) for m in session.linear.matrices}
    head = session.linear.head
    if head is not None and head.tensor in asked.fixed:
        wanted[head.tensor] = asked.fixed[head.tensor]
    return settle(session, wanted)


def settle(session: Session, wanted: Mapping[str, Wanted]) -> Schemes:
    """Return schemes with groups that fit, the same for matrices that readers want alike."""
    shapes = {name: (m.rows, m.columns) for name, m in every(session).items() if name in wanted}
    _check_groups(session, wanted)
    open_ones = {name: candidates(one) for name, one in wanted.items()}
    found: Schemes = {name: options[0] for name, options in open_ones.items()}
    menu = list(dict.fromkeys(scheme for options in open_ones.values() for scheme in options))
    for choice in session.form.choices(shapes, menu)[0] if session.request.group_size is None else ():
        for name in choice.names:
            fitting = [scheme for scheme in open_ones[name] if scheme in choice.schemes]
            if fitting:
                found[name] = fitting[0]
    _say_groups(session, found, wanted)
    check(session, found)
    return found


def every(session: Session) -> dict[str, Matrix]:
    """Return all matrices that may be quantized, the head among them."""
    head = session.linear.head
    return {m.tensor: m for m in (*session.linear.matrices, *((head,) if head else ()))}


def check(session: Session, schemes: Schemes) -> None:
    """Refuse an assignment that no reader loads, or that quantizes nothing.

    Raises:
        InputError: what the form says; E231 nothing is quantized.
    """
    matrices = every(session)
    asked = {name: ((m.rows, m.columns), schemes.get(name)) for name, m in matrices.items()}
    raise_all(session.form.refusals(asked))
    if not any(scheme is not None for scheme in schemes.values()):
        raise InputError("E231", f"nothing of {printable(session.source.key)} would be quantized", where=Where(session.source.path),
                         help="name a scheme other than none, or a smaller target")  # fmt: skip


def _check_groups(session: Session, wanted: Mapping[str, Wanted]) -> None:
    """Refuse a group size that was said and does not divide the inputs (E231)."""
    wrong = []
    matrices = every(session)
    for name, one in wanted.items():
        scheme, columns = one.scheme, matrices[name].columns
        if (
            scheme is not None
            and scheme.kind == "int"
            and one.grouped
            and scheme.group > 0
            and columns % scheme.group
        ):
            wrong.append((name, (scheme.group, columns)))
    refused = []
    for name, more, (group, columns) in told_once(wrong):
        fits = [size for size in (128, 64, 32) if columns % size == 0]
        advice = f"--group-size {fits[0]}, or " if fits else ""
        pattern = name.removesuffix(".weight").rpartition(".")[2]
        refused.append(InputError(
            "E231", f"group size {group} does not divide {columns:,}, the inputs of {printable(name)}{more and f' and {more}'}",
            where=Where(tensor=printable(name)), help=f"{advice}--scheme 're:.*{pattern}=none' leaves such matrices as they are",
        ))  # fmt: skip
    raise_all(refused)


def _say_groups(session: Session, found: Schemes, wanted: Mapping[str, Wanted]) -> None:
    """Say where groups other than the usual were taken."""
    other: dict[str, int] = {}
    for name, scheme in found.items():
        if scheme is not None and scheme.kind == "int" and not wanted[name].grouped and scheme.group != 128:
            size = "whole rows" if scheme.group < 0 else f"groups of {scheme.group}"
            other[size] = other.get(size, 0) + 1
    for size, count in sorted(other.items()):
        sentence = f"{size} for {count:,} matrices: groups of 128 do not divide their inputs, or those of matrices they are tied to"
        if sentence not in session.said:
            session.said.add(sentence)
            session.say(sentence)


def menu(session: Session, widths: Sequence[int]) -> list[Scheme | None]:
    """Return the schemes a target chooses from, ``None`` (as it is) among them: one group size for all, as far as it fits."""
    form, request = session.form, session.request
    columns = [m.columns for m in session.linear.matrices]
    if request.format == "gguf":
        return [Scheme("int", bits, 32, request.symmetric) for bits in widths] + [None]
    if request.format == "bitsandbytes":
        return [parse("NF4", form.name, group_size=None, symmetric=True).scheme, None]
    sizes = [request.group_size] if request.group_size is not None else [
        next((size for size in (128, 64, 32) if all(n % size == 0 for n in columns)), 128)
    ]  # fmt: skip
    if any(n % sizes[0] for n in columns if sizes[0] and sizes[0] > 0):
        sizes += [size for size in (64, 32, -1) if size != sizes[0]]
    return [Scheme("int", bits, size, request.symmetric) for bits in widths for size in sizes] + [None]

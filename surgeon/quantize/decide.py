"""From a target to a scheme for every matrix: sensitivities, menus as readers allow them, a solver, exact sizes.

Groups are tied by what the reader demands before anything is solved; where a reader takes one of several families of
schemes, each is solved and the best one wins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.checkpoint.strict_json import read_json_object
from surgeon.errors import EnvironmentFault, InputError, UsageError, Where
from surgeon.formats.scheme import Scheme
from surgeon.quantize import wishes
from surgeon.quantize.allocation import sensitivity_file, target_size
from surgeon.quantize.allocation.menus import KEPT, Allocation, Alternative, Menu, monotone, tied
from surgeon.quantize.allocation.sensitivity import Sensitivities
from surgeon.quantize.request import MENU
from surgeon.quantize.scheme_names import Wanted, by_name, parse
from surgeon.quantize.session import Schemes, Session
from surgeon.quantize.sizes import file_bytes, fixed_bytes, matrix_bytes, word

PLAN_FILE = "plan.json"
"""Companion that says how every matrix is stored, and why."""


NO_GRADIENTS = ("E380", "E382", "E434", "E504")
"""Codes of models that cannot be run backward here: no head, no record, gradients that are not finite, too little memory."""


@dataclass
class Decision:
    """What was decided.

    Attributes:
        schemes: matrix -> scheme.
        allocation: how it was found; None where schemes were named.
        sensitivities: what the losses came from.
        tried: of a divergence: (bytes, divergence) of every plan that was measured.
        remarks: sentences for the user.
        record: how widths of experts were found.
    """

    schemes: Schemes
    allocation: Allocation | None = None
    sensitivities: Sensitivities | None = None
    tried: tuple[tuple[int, float], ...] = ()
    remarks: tuple[str, ...] = ()
    record: dict[str, Any] | None = None


def decide(session: Session, divergence: Callable[[Schemes], float]) -> Decision:
    """Return the scheme of every matrix.

    Args:
        divergence: makes a model of some schemes and measures how far it is from the source (``--target-kl``).

    Raises:
        UsageError: E231 a scheme, E249 a pattern asks for one that readers do not take there, E462 a target out of reach.
        InputError: what the form refuses; E463, E464 sensitivities; E492 a plan.
    """
    if session.request.plan is not None:
        return planned(session, Path(session.request.plan).expanduser())
    target = session.request.target
    if target is None:
        return Decision(wishes.assigned(session))
    if session.request.allocation == "pmq":
        return by_expert_bits(session, target[1])
    table = sensitivities(session, schemes_of_menu(session))
    found = alternatives(session, table)
    kind, value = target
    tried: tuple[tuple[int, float], ...] = ()
    if kind == "size":
        allocation = target_size.for_size(
            found, int(value), lambda one: file_bytes(session, schemes_of(session, one))
        )
    elif kind == "bits":
        allocation = target_size.for_bits(found, value)
    else:
        scale = 1.0 if table.kind == "kl" else None
        allocation, plans = target_size.for_kl(
            found, value, lambda one: divergence(schemes_of(session, one)), scale=scale
        )
        tried = tuple(
            (file_bytes(session, schemes_of(session, one.allocation)), one.divergence) for one in plans
        )
    schemes = schemes_of(session, allocation)
    wishes.check(session, schemes)
    return Decision(schemes, allocation, table, tried, tuple(_remarks(allocation, table)))


def _remarks(allocation: Allocation, table: Sensitivities) -> list[str]:
    said = []
    if allocation.status != "optimal":
        said.append(
            f"the solver was stopped ({allocation.status}): the plan is at most {allocation.gap:.2%} from the best"
        )
    if allocation.downgrades:
        said.append(
            f"{len(allocation.downgrades)} groups were made smaller because headers took more than predicted"
        )
    if table.estimated:
        said.append(f"{len(table.estimated)} matrices saw no token: their losses are those of like ones")
    return said


def by_expert_bits(session: Session, average: float) -> Decision:
    """Return widths of experts as PMQ chooses them, by importance and error; what is not of experts has W4A16 or what patterns say.

    Source: MC-MoE (2410.06270), MC# (2510.10962).

    Raises:
        UsageError: E462 an average out of reach, E488 a granularity; InputError: E477 no experts.
    """
    from surgeon.quantize.expert_bits import expert_bits
    from surgeon.quantize.expert_menu import expert_menu, expert_ties
    from surgeon.quantize.measuring.pmq_scores import pmq_scores
    from surgeon.structure.experts.find import experts_of

    request = session.request
    menu = expert_menu(session)
    scores = pmq_scores(
        session.checkpoint, experts_of(session.checkpoint), session.linear.layers, menu, session.form, session.texts.statistics,
        session.settings, session.options, by_projection=request.granularity == "projection", progress=session.tell,
        stop=session.stop,
    )  # fmt: skip
    matrices = wishes.every(session)
    found = expert_bits(
        scores, menu, average, elements={name: m.elements for name, m in matrices.items()},
        granularity=request.granularity, scope="model" if request.scope == "model" else "layer", must=request.must_appear,
        ties=expert_ties(session),
    )  # fmt: skip
    asked = wishes.wishes(session)
    rest = parse("W4A16", session.form.name, group_size=request.group_size, symmetric=request.symmetric)
    wanted = {m.tensor: asked.fixed.get(m.tensor, rest) for m in session.linear.matrices}
    wanted |= {name: Wanted(scheme) for name, scheme in found.schemes.items()}
    head = session.linear.head
    if head is not None and head.tensor in asked.fixed:
        wanted[head.tensor] = asked.fixed[head.tensor]
    schemes = wishes.settle(session, wanted)
    said = [f"experts have {found.nominal:.3g} bits on average, {found.stored:.4g} with scales"]
    if found.pinned:
        said.append(f"{len(found.pinned)} super experts have the largest width")
    if found.unused:
        said.append(f"{len(found.unused)} experts saw no token and have the smallest width")
    return Decision(schemes, remarks=tuple(said), record=found.record())


# ---- what may be chosen -------------------------------------------------------------------------------


def schemes_of_menu(session: Session) -> list[Scheme]:
    """Return the schemes a target chooses from, with those that patterns ask for."""
    found = wishes.menu(session, widths_of(session))
    for wanted in wishes.wishes(session).fixed.values():
        found.append(wanted.scheme)
    return [scheme for scheme in dict.fromkeys(found) if scheme is not None]


def widths_of(session: Session) -> tuple[int, ...]:
    """Return the widths of integers a target chooses from.

    Raises:
        UsageError: E217 one that the form does not store.
    """
    request, form = session.request, session.form
    widths = request.bits or tuple(width for width in MENU if width in form.widths) or form.widths
    wrong = [width for width in request.bits if form.widths and width not in form.widths]
    if wrong:
        raise UsageError("E217", f"{form.name} stores no matrices of {wrong[0]} bits for {form.reader.runtime}",
                         help="it stores " + ", ".join(map(str, form.widths)))  # fmt: skip
    return widths


def alternatives(session: Session, table: Sensitivities) -> list[Alternative]:
    """Return what readers take, with exact bytes and losses."""
    asked = wishes.wishes(session)
    matrices = wishes.every(session)
    taken = {m.tensor for m in session.linear.matrices} | set(asked.fixed)
    shapes = {name: (m.rows, m.columns) for name, m in matrices.items() if name in taken}
    menu: list[Scheme | None] = [*schemes_of_menu(session), None]
    fixed = fixed_bytes(session, set(shapes))
    found = []
    for number, choices in enumerate(session.form.choices(shapes, menu)):
        menus: list[Menu] = []
        for choice in choices:
            sizes = {
                name: {word(s): matrix_bytes(session, name, shapes[name], s) for s in choice.schemes}
                for name in choice.names
            }
            if not choice.schemes:
                raise InputError("E464", f"nothing in the menu can store {choice.names[0]}", where=Where(tensor=choice.names[0]),
                                 help="allow other widths with --bits, or another group size")  # fmt: skip
            tied_menu = tied(choice.names[0], table.menus(sizes))
            menus.append(monotone(_pinned(tied_menu, choice.names, asked))[0])
        found.append(Alternative(f"family {number + 1}", tuple(menus), fixed))
    return found


def _pinned(menu: Menu, names: Sequence[str], asked: wishes.Wishes) -> Menu:
    """Return a menu with one option where a pattern decided about one of its matrices."""
    said = {name: asked.fixed[name].scheme for name in names if name in asked.fixed}
    if not said:
        return menu
    if len({word(scheme) for scheme in said.values()}) > 1:
        raise UsageError("E249", f"patterns want {names[0]} and what it is tied to stored differently",
                         help="readers load them as one: name the same scheme for all")  # fmt: skip
    return menu.only(word(next(iter(said.values()))))


def schemes_of(session: Session, allocation: Allocation) -> Schemes:
    """Return the schemes an allocation stands for."""
    return {
        name: None if option == KEPT else by_name(option) for name, option in allocation.by_module().items()
    }


# ---- sensitivities ------------------------------------------------------------------------------------


def sensitivities(session: Session, menu: Sequence[Scheme]) -> Sensitivities:
    """Return losses of all matrices in all schemes: from the file that was given, kept, or measured now."""
    request = session.request
    given = Path(request.sensitivities).expanduser() if request.sensitivities else None
    if given is not None and (table := _given(session, given)) is not None:
        session.say(f"sensitivities from {given.name} ({table.kind}): the model is not run for them")
        return table
    table = (
        _automatic(session, menu)
        if request.sensitivity == "auto"
        else _measured(session, menu, request.sensitivity)
    )
    if given is not None:
        given.parent.mkdir(parents=True, exist_ok=True)
        sensitivity_file.save(given, table)
    return table


def check_given(session: Session) -> None:
    """Refuse a file of sensitivities that nothing can be chosen by, without a text or a weight being read.

    Raises:
        InputError: E463 the file, E464 it lacks a matrix or a width of the menu.
    """
    request = session.request
    if not request.sensitivities or not (table := _given(session, Path(request.sensitivities).expanduser())):
        return
    measured = {by_name(name).bits for name in table.formats}
    absent = sorted(set(request.bits) - measured)
    if absent:
        name = Path(request.sensitivities).name
        raise InputError("E464", f"{name} holds no losses of {' and '.join(map(str, absent))} bits", where=Where(request.sensitivities),
                         help=f"--bits {','.join(map(str, sorted(measured)))}, or a file that is not there yet, to measure again")  # fmt: skip
    alternatives(session, table)


def _given(session: Session, file: Path) -> Sensitivities | None:
    """Return the losses in a file, None where there is none yet."""
    if not file.exists():
        return None
    request = session.request
    table = sensitivity_file.load(file, kind=None if request.sensitivity == "auto" else request.sensitivity)
    if table.about.get("checkpoint") != [header.sha256 for header in session.checkpoint.headers]:
        # Names and shapes may agree all the same: a fine-tune's losses are not its base's.
        raise InputError("E463", f"{file.name} was measured on another model", where=Where(str(file)),
                         help="name a file that is not there yet: losses of this model are written to it")  # fmt: skip
    return table


def _automatic(session: Session, menu: Sequence[Scheme]) -> Sensitivities:
    """Return Fisher losses where the model can be run backward, else relative errors of outputs."""
    reason = "it predicts no next tokens"
    if session.decoder:
        try:
            session.say(
                "--sensitivity fisher: errors weighted by gradients; rel-output takes an eighth of the time"
            )
            return _measured(session, menu, "fisher")
        except (InputError, EnvironmentFault) as error:
            if error.code not in NO_GRADIENTS:
                raise
            reason = error.message
    session.say(f"--sensitivity rel-output: {reason}")
    return _measured(session, menu, "rel-output")


def _measured(session: Session, menu: Sequence[Scheme], kind: str) -> Sensitivities:
    from surgeon.quantize import measuring

    layers = session.linear.layers
    asked = wishes.wishes(session)
    head = session.linear.head
    if head is not None and head.tensor in asked.fixed:
        layers = (*layers, (head,))
    return measuring.measure(
        kind, session.checkpoint, layers, menu, session.form, session.texts.statistics if kind != "weight" else (),
        session.settings, session.options, session.work / "sensitivities",
        search=session.texts.search if kind == "kl" else (), groups=_groups(session, menu) if kind == "kl" else None,
        seed=session.request.seed, progress=session.tell, stop=session.stop,
    )  # fmt: skip


def _groups(session: Session, menu: Sequence[Scheme]) -> dict[str, str]:
    """Return matrix -> the first of those it is tied to."""
    shapes = {m.tensor: (m.rows, m.columns) for m in session.linear.matrices}
    return {
        name: choice.names[0]
        for choice in session.form.choices(shapes, [*menu, None])[0]
        for name in choice.names
    }


# ---- plans --------------------------------------------------------------------------------------------


def planned(session: Session, file: Path) -> Decision:
    """Return what an earlier result's `PLAN_FILE` says.

    Raises:
        InputError: E492 it is no such file, or one of another model.
    """
    place = file / PLAN_FILE if file.is_dir() else file
    if not place.is_file():
        raise UsageError("E216", f"--plan {file} is no file, and no folder with {PLAN_FILE}", help="give the result of an earlier quantization")  # fmt: skip
    document = read_json_object(place)
    matrices = wishes.every(session)
    try:
        said = {str(name): str(scheme) for name, scheme in document["matrices"].items()}
    except (KeyError, TypeError, AttributeError):
        raise InputError("E492", f"{place.name} is no plan of a quantization", where=Where(str(place)), help=f"{PLAN_FILE} lies in every quantized folder") from None  # fmt: skip
    strange = sorted(said.keys() - matrices.keys())
    absent = sorted({m.tensor for m in session.linear.matrices} - said.keys())
    if strange or absent:
        raise InputError("E492", f"{place.name} is a plan of another model: {(strange or absent)[0]} is {'not here' if strange else 'not in it'}",
                         where=Where(str(place)), help="give a plan that was made for this model, with the same --ignore")  # fmt: skip
    schemes: Schemes = {name: None if text == KEPT else by_name(text) for name, text in said.items()}
    wishes.check(session, schemes)
    return Decision(schemes)


def plan_document(session: Session, decision: Decision, records: Sequence[dict[str, Any]]) -> bytes:
    """Return the content of `PLAN_FILE`."""
    allocation = decision.allocation
    document: dict[str, Any] = {
        "schema": 1, "format": session.form.name, "runtime": session.form.reader.runtime,
        "matrices": {name: word(scheme) for name, scheme in decision.schemes.items()},
        "allocation": None if allocation is None else allocation.record(),
        "sensitivity": None if decision.sensitivities is None else decision.sensitivities.kind,
        "experts": decision.record,
        "tried": [{"bytes": size, "kl": kl} for size, kl in decision.tried],
        "records": list(records),
    }  # fmt: skip
    return (json.dumps(document, indent=1) + "\n").encode()

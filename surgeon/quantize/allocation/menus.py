"""What can be chosen for each group of matrices that must share a format, and what was chosen.

A group is what the program that loads the model requires to be equal (q, k and v; all experts of a layer). Its menu
lists the formats that can store it, with exact bytes and the loss expected of each. Where a program accepts one of
several families of formats (4 or 8 bits but never both), every family is an alternative with its own menus.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from surgeon.errors import InputError, UsageError

KEPT = "kept"
"""The option of leaving a group as it is stored; its loss is 0."""


@dataclass(frozen=True)
class Option:
    """One way of storing a group.

    Attributes:
        name: of the scheme (`Scheme.name`), or `KEPT`.
        size: bytes of all its stored tensors: codes, scales, zero points, shapes.
        loss: what it is expected to cost, at least 0, on the same scale in all menus.
        header: bytes that the tensors take in file headers, at most; counted where the target is a file's size.
    """

    name: str
    size: int
    loss: float
    header: int = 0


@dataclass(frozen=True)
class Menu:
    """The options of one group of modules that share a format.

    Attributes:
        name: of the group; unique in its problem.
        options: at least one, with different names.
        modules: whose weights these are.
        parameters: numbers in these weights.

    Raises:
        ValueError: no option, a name twice, a negative size, a loss that is negative or no number.
    """

    name: str
    options: tuple[Option, ...]
    modules: tuple[str, ...] = ()
    parameters: int = 0

    def __post_init__(self) -> None:
        names = [option.name for option in self.options]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"the options of {self.name} are {names}")
        for option in self.options:
            if option.size < 0 or option.header < 0 or not (math.isfinite(option.loss) and option.loss >= 0):
                raise ValueError(f"{self.name} has the option {option}")

    @property
    def least(self) -> int:
        """Bytes of its smallest option."""
        return min(option.size for option in self.options)

    @property
    def most(self) -> int:
        """Bytes of its largest option."""
        return max(option.size for option in self.options)

    def only(self, name: str) -> Menu:
        """Return the menu with one option left.

        Raises:
            UsageError: E249 the group cannot be stored so.
        """
        for option in self.options:
            if option.name == name:
                return replace(self, options=(option,))
        known = ", ".join(option.name for option in self.options)
        raise UsageError(
            "E249", f"{self.name} cannot be stored as {name}", help=f"it can be stored as {known}"
        )

    def with_headers(self) -> Menu:
        """Return the menu with headers counted as part of the sizes."""
        counted = tuple(replace(o, size=o.size + o.header, header=0) for o in self.options)
        return replace(self, options=counted)

    def undominated(self) -> list[int]:
        """Return the numbers of the options that no other one beats in size and loss, from small to large.

        Of options equal in both, the first listed counts.
        """
        order = sorted(
            range(len(self.options)), key=lambda i: (self.options[i].size, self.options[i].loss, i)
        )
        found: list[int] = []
        for number in order:
            if not found or self.options[number].loss < self.options[found[-1]].loss:
                found.append(number)
        return found


@dataclass(frozen=True)
class Alternative:
    """One family of formats that can be mixed in a model, and what it leaves fixed.

    Attributes:
        name: of the family.
        menus: of all groups.
        fixed: bytes of everything that no menu counts (embeddings, norms, their headers).
    """

    name: str
    menus: tuple[Menu, ...]
    fixed: int = 0

    @property
    def least(self) -> int:
        """Bytes of the smallest choice, with what is fixed."""
        return self.fixed + sum(menu.least for menu in self.menus)

    @property
    def most(self) -> int:
        """Bytes of the largest choice, with what is fixed."""
        return self.fixed + sum(menu.most for menu in self.menus)

    def with_headers(self) -> Alternative:
        """Return the alternative with headers counted as part of the sizes."""
        return replace(self, menus=tuple(menu.with_headers() for menu in self.menus))


@dataclass(frozen=True)
class Allocation:
    """A choice for every group, and how good it is known to be.

    Attributes:
        menus: in the order of their names.
        chosen: number of the option of each menu.
        bound: no choice within the budget has a smaller loss than this.
        greedy: loss of the greedy choice on convex hulls, the cross-check.
        status: "optimal"; "time limit" when the solver was stopped; "greedy" when it had found nothing by then.
        alternative: name of the family the menus came from.
        fixed: bytes outside the menus.
        downgrades: groups made smaller afterwards, because the file was larger than predicted.
    """

    menus: tuple[Menu, ...]
    chosen: tuple[int, ...]
    bound: float = 0.0
    greedy: float = math.inf
    status: str = "optimal"
    alternative: str = ""
    fixed: int = 0
    downgrades: tuple[str, ...] = ()

    @property
    def options(self) -> list[Option]:
        """The chosen option of each menu."""
        return [menu.options[number] for menu, number in zip(self.menus, self.chosen, strict=True)]

    @cached_property
    def size(self) -> int:
        """Bytes of all groups."""
        return sum(option.size for option in self.options)

    @cached_property
    def loss(self) -> float:
        """Predicted loss, the sum over all groups."""
        return math.fsum(option.loss for option in self.options)

    @property
    def gap(self) -> float:
        """How much smaller the loss could at most be, relative to it."""
        return max(0.0, 1 - self.bound / self.loss) if self.loss > 0 else 0.0

    @property
    def greedy_gap(self) -> float:
        """How much more the greedy choice loses, relative to it; infinity when it loses and this does not."""
        if self.greedy <= self.loss:
            return 0.0
        return self.greedy / self.loss - 1 if self.loss > 0 else math.inf

    @property
    def bits(self) -> float:
        """Bits per parameter of all groups; scales, zero points and kept groups are part of it."""
        parameters = sum(menu.parameters for menu in self.menus)
        return 8 * self.size / parameters if parameters else math.nan

    def by_group(self) -> dict[str, str]:
        """Return group -> name of its option."""
        return {menu.name: option.name for menu, option in zip(self.menus, self.options, strict=True)}

    def by_module(self) -> dict[str, str]:
        """Return module -> name of its group's option."""
        return {module: option.name
                for menu, option in zip(self.menus, self.options, strict=True) for module in menu.modules}  # fmt: skip

    def with_option(self, group: int, number: int, downgrade: bool = False) -> Allocation:
        """Return the allocation with one group changed."""
        chosen = (*self.chosen[:group], number, *self.chosen[group + 1 :])
        names = (*self.downgrades, self.menus[group].name) if downgrade else self.downgrades
        return replace(self, chosen=chosen, downgrades=names)

    def record(self) -> dict[str, Any]:
        """Return it as plain data for a plan file: equal allocations give equal data."""
        return {
            "alternative": self.alternative, "status": self.status, "gap": self.gap,
            "greedy_gap": self.greedy_gap if math.isfinite(self.greedy_gap) else None,
            "predicted_loss": self.loss, "bytes": self.size, "fixed_bytes": self.fixed,
            "bits": self.bits if math.isfinite(self.bits) else None, "downgrades": list(self.downgrades),
            "groups": [
                {
                    "name": menu.name, "modules": list(menu.modules), "format": option.name, "bytes": option.size,
                    "loss": option.loss, "losses": {o.name: o.loss for o in menu.options},
                    "sizes": {o.name: o.size for o in menu.options},
                }
                for menu, option in zip(self.menus, self.options, strict=True)
            ],
        }  # fmt: skip


def ordered(menus: Iterable[Menu]) -> tuple[Menu, ...]:
    """Return menus in the order of their names, so that a solution depends on nothing else.

    Raises:
        ValueError: none, or two of one name.
    """
    found = tuple(sorted(menus, key=lambda menu: menu.name))
    if not found or len({menu.name for menu in found}) != len(found):
        raise ValueError(f"{len(found)} groups with {len({menu.name for menu in found})} names")
    return found


def tied(name: str, members: Sequence[Menu]) -> Menu:
    """Return the menu of a group whose members must share a format: sizes and losses add up.

    Raises:
        InputError: E464 no format can store them all.
    """
    shared = [option.name for option in members[0].options
              if all(any(o.name == option.name for o in menu.options) for menu in members[1:])]  # fmt: skip
    if not shared:
        modules = ", ".join(module for menu in members for module in (menu.modules or (menu.name,)))
        raise InputError("E464", f"no format can store {modules} alike, and a program loads them only so",
                         help="leave them as they are, or choose a group size that divides their widths")  # fmt: skip
    options = []
    for wanted in shared:
        of = [option for menu in members for option in menu.options if option.name == wanted]
        options.append(
            Option(wanted, sum(o.size for o in of), math.fsum(o.loss for o in of), sum(o.header for o in of))
        )
    modules = tuple(module for menu in members for module in (menu.modules or (menu.name,)))
    return Menu(name, tuple(options), modules, sum(menu.parameters for menu in members))


def tie(menus: Sequence[Menu], group_of: Mapping[str, str]) -> list[Menu]:
    """Return the menus with those of one group tied; a menu that no group names stays alone.

    Args:
        menus: one for each module.
        group_of: menu name -> group name.
    """
    members: dict[str, list[Menu]] = {}
    for menu in menus:
        members.setdefault(group_of.get(menu.name, menu.name), []).append(menu)
    return [tied(name, of) for name, of in members.items()]


def monotone(menu: Menu) -> tuple[Menu, tuple[tuple[str, str], ...]]:
    """Return the menu with losses that never grow with the size, and where they did.

    Losses are measured and noisy. The nearest non-increasing ones in least squares replace them (pool adjacent
    violators), which unlike running minima does not turn noise into optimism.

    Returns:
        The menu, and pairs (smaller, larger) of neighbouring options where the larger one had lost more.
    """
    order = sorted(range(len(menu.options)), key=lambda i: (menu.options[i].size, -menu.options[i].loss, i))
    losses = [menu.options[i].loss for i in order]
    wrong = tuple((menu.options[order[k]].name, menu.options[order[k + 1]].name)
                  for k in range(len(order) - 1) if losses[k + 1] > losses[k])  # fmt: skip
    if not wrong:
        return menu, ()
    pools: list[tuple[float, int]] = []
    for loss in losses:
        pools.append((loss, 1))
        while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append(((a * n + b * m) / (n + m), n + m))
    smooth = np.repeat([value for value, _ in pools], [count for _, count in pools])
    options = list(menu.options)
    for position, number in enumerate(order):
        options[number] = replace(options[number], loss=float(smooth[position]))
    return replace(menu, options=tuple(options)), wrong


def too_small(what: str, least: str) -> UsageError:
    """Return the refusal of a target that no choice meets.

    Args:
        what: the target, as "a size of 10 bytes".
        least: what can be reached, as "12 bytes".
    """
    return UsageError("E462", f"{what} cannot be reached: the least that the formats allow is {least}",
                      help="raise the target, allow fewer bits, or leave fewer modules out")  # fmt: skip

"""The joint allocation: an expert count, and a type for every group of tensors, with the least predicted damage.

For one count this is a multiple-choice knapsack for every device. Its Lagrangian dual (one price of a byte per device)
bounds from below what any choice can reach; it screens all counts at once. What is left is filled greedily, options
that the bound excludes are dropped (reduced costs), and HiGHS solves the rest. Pure and deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reapc.errors import CannotBeDone
from reapc.units import format_bytes

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_STEPS = 44  # halvings of the logarithm of a byte's price
_SCREEN_AT = (10, 20)  # steps after which cases that cannot win are dropped
_PRICES = (-100.0, 40.0)  # powers of two, in nats per byte: from below any price that matters to above
_EXACT_ENOUGH = 1e-4  # a relative gap that needs no integer program
_MAX_PROGRAMS = 6  # integer programs solved at most; further cases keep the bound of the dual
_NODES = 100  # of one integer program: a limit in nodes is deterministic, one in seconds is not


@dataclass(frozen=True)
class Problem:
    """Cases (an expert count, a KV type) x groups x options; every group takes exactly one option.

    ``experts`` (cases,): what each case keeps; ``kv`` (cases,) the type of its KV cache, where that is chosen.
    ``fixed`` (cases,): its damage in nats whatever the types are (pruning and cache), and ``cache`` (cases,) the
    cache's part of that.
    ``bytes`` and ``damage`` (cases, groups, options): of the group in that type; an option that is not legal has
    infinite damage. ``device`` (cases, groups): where a group lies. ``capacity`` (cases, devices): bytes for these
    groups there.
    """

    experts: Ints
    fixed: Floats
    bytes: Ints
    damage: Floats
    device: Ints
    capacity: Ints
    kv: NDArray[np.str_] = field(default_factory=lambda: np.zeros(0, np.str_))
    cache: Floats = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not len(self.kv):
            object.__setattr__(self, "kv", np.full(len(self.experts), ""))
            object.__setattr__(self, "cache", np.zeros(len(self.experts)))

    def take(self, cases: Any) -> Problem:
        """The problem with these cases only."""
        return Problem(
            self.experts[cases], self.fixed[cases], self.bytes[cases], self.damage[cases], self.device[cases],
            self.capacity[cases], self.kv[cases], self.cache[cases],
        )  # fmt: skip

    def with_caches(self, losses: Mapping[str, float], capacity: Callable[[str], Ints]) -> Problem:
        """Every case once for each KV type of ``losses`` (nats), with the ``capacity`` (cases, devices) that is left
        beside such a cache."""
        many, cases = len(losses), len(self.experts)
        once = np.tile(np.arange(cases), many)
        costs = np.repeat(np.array(list(losses.values()), np.float64), cases)
        return replace(
            self.take(once), fixed=self.fixed[once] + costs, cache=costs, kv=np.repeat(list(losses), cases),
            capacity=np.concatenate([capacity(kind) for kind in losses]),
        )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """One case with an option for every group. ``lower_bound``: no choice of this case has less damage. ``kv``,
    ``cache``: the type of its KV cache where that was chosen, and what it costs (in ``fixed`` already)."""

    case: int
    experts: int
    options: Ints
    damage: float
    fixed: float
    lower_bound: float
    device_bytes: Ints
    proved_by: str = "Lagrangian dual"
    kv: str = ""
    cache: float = 0.0

    @property
    def bytes(self) -> int:
        return int(self.device_bytes.sum())


@dataclass(frozen=True)
class Allocation:
    """The best choice; ``lower_bound`` holds for every case, so the best possible is at most ``gap`` nats better."""

    best: Choice
    lower_bound: float
    runners_up: tuple[Choice, ...] = field(default=())
    cases: int = 0
    infeasible: int = 0

    @property
    def gap(self) -> float:
        return max(0.0, self.best.damage - self.lower_bound)

    @property
    def relative_gap(self) -> float:
        return self.gap / self.best.damage if self.best.damage > 0 else 0.0


def allocate(problem: Problem, runners_up: int = 3) -> Allocation:
    """The choice with the least damage over all cases. CannotBeDone, with the least bytes, where nothing fits."""
    legal = np.isfinite(problem.damage)
    if not legal.any(axis=2).all():
        raise ValueError("a group without a legal option")
    least = _on_devices(problem, np.where(legal, problem.bytes, np.iinfo(np.int64).max).min(axis=2))
    fits = (least <= problem.capacity).all(axis=1)
    if not fits.any():
        raise _too_small(problem, least)
    places = np.flatnonzero(fits)
    solved = _screened(problem.take(places))
    order = sorted(solved, key=lambda choice: (choice.lower_bound, choice.case))
    found: dict[int, Choice] = {choice.case: choice for choice in solved}
    best: Choice = min(solved, key=_rank)
    for count, choice in enumerate(order):
        if choice.lower_bound >= best.damage or count >= _MAX_PROGRAMS:
            break
        found[choice.case] = exact = _exact(problem.take(places), choice)
        best = min(best, exact, key=_rank)
    choices = [
        _plain(choice, int(places[choice.case]), choice.proved_by) for choice in sorted(found.values(), key=_rank)
    ]
    bound = min(best.damage, *(choice.lower_bound for choice in choices))
    return Allocation(choices[0], bound, tuple(choices[1 : 1 + runners_up]), len(fits), int((~fits).sum()))


def _rank(choice: Choice) -> tuple[float, int, int]:
    return (choice.damage, -choice.experts, choice.bytes)


def _plain(choice: Choice, case: int, proved_by: str) -> Choice:
    """The choice as it is given out: without prices."""
    values = {item.name: getattr(choice, item.name) for item in fields(Choice)}
    return Choice(**values | {"case": case, "proved_by": proved_by})


def _too_small(problem: Problem, least: Ints) -> CannotBeDone:
    """Says what the smallest case would need."""
    lack = np.maximum(least - problem.capacity, 0)
    case = int(lack.sum(axis=1).argmin())
    device = int(lack[case].argmax())
    needs, has = int(least[case, device]), int(problem.capacity[case, device])
    where = f" on device {device}" if problem.capacity.shape[1] > 1 else ""
    return CannotBeDone(
        f"nothing fits: with {problem.experts[case]} experts and every tensor in its smallest type the weights need "
        f"{needs} bytes ({format_bytes(needs)}){where}, and the budget there is {has} ({format_bytes(has)})",
        hint="allow more memory, more pruning (max_ratio), or smaller types",
    )


def _on_devices(problem: Problem, amounts: Any) -> Any:
    """Sums (cases, devices) of amounts (cases, groups)."""
    devices = problem.capacity.shape[1]
    if devices == 1:
        return amounts.sum(axis=1, keepdims=True)
    return np.stack([np.where(problem.device == d, amounts, 0).sum(axis=1) for d in range(devices)], axis=1)


def _screened(problem: Problem) -> list[_Priced]:
    """A feasible choice and a bound for every case that could win; cases that cannot keep what they had when they were
    dropped, filled no further. The case numbers are those of ``problem``."""
    cases, devices = problem.capacity.shape
    low = np.full((cases, devices), _PRICES[0])
    high = np.full((cases, devices), _PRICES[1])
    bound = np.full((cases, devices), -np.inf)  # the best of the dual, by device
    price = np.zeros((cases, devices))  # where that was
    options = _cheapest(problem, 2.0**high)[0]
    alive: Ints = np.arange(cases)
    now = problem

    def tried(level: Floats) -> tuple[Ints, Ints]:
        """Choices at these prices and their bytes; the dual's bounds are noted."""
        chosen, cost = _cheapest(now, level)
        dual = _on_devices(now, cost) - level * now.capacity
        better = dual > bound[alive]
        bound[alive] = np.where(better, dual, bound[alive])
        price[alive] = np.where(better, level, price[alive])
        return chosen, _on_devices(now, np.take_along_axis(now.bytes, chosen[:, :, None], 2)[:, :, 0])

    # A budget that the least damage fits into has the price 0.
    chosen, size = tried(np.zeros((cases, devices)))
    ample = size <= problem.capacity
    options = np.where(np.take_along_axis(ample, problem.device, 1), chosen, options)
    high[ample] = low[ample]
    for step in range(_STEPS):
        middle = (low[alive] + high[alive]) / 2
        chosen, size = tried(np.where(ample[alive], 0.0, 2.0**middle))
        inside = size <= now.capacity
        low[alive] = np.where(inside, low[alive], middle)
        high[alive] = np.where(inside, middle, high[alive])
        options[alive] = np.where(np.take_along_axis(inside, now.device, 1), chosen, options[alive])
        if step in _SCREEN_AT:
            total = problem.fixed + _damage(problem, options)
            alive = np.flatnonzero(problem.fixed + bound.sum(axis=1) <= total.min())
            now = problem.take(alive)
    result = []
    living = set(alive.tolist())
    for case in range(cases):
        options_here = options[case]
        if case in living:
            options_here = _filled(problem, case, options_here)
        result.append(_choice(problem, case, options_here, bound[case], price[case]))
    return result


@dataclass(frozen=True)
class _Priced(Choice):
    """A choice with the dual's bound and price of every device."""

    bounds: Floats = field(default_factory=lambda: np.zeros(0))
    prices: Floats = field(default_factory=lambda: np.zeros(0))


def _choice(problem: Problem, case: int, options: Ints, bounds: Floats, prices: Floats) -> _Priced:
    one = problem.take(np.array([case]))
    damage = float(_damage(one, options[None])[0])
    size = _on_devices(one, np.take_along_axis(one.bytes, options[None, :, None], 2)[:, :, 0])[0]
    fixed = float(problem.fixed[case])
    return _Priced(
        case, int(problem.experts[case]), options, fixed + damage, fixed,
        min(fixed + float(bounds.sum()), fixed + damage), size, bounds=bounds, prices=prices,
        kv=str(problem.kv[case]), cache=float(problem.cache[case]),
    )  # fmt: skip


def _damage(problem: Problem, options: Ints) -> Floats:
    total: Floats = np.take_along_axis(problem.damage, options[:, :, None], 2)[:, :, 0].sum(axis=1)
    return total


def _cheapest(problem: Problem, price: Floats) -> tuple[Ints, Floats]:
    """For every group the option of least damage + price x bytes, and that cost: (cases, groups) each."""
    cost = problem.bytes * np.take_along_axis(price, problem.device, 1)[:, :, None]
    cost += problem.damage
    chosen = cost.argmin(axis=2)
    return chosen, np.take_along_axis(cost, chosen[:, :, None], 2)[:, :, 0]


def _filled(problem: Problem, case: int, options: Ints) -> Ints:
    """The choice with what is left of every budget spent: the step that saves most per byte, again and again."""
    options = options.copy()
    sizes, damage, device = problem.bytes[case], problem.damage[case], problem.device[case]
    rows = np.arange(len(options))
    room = problem.capacity[case] - np.bincount(
        device, weights=sizes[rows, options], minlength=problem.capacity.shape[1]
    ).astype(np.int64)
    while True:
        gain = damage[rows, options][:, None] - damage
        extra = sizes - sizes[rows, options][:, None]
        possible = (gain > 0) & (extra <= room[device][:, None])
        if not possible.any():
            return options
        worth = np.where(possible, gain / np.maximum(extra, 1e-9), -np.inf)
        group, option = np.unravel_index(int(worth.argmax()), worth.shape)
        room[device[group]] -= extra[group, option]
        options[group] = option


def _exact(problem: Problem, choice: _Priced) -> Choice:
    """The case's best choice, or a better bound: HiGHS on the options that the dual's bound does not exclude."""
    case, options, bounds = choice.case, choice.options.copy(), choice.bounds.copy()
    sizes, damage, device = problem.bytes[case], problem.damage[case], problem.device[case]
    proved = choice.proved_by
    for place in range(problem.capacity.shape[1]):
        groups = np.flatnonzero(device == place)
        if not len(groups):
            continue
        now = float(damage[groups, options[groups]].sum())
        gap = now - bounds[place]
        if gap <= _EXACT_ENOUGH * max(now, 1e-300):
            continue
        found, bounds[place] = _program(
            sizes[groups], damage[groups], int(problem.capacity[case, place]), options[groups],
            float(bounds[place]), float(choice.prices[place]),
        )  # fmt: skip
        options[groups] = found
        proved = "HiGHS"
    exact = _choice(problem, case, options, bounds, choice.prices)
    return _plain(exact, case, proved)


def _program(
    sizes: Ints, damage: Floats, capacity: int, options: Ints, bound: float, price: float
) -> tuple[Ints, float]:
    """One device's integer program: (a choice no worse than ``options``, a bound no lower than ``bound``).

    Groups with the same numbers (layers of one kind, under the prior) are one row that is chosen several times. The
    objective is in units of the gap, so that HiGHS's absolute tolerances are far below it. An option whose reduced cost
    is above the gap cannot be part of a better choice."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    rows = np.arange(len(options))
    now = float(damage[rows, options].sum())
    gap = now - bound
    first, kind, times = _alike(sizes, damage)
    chosen = np.zeros((len(first), sizes.shape[1]), np.int64)
    np.add.at(chosen, (kind, options), 1)
    size, nats = sizes[first], damage[first]
    cost = nats + price * size
    reduced = cost - cost.min(axis=1, keepdims=True)
    row, option = np.nonzero((reduced <= gap * (1 + 1e-9)) | (chosen > 0))
    base = np.full(len(first), np.iinfo(np.int64).max)
    np.minimum.at(base, row, size[row, option])
    extra = size[row, option] - base[row]
    unit = int(np.gcd.reduce(extra)) or 1
    room = (capacity - int((base * times).sum())) // unit
    weights = (nats[row, option] - nats[row].min(axis=1)) / gap
    offset = float((nats.min(axis=1) * times).sum())
    result = milp(
        weights,
        integrality=np.ones(len(row)),
        bounds=Bounds(0, times[row]),
        constraints=[
            LinearConstraint(
                csr_array((np.ones(len(row)), (row, np.arange(len(row)))), shape=(len(first), len(row))), times, times
            ),
            LinearConstraint(csr_array((extra // unit)[None].astype(np.float64)), -np.inf, float(room)),
        ],
        options={"node_limit": _NODES},
    )
    better = options
    if result.x is not None:
        found = _dealt(np.rint(result.x).astype(np.int64), row, option, kind)
        if int(sizes[rows, found].sum()) <= capacity and float(damage[rows, found].sum()) < now:
            better = found
    reached = float(damage[rows, better].sum())
    dual = getattr(result, "mip_dual_bound", None)
    if dual is not None and np.isfinite(dual):
        bound = max(bound, min(reached, offset + gap * (float(dual) - 1e-6)))
    return better, bound


def _alike(sizes: Ints, damage: Floats) -> tuple[Ints, Ints, Ints]:
    """Groups with equal rows: the first of each kind, the kind of each group, and how many a kind has."""
    kinds: dict[bytes, int] = {}
    kind = np.array(
        [kinds.setdefault(s.tobytes() + d.tobytes(), len(kinds)) for s, d in zip(sizes, damage, strict=True)]
    )
    first = np.array([int(np.flatnonzero(kind == number)[0]) for number in range(len(kinds))])
    return first, kind, np.bincount(kind)


def _dealt(counts: Ints, row: Ints, option: Ints, kind: Ints) -> Ints:
    """The option of every group, where each kind takes each of its options ``counts`` times: in the groups' order."""
    queues = {number: np.repeat(option[row == number], counts[row == number]) for number in range(int(kind.max()) + 1)}
    taken = dict.fromkeys(queues, 0)
    result = np.empty(len(kind), np.int64)
    for group, number in enumerate(kind.tolist()):
        result[group] = queues[number][taken[number]]
        taken[number] += 1
    return result

"""Latency tables from made-up times: recovered costs, interpolation, correction, files, refusals."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from surgeon.errors import EnvironmentFault, InputError, UsageError
from surgeon.measure.conditions import Conditions
from surgeon.measure.correction import aim, fit_correction
from surgeon.measure.differencing import MOST_LEVELS, Levels, Timed, assemble, time_models
from surgeon.measure.environment import Environment
from surgeon.measure.models import Variant, shape_of
from surgeon.measure.table import LatencyTable, identity, monotone
from surgeon.measure.timing import Estimate
from surgeon.measure.workload import Workload
from surgeon.structure.cut import LayerShape
from surgeon.structure.parts import Attention, Ffn, Output, Structure

FULL = LayerShape(8, 4, 64, 1024)
LAYERS = 12
HERE = Environment("cpu", "Some CPU", 1, "float32", "2.13", "5.23", "sdpa", "CPU time of the thread")
CONFIG = {"model_type": "llama", "hidden_size": 512, "vocab_size": 1000, "num_hidden_layers": LAYERS}


def attention_cost(groups: float, each: float = 2) -> float:
    return 0.004 + 0.003 * groups + 0.001 * groups * each if groups else 0.0


def ffn_cost(width: float) -> float:
    return 0.002 + 1e-5 * width if width else 0.0


REST, CALLS = 0.05, 0.001


def cost(variant: Variant) -> float:
    shape = variant.shape
    each = shape.heads / shape.groups if shape.groups else 0
    return REST + variant.layers * (CALLS + attention_cost(shape.groups, each) + ffn_cost(shape.ffn))


class Machine:
    """Models of known cost; nothing is built. ``refused`` cannot be."""

    deep, short, full = 4, 2, FULL

    def __init__(self, room: int = 100, refused=()) -> None:
        self._room, self.refused, self.built = room, set(refused), []

    def room(self) -> int:
        return self._room

    def sample(self, variant: Variant):
        if variant.shape in self.refused:
            raise InputError("E327", "nothing loads it")
        self.built.append(variant)
        rounds = itertools.count()
        return lambda: cost(variant) * (1 + 0.5 * math.sin(next(rounds)))


LEVELS = Levels(((6, 3), (4, 2), (2, 1), (0, 0)), (768, 512, 256, 64, 0))


def table_of(machine: Machine | None = None, levels: Levels = LEVELS) -> LatencyTable:
    timed, _ = time_models(machine or Machine(), levels, Conditions(repeat=9, threads=1))
    return assemble(timed, FULL, LAYERS, Workload(), HERE, identity(CONFIG))


def test_known_costs_are_recovered_exactly_by_differences():
    table = table_of()
    scale = table.dense / (
        REST + LAYERS * (CALLS + attention_cost(4) + ffn_cost(1024))
    )  # the machine's speed
    assert table.rest / scale == pytest.approx(REST, rel=1e-9)
    for heads, groups in table.attention:
        assert table.attention[heads, groups] / scale == pytest.approx(
            attention_cost(groups) + CALLS / 2, rel=1e-9
        )
    for width, seconds in table.ffn.items():
        assert seconds / scale == pytest.approx(ffn_cost(width) + CALLS / 2, rel=1e-9)
    plan = [LayerShape(4, 2, 64, 256)] * 5 + [LayerShape(8, 4, 64, 64), LayerShape(0, 0, 0, 1024)]
    true = (REST + LAYERS * (CALLS + attention_cost(4) + ffn_cost(1024))) / (
        REST + 7 * CALLS + 5 * (attention_cost(2) + ffn_cost(256)) + attention_cost(4) + ffn_cost(64) + ffn_cost(1024)
    )  # fmt: skip
    assert table.speedup(plan) == pytest.approx(true, rel=1e-9)
    assert table.speedup([FULL] * LAYERS) == 1.0
    assert sum(table.shares().values()) == pytest.approx(1)


@pytest.mark.parametrize("room", [1, 3])
def test_groups_that_fit_into_memory_give_the_same_table(room):
    class Constant(Machine):
        def sample(self, variant):
            super().sample(variant)
            return lambda: cost(variant)

    machine = Constant(room)
    assert table_of(machine).document() == table_of(Constant()).document()
    assert machine.built[0] == Variant(4, FULL) and len(machine.built) == 11


def test_heads_of_every_group_are_a_row_of_their_own():
    table = table_of(levels=Levels(((4, 4), (4, 2), (0, 0)), (512, 0)))
    assert table.attention[4, 4] != table.attention[4, 2]  # as many heads, but of more groups
    assert table.attention_seconds(6, 3) == pytest.approx((table.attention[8, 4] + table.attention[4, 2]) / 2)
    with pytest.raises(UsageError, match="6 heads with 2"):
        table.attention_seconds(6, 2)


def test_a_nearly_removed_module_costs_more_than_a_removed_one():
    """Costs jump at 0: below the smallest measured size the line of the sizes above goes on."""
    table = table_of()
    scale = table.rest / REST
    for width in (1, 8, 40):
        assert table.ffn_seconds(width) / scale == pytest.approx(ffn_cost(width) + CALLS / 2)
    assert table.ffn_seconds(0) < 0.25 * table.ffn_seconds(1)
    few = table_of(levels=Levels(((4, 2), (0, 0)), (512, 0)))
    assert few.attention_seconds(2, 1) / few.rest * REST == pytest.approx(attention_cost(1) + CALLS / 2)
    steep = replace(table, ffn={0: 0.5, 64: 1.0, 128: 9.0, 1024: 10.0})
    assert steep.ffn_seconds(1) == 0.5  # never below having none


def test_what_nothing_loads_is_left_out_and_named():
    gone = [LayerShape(0, 0, 0, 1024), LayerShape(8, 4, 64, 0)]
    timed, left_out = time_models(Machine(refused=gone), LEVELS, Conditions(repeat=9, threads=1))
    assert left_out == ["0 heads with 0 key/value heads", "an FFN of 0 channels"]
    table = assemble(timed, FULL, LAYERS, Workload(), HERE, "")
    exact = table_of()
    kept = [LayerShape(4, 2, 64, 256)] * 9
    assert table.speedup(kept) == pytest.approx(exact.speedup(kept), rel=1e-9)  # only the split is a guess
    for call in (
        lambda: table.ffn_seconds(0),
        lambda: table.attention_seconds(0, 0),
        lambda: table.ffn_seconds(1025),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.code == "E284"
    with pytest.raises(InputError):
        time_models(Machine(refused=[FULL]), LEVELS, Conditions(repeat=9, threads=1))


def test_only_one_kind_of_level_still_adds_up():
    exact = table_of()
    for levels, shape in (
        (Levels(ffn=LEVELS.ffn), LayerShape(8, 4, 64, 300)),
        (Levels(attention=LEVELS.attention), LayerShape(4, 2, 64, 1024)),
    ):
        table = table_of(levels=levels)
        assert table.speedup([shape] * 7) == pytest.approx(exact.speedup([shape] * 7), rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_monotone_is_the_weighted_least_squares_fit(seed):
    """Against the closed form: fitted_i = max over j <= i of min over k >= i of the mean of j..k."""
    rng = np.random.default_rng(seed)
    sizes = list(range(0, 8 * int(rng.integers(2, 9)), 8))
    row = {
        s: float(v)
        for s, v in zip(
            sizes, np.abs(rng.normal(1, 0.5, len(sizes))) + 0.02 * np.arange(len(sizes)), strict=True
        )
    }
    spread = {s: float(v) for s, v in zip(sizes, rng.uniform(0.1, 1, len(sizes)), strict=True)}
    weight = np.array([1 / spread[s] ** 2 for s in sizes])
    values = np.array([row[s] for s in sizes])

    def mean(j: int, k: int) -> float:
        return float((weight * values)[j : k + 1].sum() / weight[j : k + 1].sum())

    n = len(sizes)
    expected = [max(min(mean(j, k) for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
    found = monotone(row, spread)
    assert [found[s] for s in sizes] == pytest.approx(expected, rel=1e-12)


def test_interpolated_times_never_fall_with_size_and_hit_the_measured_ones():
    timed, _ = time_models(Machine(), LEVELS, Conditions(repeat=9, threads=1))
    rng = np.random.default_rng(1)

    def noisy(e: Estimate) -> Estimate:
        value = e.value * (1 + 0.05 * rng.standard_normal())
        return Estimate(value, value * 0.95, value * 1.05, 9)

    timed = replace(
        timed,
        attention={k: noisy(e) for k, e in timed.attention.items()},
        ffn={k: noisy(e) for k, e in timed.ffn.items()},
    )
    table = assemble(timed, FULL, LAYERS, Workload(), HERE, "")
    times = [table.ffn_seconds(width) for width in range(1025)]
    assert all(a <= b for a, b in itertools.pairwise(times)) and times[0] >= 0
    assert [times[width] for width in table.ffn] == list(table.ffn.values())
    heads = [table.attention_seconds(2 * g, g) for g in range(5)]
    assert heads == sorted(heads)


def test_uncertainty_is_what_noise_in_the_ratios_does_to_the_prediction():
    """Against 4000 tables from perturbed ratios."""
    timed, _ = time_models(Machine(), LEVELS, Conditions(repeat=9, threads=1))
    sigma = 0.002
    rng = np.random.default_rng(5)
    wide = lambda e: replace(e, low=e.value - 1.96 * sigma, high=e.value + 1.96 * sigma)  # noqa: E731
    moved = lambda e: replace(e, value=e.value + sigma * float(rng.standard_normal()))  # noqa: E731

    def table(change) -> LatencyTable:
        changed = replace(timed, few=change(timed.few), attention={k: change(e) for k, e in timed.attention.items()},
                          ffn={k: change(e) for k, e in timed.ffn.items()})  # fmt: skip
        return assemble(changed, FULL, LAYERS, Workload(), HERE, "")

    plan = [LayerShape(4, 2, 64, 512)] * 6 + [LayerShape(8, 4, 64, 256)] * 3
    expected = 1.96 * np.std([table(moved).speedup(plan) for _ in range(1500)])
    assert table(wide).uncertainty(plan) == pytest.approx(expected, rel=0.1)
    assert table_of().uncertainty(plan) < 1e-9


def test_rest_below_zero_is_noise():
    timed = Timed(4, 2, 1.0, Estimate(0.45, 0.4, 0.5, 9), {}, {})
    table = assemble(timed, FULL, LAYERS, Workload(), HERE, "")
    assert table.rest == 0 and table.dense == pytest.approx(LAYERS / 4) and "counts as 0" in table.notes[0]


# ---- correction by models that were built ------------------------------------------------------------

PLANS = [
    [LayerShape(8, 4, 64, 256)] * 12, [LayerShape(2, 1, 64, 1024)] * 12, [FULL] * 6,
    [LayerShape(4, 2, 64, 512)] * 9, [LayerShape(6, 3, 64, 64)] * 5 + [FULL] * 3,
]  # fmt: skip


def parts(table: LatencyTable) -> np.ndarray:
    return np.asarray(table.parts([FULL] * LAYERS)) / np.asarray(table.corrected().parts([FULL] * LAYERS))


def test_planted_corrections_are_recovered():
    table = table_of()
    true = table.corrected(attention=1.3, ffn=0.8, fixed=0.05)
    history = [(plan, true.speedup(plan)) for plan in PLANS]
    found = table.corrected(**fit_correction(table, history, noise=1e-8))
    # Speedups say nothing about the common scale; all ratios between the parts are recovered.
    assert parts(found) / parts(found)[0] == pytest.approx(parts(true) / parts(true)[0], rel=1e-4)
    fitted = table.corrected(
        **fit_correction(table, history)
    )  # with the usual noise: predictions of unseen plans
    unseen = [LayerShape(2, 1, 64, 1024)] * 7 + [LayerShape(4, 2, 64, 768)] * 2
    assert (
        abs(fitted.speedup(unseen) / true.speedup(unseen) - 1)
        < 0.01
        < abs(table.speedup(unseen) / true.speedup(unseen) - 1)
    )
    # Corrections replace each other: fitting on a corrected table is fitting on the measured one.
    assert fit_correction(fitted, history) == fit_correction(table, history)


@pytest.mark.parametrize("rest", [0.05, 0.0])
def test_no_other_correction_within_bounds_explains_the_measurements_better(rest):
    """Against random search around the solution, with the loss written down from speedups alone."""
    table = replace(table_of(), rest=rest)
    rng = np.random.default_rng(2)
    history = [
        (plan, table.speedup(plan) * float(np.exp(0.05 * rng.standard_normal()))) for plan in PLANS[:3]
    ]
    floor = -table.rest / table.dense

    def loss(a: float, f: float, c: float) -> float:
        changed = table.corrected(a, f, c)
        errors = [math.log(changed.speedup(plan) / s) / 0.005 for plan, s in history]
        return sum(e * e for e in errors) + ((a - 1) / 0.1) ** 2 + ((f - 1) / 0.1) ** 2 + (c / 0.05) ** 2

    found = fit_correction(table, history)
    best = loss(**{"a": found["attention"], "f": found["ffn"], "c": found["fixed"]})
    assert best < loss(1, 1, 0)
    for _ in range(400):
        a, f, c = np.array(list(found.values())) + 10 ** rng.uniform(-4, -1) * rng.standard_normal(3)
        assert loss(float(a), float(f), max(floor, float(c))) >= best - 1e-9


@pytest.mark.parametrize("wrong", [0.85, 0.95, 1.1])
@pytest.mark.parametrize("plan", PLANS[:4])
def test_one_model_corrects_its_own_prediction_and_leaves_others_sane(wrong, plan):
    table = table_of()
    measured = wrong * table.speedup(plan)
    after = table.corrected(**fit_correction(table, [(plan, measured)]))
    assert abs(after.speedup(plan) / measured - 1) < 0.4 * abs(1 / wrong - 1)
    for other in PLANS:  # whichever way one plan was wrong, no other prediction runs away
        assert abs(after.speedup(other) / table.speedup(other) - 1) < 3 * abs(wrong - 1)
    assert after.speedup([FULL] * LAYERS) == 1


def test_a_rest_of_nothing_does_not_go_below():
    table = replace(table_of(), rest=0.0)
    plan = PLANS[3]
    found = fit_correction(table, [(plan, 1.1 * table.speedup(plan))])
    assert found["fixed"] == 0 and table.corrected(**found).parts([])[2] == 0
    assert table.speedup(plan) < table.corrected(**found).speedup(plan)


@pytest.mark.parametrize("wrong", [0.85, 1.1])
def test_the_aim_makes_the_nearest_model_exact(wrong):
    table = replace(table_of(), rest=0.0)
    history = [(plan, wrong * table.speedup(plan)) for plan in (PLANS[3], PLANS[1])]
    fitted = table.corrected(**fit_correction(table, history))
    plan, measured = history[0]
    assert aim(fitted, history, measured) == pytest.approx(fitted.speedup(plan))
    assert aim(fitted, history, 1.02 * measured) == pytest.approx(1.02 * fitted.speedup(plan))
    assert aim(table, [], 1.5) == 1.5


def test_without_models_or_error_nothing_is_corrected():
    table = table_of()
    for history in ([], [(plan, table.speedup(plan)) for plan in PLANS]):
        assert fit_correction(table, history) == pytest.approx(
            {"attention": 1, "ffn": 1, "fixed": 0}, abs=1e-9
        )
    absurd = fit_correction(table, [(PLANS[3], 100.0)])
    assert all(0.5 <= absurd[k] <= 2 for k in ("attention", "ffn"))


# ---- levels ------------------------------------------------------------------------------------------


def structure(heads: int = 8, groups: int = 4, width: int = 1024, layers: int = 3, **missing) -> Structure:
    attention = tuple(Attention(i, heads, groups, 64, Output("o", 1, None), (), ()) for i in range(layers))
    ffn = tuple(
        None if i in missing.get("no_ffn", ()) else Ffn(i, width, Output("d", 1, None), ())
        for i in range(layers)
    )
    return Structure("llama", "model.layers.", attention, ffn, 512)


def test_levels_are_few_spread_and_legal():
    found = Levels.of(structure(64, 32, 14336), multiple=128)
    assert len(found.ffn) == MOST_LEVELS - 1 == len(found.attention)
    assert found.ffn[-2] == 896 and found.attention[-2] == (4, 2)
    assert all(w % 128 == 0 for w in found.ffn) and found.ffn[-1] == 0 and found.attention[-1] == (0, 0)
    assert all(h == 2 * g for h, g in found.attention)
    assert Levels.of(structure()).attention == ((6, 3), (4, 2), (2, 1), (0, 0))
    assert Levels.of(structure(), attention="heads").attention == ((4, 4), (0, 0))
    assert Levels.of(structure(8, 1), attention="groups").attention == ((0, 0),)
    assert Levels.of(structure(), attention=None, ffn=False) == Levels()
    assert Levels.of(structure(width=5)).ffn == (4, 3, 2, 1, 0)
    assert Levels.of(structure(width=64), multiple=32).ffn == (32, 0)
    assert Levels.of(structure(width=64), multiple=128).ffn == (0,)


def test_layers_of_several_kinds_are_refused():
    with pytest.raises(UsageError) as caught:
        shape_of(structure(no_ffn={0}))
    assert caught.value.code == "E284"


# ---- files and refusals ------------------------------------------------------------------------------


def test_saved_tables_are_read_back_whole(tmp_path):
    table = replace(table_of(), notes=("a note",)).corrected(1.1, 0.9, 0.02)
    table.save(tmp_path / "t.json")
    again = LatencyTable.load(
        tmp_path / "t.json",
        HERE,
        {**CONFIG, "torch_dtype": "float32", "eos_token_id": 2},
        workload=Workload(),
    )
    assert again == table and again.speedup(PLANS[0]) == table.speedup(PLANS[0])
    table.save(tmp_path / "u.json")
    assert (tmp_path / "t.json").read_bytes() == (tmp_path / "u.json").read_bytes()


@pytest.mark.parametrize(
    ("key", "value"),
    [("device", "cuda"), ("device_name", "Another CPU"), ("threads", 4), ("dtype", "bfloat16"), ("torch", "2.14"),
     ("transformers", "5.24"), ("attention", "eager"), ("clock", "wall clock")],
)  # fmt: skip
def test_J7_a_table_of_another_environment_is_refused(tmp_path, key, value):
    file = tmp_path / "t.json"
    table_of().save(file)
    content = json.loads(file.read_text())
    content["environment"][key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(EnvironmentFault) as caught:
        LatencyTable.load(file, HERE)
    assert caught.value.code == "E516" and caught.value.exit_code == 5
    assert f"{value} there, {getattr(HERE, key)} here" in caught.value.message
    assert "--table-anyway" in str(caught.value.help) and str(file) in str(caught.value.where)
    allowed = LatencyTable.load(file, HERE, table_anyway=True)
    assert "used anyway" in allowed.notes[-1] and allowed.speedup(PLANS[0]) == table_of().speedup(PLANS[0])


def test_a_table_of_another_model_or_workload_is_refused(tmp_path):
    table_of().save(tmp_path / "t.json")
    for kwargs in ({"config": {**CONFIG, "hidden_size": 1024}}, {"workload": Workload("prefill")}):
        with pytest.raises(UsageError) as caught:
            LatencyTable.load(tmp_path / "t.json", **kwargs, table_anyway=True)
        assert caught.value.code == "E283"


def _set(content: dict, path: str, value: object) -> dict:
    *parents, last = path.split(".")
    place = content
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [("kind", "x"), ("schema", 2), ("seconds.rest", None), ("seconds.rest", "fast"), ("seconds.rest", -1), ("full", []), ("layers", None),
     ("correction", [1, 1]), ("correction", [1, 1, 1e9]), ("workload.mode", "x"), ("environment.threads", None), ("seconds.ffn", [{"width": 3}]), ("seconds.attention", 7)],
)  # fmt: skip
def test_damaged_tables_are_refused(tmp_path, path, value):
    content = _set(table_of().document(), path, value)
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(UsageError) as caught:
        LatencyTable.load(tmp_path / "t.json")
    assert caught.value.code in ("E280", "E283")
    with pytest.raises(UsageError, match="there is no latency table"):
        LatencyTable.load(tmp_path / "absent.json")


def test_J6_unreachable_targets_are_refused_with_what_is_reachable():
    table = table_of()
    smallest = LayerShape(2, 1, 64, 64)
    most = table.speedup([smallest] * 2)
    table.require(most, smallest)
    with pytest.raises(UsageError) as caught:
        table.require(most * 1.01, smallest)
    error = caught.value
    assert error.code == "E282" and error.exit_code == 2
    assert f"at most {math.floor(100 * most) / 100:.2f}" in error.message
    for share in table.shares().values():
        assert f"{share:.0%}" in error.message
    assert "batch 1" in error.message and "from 1 to" in str(error.help)
    with pytest.raises(UsageError):
        table.require(most, smallest, layers=3)
    for target in (1.0, 0.5, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="no speedup"):
            table.require(target, smallest)

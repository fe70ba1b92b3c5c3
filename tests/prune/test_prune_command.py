"""`surgeon prune` as a user runs it, on tiny models and a machine whose times are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pruning_runs as runs
import pytest

SHORT = ("--samples", 12, "--sequence-length", 64)


@pytest.fixture
def machine(monkeypatch):
    return runs.install(monkeypatch, runs.Machine())


@pytest.fixture
def text(scratch):
    return runs.text(scratch / "cal.jsonl")


@pytest.fixture
def model(scratch):
    return runs.small(scratch / "model")


@pytest.fixture
def prune(capsys, text):
    def run(*arguments, calibration=True):
        given = ("--calibration", text) if calibration else ()
        return runs.command(capsys, "prune", *arguments, *SHORT, *given)

    return run


@pytest.mark.slow
def test_the_line_of_the_contract_works_inside_a_model_folder(capsys, model, machine, monkeypatch):
    monkeypatch.chdir(model)
    before = runs.snapshot(model)
    ran = runs.command(capsys, "prune", "--target-speedup", "1.5")
    assert ran.code == 0, ran.err
    result = model.parent / "model-pruned"
    assert f"wrote     {result}" in ran.out and "text that comes with surgeon" in ran.err
    assert runs.snapshot(model) == before
    assert not (model.parent / "model-pruned.work").exists()
    assert machine.tables == 1 and machine.timed[-1][1] == pytest.approx(1.5, rel=0.03)


def document(ran) -> dict:
    """Return the JSON document of a run that succeeded."""
    assert ran.code == 0, ran.err
    return ran.document


def member(ran) -> dict:
    (found,) = document(ran)["members"]
    return found


# ---- the feedback loop ---------------------------------------------------------------------------


def test_a_table_that_is_wrong_is_corrected_until_the_target_is_met(prune, model, scratch, monkeypatch):
    machine = runs.install(monkeypatch, runs.Machine(truth=(1.0, 1.25, 1.0)))
    made = member(prune(model, "-o", scratch / "out", "--target-speedup", 1.5, "--round-to", 1, "--json"))
    assert len(machine.timed) > 1
    first, last = machine.timed[0][1], machine.timed[-1][1]
    assert abs(first / 1.5 - 1) > 0.03 >= abs(last / 1.5 - 1)
    assert made["speedup"]["verdict"] == "met" and made["speedup"]["measured"] == pytest.approx(last)
    assert machine.seconds(model) / machine.seconds(scratch / "out") == pytest.approx(last)


def test_what_is_published_is_the_nearest_model_also_when_it_was_not_the_last(
    prune, model, scratch, monkeypatch
):
    machine = runs.install(monkeypatch, runs.Machine())
    ratios = iter([1.62, 1.30, 1.80, 1.25])
    honest = machine.speedup

    def lying(dense, pruned, *rest, **more):
        from dataclasses import replace

        ratio = next(ratios)
        machine.timed.append((json.loads((pruned / "surgeon.json").read_text())["recipe"]["kept"], ratio))
        return replace(
            honest(dense, pruned, *rest, **more), ratio=ratio, low=0.995 * ratio, high=1.005 * ratio
        )

    from surgeon.prune import members

    monkeypatch.setattr(members, "speedup", lying)
    ran = prune(model, "-o", scratch / "out", "--target-speedup", 1.5, "--json")
    made = member(ran)
    assert made["speedup"]["measured"] == 1.62 and made["speedup"]["verdict"] == "too fast"
    assert any("the nearest of" in text for text in made["remarks"])
    kept = json.loads((scratch / "out" / "surgeon.json").read_text())["recipe"]["kept"]
    assert kept == next(kept for kept, ratio in machine.timed if ratio == 1.62)


def test_sizes_too_coarse_for_the_target_give_the_nearest_and_say_so(prune, model, scratch, machine):
    made = member(prune(model, "-o", scratch / "out", "--method", "depth", "--criterion", "uniform",
                        "--target-speedup", 1.2, "--json"))  # fmt: skip
    assert made["speedup"]["verdict"] == "too fast" and made["shape"].startswith("3 of 4 layers")
    assert any("too coarse" in text for text in made["remarks"])


def test_an_interval_wider_than_the_band_is_not_measurable_and_is_said(prune, model, scratch, monkeypatch):
    runs.install(monkeypatch, runs.Machine(spread=0.08))
    ran = prune(model, "-o", scratch / "out", "--target-speedup", 1.5)
    assert ran.code == 0 and "not measurable" in ran.out
    assert "±8.0%" in ran.out


def test_without_measuring_the_table_is_trusted_and_that_is_said(prune, model, scratch, machine):
    made = member(prune(model, "-o", scratch / "out", "--target-speedup", 1.5, "--no-measure", "--json"))
    assert machine.timed == [] and made["speedup"]["measured"] is None
    assert made["speedup"]["predicted"] == pytest.approx(1.5, rel=0.03)
    assert any("--no-measure" in text for text in made["remarks"])


def test_a_given_table_is_used_and_its_workload_with_it(prune, model, scratch, machine):
    from surgeon.measure.workload import Workload

    table = runs.table_of(machine, model, Workload("decode", 1, 256, 64))
    table.save(scratch / "table.json")
    found = document(prune(model, "-o", scratch / "out", "--target-speedup", 1.5, "--latency-table", scratch / "table.json",
                           "--json"))  # fmt: skip
    assert machine.tables == 0 and found["workload"].startswith("decode of 64 tokens")


# ---- families, interruption, repetition ----------------------------------------------------------

FAMILY = ("--target-speedup", "1.3,1.6,2")
NAMES = ("speedup=1.3", "speedup=1.6", "speedup=2")


def test_a_family_comes_from_one_calibration_run(prune, model, scratch, machine, monkeypatch):
    from surgeon.prune import database

    built = []
    honest = database.build
    monkeypatch.setattr(database, "build", lambda *a, **k: built.append(1) or honest(*a, **k))
    found = document(prune(model, "-o", scratch / "family", *FAMILY, "--json"))
    assert built == [1] and machine.tables == 1
    assert [made["name"] for made in found["members"]] == list(NAMES)
    sizes = []
    for made, target in zip(found["members"], (1.3, 1.6, 2), strict=True):
        folder = scratch / "family" / made["name"]
        assert Path(made["path"]) == folder and (folder / "config.json").is_file()
        assert machine.seconds(model) / machine.seconds(folder) == pytest.approx(target, rel=0.03)
        assert made["parameters"] == runs.parameters_in(folder)
        sizes.append(made["parameters"])
    assert sizes == sorted(sizes, reverse=True)
    assert sorted(path.name for path in scratch.iterdir()) == ["cal.jsonl", "family", "model"]


@pytest.mark.parametrize("when", ["speedup", "execute"])
def test_an_interrupted_family_publishes_nothing_and_goes_on_without_calibrating(
    model, scratch, machine, text, monkeypatch, when
):
    import threading

    from surgeon import api
    from surgeon.errors import Interrupted
    from surgeon.prune import hessians, members, run

    options = {
        "target_speedup": (1.3, 1.6),
        "calibration": (str(text),),
        "samples": 12,
        "sequence_length": 64,
    }
    stop = threading.Event()
    place = members if when == "speedup" else run
    honest, calls = getattr(place, when), []

    def interrupting(*arguments, **more):
        calls.append(1)
        if len(calls) == (2 if when == "speedup" else 1):
            stop.set()
        if stop.is_set() and when == "speedup":
            raise Interrupted("E130", "interrupted while measuring")
        return honest(*arguments, **more)

    monkeypatch.setattr(place, when, interrupting)
    with pytest.raises(Interrupted):
        api.prune(model, scratch / "out", stop=stop, **options)
    assert not (scratch / "out").exists() and (scratch / "out.work").is_dir()
    monkeypatch.setattr(place, when, honest)

    observed = []
    seen = hessians.ChannelStatistics.observe
    monkeypatch.setattr(
        hessians.ChannelStatistics, "observe", lambda self, *a: observed.append(a) or seen(self, *a)
    )
    before = len(machine.timed)
    found = api.prune(model, scratch / "out", **options)
    assert observed == [] and machine.tables == 1
    assert len(machine.timed) - before == (1 if when == "speedup" else 0)  # what was timed is not timed again
    assert [made["name"] for made in found["members"]] == ["speedup=1.3", "speedup=1.6"]
    assert all(made["speedup"]["measured"] for made in found["members"])
    assert not (scratch / "out.work").exists()


def test_an_interrupted_run_gives_what_an_uninterrupted_one_gives(model, scratch, machine, text, monkeypatch):
    import threading

    from surgeon import api
    from surgeon.errors import Interrupted
    from surgeon.prune import members

    options = {"target_speedup": (1.6,), "calibration": (str(text),), "samples": 12, "sequence_length": 64}
    api.prune(model, scratch / "whole", **options)
    stop, honest = threading.Event(), members.candidate.check

    def interrupting(*arguments, **more):
        stop.set()
        return honest(*arguments, **more)

    monkeypatch.setattr(members.candidate, "check", interrupting)
    with pytest.raises(Interrupted):
        api.prune(model, scratch / "out", stop=stop, **options)
    monkeypatch.setattr(members.candidate, "check", honest)
    api.prune(model, scratch / "out", **options)
    for name in ("model.safetensors", "config.json", "pruning.json"):
        assert (scratch / "out" / name).read_bytes() == (scratch / "whole" / name).read_bytes(), name


def test_a_second_run_changes_nothing_and_another_request_is_refused(prune, model, scratch, machine, text):
    out = scratch / "out"
    target = ("-o", out, "--target-speedup", 1.5)
    assert prune(model, *target).code == 0
    before, times = runs.snapshot(out), len(machine.timed)
    again = prune(model, *target, "--json")
    assert document(again)["output"]["unchanged"] and member(again)["shape"].startswith("4 layers")
    assert "unchanged" in prune(model, *target).out
    assert runs.snapshot(out) == before and len(machine.timed) == times and machine.tables == 1
    for other in (("-o", out, "--target-speedup", 1.6), (*target, "--seed", 1), (*target, "--sequential")):
        refused = prune(model, *other)
        assert refused.code == 6 and "error[E601]" in refused.err, other
    runs.text(text, 40)  # other text under the same name gives another model
    refused = prune(model, *target)
    assert refused.code == 6 and runs.snapshot(out) == before
    replaced = prune(model, "-o", out, "--target-speedup", 2, "--overwrite", "--json")
    assert document(replaced)["output"]["unchanged"] is False and runs.snapshot(out) != before


def test_two_runs_into_one_work_folder_are_refused(prune, model, scratch, machine):
    from surgeon.output.staging import DestinationLock

    (scratch / "out.work").mkdir()
    lock = DestinationLock.acquire(scratch / "out.work" / "prune")
    try:
        refused = prune(model, "-o", scratch / "out", "--target-speedup", 1.5)
    finally:
        lock.release()
    assert refused.code == 6 and "error[E603]" in refused.err and machine.tables == 0


def test_a_kept_work_folder_spares_a_later_run_the_calibration(prune, model, scratch, machine, monkeypatch):
    from surgeon.prune import hessians

    work = ("--work", scratch / "kept")
    assert prune(model, "-o", scratch / "one", "--target-speedup", 1.5, *work).code == 0
    monkeypatch.setattr(hessians.ChannelStatistics, "observe", lambda *a: pytest.fail("calibrated again"))
    assert prune(model, "-o", scratch / "two", "--target-speedup", 1.7, *work).code == 0
    assert machine.tables == 1 and (scratch / "kept").is_dir()


def test_nothing_but_its_own_work_is_ever_removed(prune, model, scratch, machine):
    for place in (scratch / "kept", scratch / "out.work"):
        place.mkdir()
        (place / "mine.txt").write_text("keep me")
    given = (model, "--sparsity", 0.3, "--no-resume", "--overwrite")
    assert prune(*given, "-o", scratch / "one", "--work", scratch / "kept").code == 0
    assert prune(*given, "-o", scratch / "out").code == 0
    assert (scratch / "kept" / "mine.txt").read_text() == "keep me"
    assert [path.name for path in (scratch / "out.work").iterdir()] == ["mine.txt"]


# ---- the document --------------------------------------------------------------------------------


def plain_types(value) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain_types(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(plain_types(one) for one in value)
    return value is None or type(value) in (str, int, float, bool)


def test_the_document_is_one_of_plain_types(model, scratch, machine, text):
    from surgeon import api

    found = api.prune(
        model, scratch / "out", target_speedup=1.5, calibration=(str(text),), samples=12, sequence_length=64
    )
    assert plain_types(found)
    (made,) = found["members"]
    assert {"predicted", "measured", "low", "high"} <= made["speedup"].keys()
    assert made["speedup"]["low"] < made["speedup"]["measured"] < made["speedup"]["high"]
    assert found["metrics"]["speedup"]["spread"] == pytest.approx(0.005 * made["speedup"]["measured"])
    assert found["output"]["sha256"].keys() == {"model.safetensors"}
    before, after = made["quality"]["perplexity"]
    assert 1 < before < after and 0 <= made["quality"]["top1"] <= 1
    assert found["calibration"]["held_out"]["samples"] >= 1 and len(made["tried"]) > 1


def test_stdout_holds_one_document_and_nothing_else(prune, model, scratch, machine):
    ran = prune(model, "-o", scratch / "out", "--target-speedup", 1.5, "--json")
    assert (
        document(ran)["schema"] == 1 and ran.document["command"] == "prune" and ran.document["exit_code"] == 0
    )
    refused = prune(model, "-o", scratch / "two", "--target-speedup", 40, "--json")
    assert refused.code == 2 and refused.document["error"]["code"] == "E264"


def test_a_dry_run_writes_nothing_and_says_what_would_be_needed(prune, model, scratch, machine):
    before = runs.snapshot(scratch)
    ran = prune(model, "-o", scratch / "out", *FAMILY, "--dry-run")
    assert ran.code == 0 and "nothing was written." in ran.out
    assert runs.snapshot(scratch) == before and machine.tables == 0
    for said in (
        "free disk",
        "results at most",
        "tokens for statistics",
        "speedup=1.6 is not checked yet",
        "about ",
    ):
        assert said in ran.out, said
    found = document(prune(model, "-o", scratch / "out", "--sparsity", 0.3, "--dry-run", "--json"))
    assert found["status"] == "dry-run" and found["targets_checked"] and found["outlook"]["seconds"] >= 0
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert 0.9 * stored < found["needs"]["results"] <= stored and found["needs"]["work"] > 0
    assert prune(model, "-o", scratch / "out", "--sparsity", 0.999, "--dry-run").code == 2
    assert prune(model, "-o", model, "--sparsity", 0.3, "--dry-run").code == 6
    assert runs.snapshot(scratch) == before

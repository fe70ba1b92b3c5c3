"""Faults A3-A9, A11, A12, A14, D8, H2, I1, I3, I4, J9: whole runs that are stopped, repeated, raced, compared."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import checker
import forge
import kit
import pytest

from surgeon import execute as execution
from surgeon.errors import InputError, Interrupted, OutputConflict, SurgeonError
from surgeon.execute import execute
from surgeon.output import staging
from surgeon.verify.static import verify_path

BIG = 1 << 40


def run(models, out: Path, *, disk=None, overwrite=False, resume=True, threads=1, stop=None, **options):
    return execute(
        kit.plan(models, **options), out, threads=threads, overwrite=overwrite, resume=resume, disk=disk,
        memory_limit=BIG, stop=stop,
    )  # fmt: skip


def stopped_at(models, out: Path, at: int, **options) -> None:
    """Leave an interrupted run behind (disk error at call ``at``)."""
    with pytest.raises(SurgeonError):
        run(models, out, disk=kit.FaultyDisk(at, errno.EIO), **options)
    assert not out.exists()


def expected(models, out: Path, **options) -> dict[str, bytes]:
    """Return what an undisturbed run publishes under the same name."""
    elsewhere = out.parent / "reference"
    elsewhere.mkdir()
    run(models, elsewhere / out.name, **options)
    found = checker.tree(elsewhere / out.name)
    shutil.rmtree(elsewhere)
    return found


# --- kills ------------------------------------------------------------------------------------


def storm(models: list[Path], out: Path, repetitions: int, **options) -> None:
    wanted = expected(models, out, **options)
    before = kit.snapshot(models)
    chance = random.Random(repetitions)
    killed = 0
    for _ in range(repetitions):
        child = kit.child(models, out, pause=0.003, threads=2, **options)
        child.wait_until_writing()
        time.sleep(chance.uniform(0, 0.3))
        killed += child.kill() == -signal.SIGKILL
        assert checker.tree(out) in ({}, wanted)
        assert kit.snapshot(models) == before
        if out.exists():
            shutil.rmtree(out)
    assert killed
    run(models, out, **options)
    assert checker.tree(out) == wanted
    checker.check(out)
    assert not kit.leftovers(out)


def test_A1_H2_sigkill_at_random_times(long_short, scratch):
    storm(list(long_short), scratch / "out", 5)


def test_J9_random_method_with_kills_equals_an_undisturbed_run(long_short, scratch):
    storm(list(long_short), scratch / "out", 3, method="dare_ties", seed=3)


@pytest.mark.slow
def test_A1_sigkill_storm(long_short, scratch):
    storm(list(long_short), scratch / "out", 100, max_shard_size=3000)


def test_A1_children_of_the_kit_import_no_model_library(long_short, scratch):
    code, answer, _ = kit.child(list(long_short), scratch / "out").finish()
    assert code == 0 and answer["loaded"] == []


def test_J9_dare_resumed_from_every_item_equals_an_undisturbed_run(long_short, scratch):
    out = scratch / "out"
    wanted = expected(long_short, out, method="dare_linear", seed=11)
    for at in range(10, 70, 9):
        stopped_at(long_short, out, at, method="dare_linear", seed=11)
        run(long_short, out, method="dare_linear", seed=11)
        assert checker.tree(out) == wanted
        shutil.rmtree(out)


# --- order of writes ----------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [False, True])
def test_A3_nothing_is_exposed_before_it_is_on_disk(long_short, scratch, bare):
    models = [m / "model.safetensors" for m in long_short] if bare else list(long_short)
    out = scratch / ("out.safetensors" if bare else "out")
    disk = kit.FaultyDisk()
    run(models, out, disk=disk, max_shard_size=2500)
    calls = disk.calls
    exposing = [i for i, (action, path) in enumerate(calls) if action == "rename" and path == str(out)]
    assert len(exposing) == 1
    dirty: set[str] = set()
    touched: set[str] = set()
    for i, (action, path) in enumerate(calls):
        name = Path(path).name
        if action in {"create", "write"}:
            dirty.add(name)
            touched.add(name)
        elif action == "sync":
            dirty.discard(name)
        elif i == exposing[0]:
            assert not dirty - {"journal"}, f"published with unsynced {dirty}"
    assert ("sync_folder", str(out.parent)) in calls[exposing[0] :], "the rename itself was not made durable"
    if not bare:
        last = [name for action, path in calls if action == "create" for name in [Path(path).name]][-1]
        assert last == "config.json", "the commit record must be written last"
        assert "sync_folder" in {a for a, p in calls[: exposing[0]] if Path(p).name == "model"}


def test_A3_bytes_that_were_not_synced_may_vanish(long_short, scratch):
    """Power loss: whatever was written after a file's last sync reads as zeros afterwards."""
    out = scratch / "out"
    wanted = expected(long_short, out, max_shard_size=3000)

    class PowerLoss(kit.FaultyDisk):
        unsynced: dict[str, list[tuple[int, int]]]

        def write_at(self, descriptor, data, offset):
            super().write_at(descriptor, data, offset)
            self.unsynced.setdefault(kit._name_of(descriptor), []).append(
                (offset, len(memoryview(data).cast("B")))
            )

        def sync(self, descriptor):
            super().sync(descriptor)
            self.unsynced.pop(kit._name_of(descriptor), None)

    for at in range(5, 1000, 4):
        disk = PowerLoss(at, errno.EIO)
        disk.unsynced = {}
        try:
            run(long_short, out, disk=disk, max_shard_size=3000)
        except SurgeonError:
            pass
        else:
            break
        for name, spans in disk.unsynced.items():
            if os.path.exists(name):
                with open(name, "r+b") as stream:
                    for offset, size in spans:
                        stream.seek(offset)
                        stream.write(bytes(size))
        if out.exists():
            assert checker.tree(out) == wanted
        run(long_short, out, max_shard_size=3000)
        assert checker.tree(out) == wanted
        shutil.rmtree(out)


# --- stopping -----------------------------------------------------------------------------------


def test_A4_a_stop_request_keeps_finished_work(long_short, scratch):
    out = scratch / "out"
    wanted = expected(long_short, out)
    stop = threading.Event()

    class StopSoon(kit.FaultyDisk):
        def _step(self, action, path):
            super()._step(action, path)
            if [a for a, _ in self.calls].count("append") == 2:
                stop.set()

    models = list(long_short)
    with pytest.raises(Interrupted) as caught:
        run(models, out, disk=StopSoon(), stop=stop)
    assert caught.value.exit_code == 130
    assert not out.exists() and len(staging.leftovers(out)) == 1
    run(models, out)
    assert checker.tree(out) == wanted and not kit.leftovers(out)


def test_A5_an_exception_in_the_middle_publishes_nothing(long_short, scratch, monkeypatch):
    from surgeon import engine

    out = scratch / "out"
    wanted = expected(long_short, out)
    count = 0
    encode = engine._encode

    def fails(*arguments):
        nonlocal count
        count += 1
        if count == 7:
            raise ZeroDivisionError("a bug in a kernel")
        return encode(*arguments)

    for threads in (1, 3):
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_encode", fails)
            with pytest.raises(ZeroDivisionError):
                run(long_short, out, threads=threads)
        assert not out.exists()
        assert not list(scratch.glob(".out.*lock"))
    run(long_short, out)
    assert checker.tree(out) == wanted and not kit.leftovers(out)


# --- resuming -----------------------------------------------------------------------------------


def _rewrite_same_header(models):
    """Put other values of the same names and shapes in place, as a newer fine-tune would."""
    forge.model_folder(models[0], 5)


def _older_program(models):
    return {"version": "0.0.9"}


CHANGES = {
    "method": {"method": "dare_ties"},
    "density": {"density": (0.5,)},
    "lambda": {"lambda_": 0.5},
    "dtype": {"dtype": "float32"},
    "shard size": {"max_shard_size": 4000},
    "seed": {"method": "dare_linear", "seed": 2},
    "ignored tensors": {"ignore": ("model.norm.weight",)},
    "allowed values": {"allow_nonfinite": True},
}


@pytest.mark.parametrize("what", CHANGES)
def test_A6_another_plan_does_not_resume(long_short, scratch, what):
    out = scratch / "out"
    changed = CHANGES[what]
    first = {"method": changed["method"], "seed": 1} if "seed" in changed else {}
    stopped_at(long_short, out, 40, **first)
    with pytest.raises(OutputConflict) as caught:
        run(long_short, out, **changed)
    assert caught.value.code == "E605" and caught.value.exit_code == 6
    assert "differ" in caught.value.message and "--no-resume" in caught.value.help
    assert not out.exists()
    run(long_short, out, resume=False, **changed)
    checker.check(out)
    assert not kit.leftovers(out)


def test_A6_an_input_of_equal_shape_but_other_values_does_not_resume(long_short, scratch):
    out = scratch / "out"
    stopped_at(long_short, out, 40)
    _rewrite_same_header(long_short)
    with pytest.raises(OutputConflict) as caught:
        run(long_short, out)
    assert caught.value.code == "E605" and "input files" in caught.value.message


def test_A6_a_finished_result_of_other_values_is_not_taken_for_this_one(long_short, scratch):
    out = scratch / "out"
    run(long_short, out)
    assert run(long_short, out).unchanged
    before = checker.tree(out)
    _rewrite_same_header(long_short)
    with pytest.raises(OutputConflict) as caught:
        run(long_short, out)
    assert caught.value.code == "E601"
    assert checker.tree(out) == before
    assert not run(long_short, out, overwrite=True).unchanged
    assert checker.tree(out)["model.safetensors"] != before["model.safetensors"]


def test_A6_another_program_version_does_not_resume(long_short, scratch, monkeypatch):
    out = scratch / "out"
    with monkeypatch.context() as patch:
        patch.setattr(execution, "__version__", "0.0.1")
        stopped_at(long_short, out, 40)
    with pytest.raises(OutputConflict, match="program"):
        run(long_short, out)


def finished_staging(models, out: Path) -> Path:
    """Leave a run behind that died just before publication; return its staging folder."""
    disk = kit.FaultyDisk()
    run(models, out, disk=disk)
    at = next(i for i, call in enumerate(disk.calls) if call == ("rename", str(out)))
    shutil.rmtree(out)
    stopped_at(models, out, at + 1)
    (found,) = staging.leftovers(out)
    return found


def journal_cut_at(models, out: Path, places: list[int] | None) -> None:
    wanted = expected(models, out)
    kept = out.parent / "kept"
    finished_staging(models, out).rename(kept)
    raw = (kept / "journal").read_bytes()
    if places is None:
        places = list(range(len(raw) + 1))
    for place in places:
        again = out.parent / f".{out.name}.surgeon-{place}"
        shutil.copytree(kept, again)
        (again / "journal").write_bytes(raw[:place])
        run(models, out)
        assert checker.tree(out) == wanted, f"journal cut at byte {place}"
        assert not kit.leftovers(out)
        shutil.rmtree(out)


def test_A7_a_journal_cut_at_line_borders_and_between(long_short, scratch):
    out = scratch / "out"
    raw = (finished_staging(long_short, out) / "journal").read_bytes()
    shutil.rmtree(staging.leftovers(out)[0])
    borders = [i for i in range(len(raw) + 1) if i == 0 or raw[i - 1 : i] == b"\n"]
    journal_cut_at(
        long_short, out, sorted({*borders, *(b - 1 for b in borders if b), *range(0, len(raw), 401)})
    )


@pytest.mark.slow
def test_A7_a_journal_cut_at_every_byte(long_short, scratch):
    journal_cut_at(long_short, scratch / "out", None)


def test_A7_a_damaged_line_ends_what_is_believed(long_short, scratch):
    out = scratch / "out"
    wanted = expected(long_short, out)
    for place in range(3, 4000, 331):
        folder = finished_staging(long_short, out)
        raw = bytearray((folder / "journal").read_bytes())
        raw[place % len(raw)] ^= 0x20
        (folder / "journal").write_bytes(raw)
        run(long_short, out)
        assert checker.tree(out) == wanted
        shutil.rmtree(out)


def test_A7_staged_bytes_are_hashed_before_they_are_believed(long_short, scratch):
    out = scratch / "out"
    wanted = expected(long_short, out)
    for name in wanted:
        folder = finished_staging(long_short, out)
        file = folder / "model" / name
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
        run(long_short, out)
        assert checker.tree(out) == wanted, f"a damaged staged {name} was published"
        shutil.rmtree(out)


def test_A13_an_older_model_in_the_staging_folder_is_not_taken_for_the_result(long_short, scratch):
    """After an exchange the staging folder holds the previous model, with the same file names."""
    out = scratch / "out"
    run(long_short, out, method="linear")
    disk = kit.FaultyDisk()
    scenario = kit.Scenario(list(long_short), out, overwrite=True)
    wanted = None
    for _ in range(2):
        if wanted is None:
            run(long_short, out, overwrite=True, disk=disk)
            wanted = checker.tree(out)
            run(long_short, out, overwrite=True, method="linear")
            at = next(i for i, (action, _) in enumerate(disk.calls) if action == "exchange")
            assert kit.run_to_death(scenario, at + 2)
    (out / "model.safetensors").write_bytes(b"damaged")
    run(long_short, out, overwrite=True)
    assert checker.tree(out) == wanted
    assert not kit.leftovers(out)


def test_A13_between_the_two_renames_the_next_step_is_named(long_short, scratch):
    out = scratch / "out"
    run(long_short, out, method="linear")
    previous = checker.tree(out)
    scenario = kit.Scenario(list(long_short), out, overwrite=True, disk=kit.NoExchange)
    disk = kit.NoExchange()
    other = scratch / "other"
    shutil.copytree(out, other)
    run(long_short, other, overwrite=True, disk=disk)
    at = next(i for i, call in enumerate(disk.calls) if call == ("rename", str(other)))
    assert kit.run_to_death(scenario, at + 1)
    assert not out.exists()
    (old,) = scratch.glob(".out.surgeon-old-*")
    assert checker.tree(old) == previous
    (error,) = verify_path(out).errors
    assert old.name in str(error.help) and "mv" in error.help
    with pytest.raises(
        OutputConflict
    ):  # another command puts the old model back and then refuses to replace it
        run(long_short, out, method="slerp", resume=False)
    assert checker.tree(out) == previous


# --- destinations -------------------------------------------------------------------------------


def test_A8_an_existing_model_is_replaced_only_as_a_whole_and_on_request(long_short, scratch):
    out = scratch / "out"
    for size in (5_000_000, 2500, 4000, 5_000_000):
        fresh = expected(long_short, out, max_shard_size=size)
        if out.exists():
            before = checker.tree(out)
            with pytest.raises(OutputConflict) as caught:
                run(long_short, out, max_shard_size=size)
            assert caught.value.code == "E601" and "--overwrite" in caught.value.help
            assert checker.tree(out) == before
        run(long_short, out, max_shard_size=size, overwrite=True)
        assert checker.tree(out) == fresh, "something of the previous model survived"
        checker.check(out)


@pytest.mark.parametrize("stray", ["thesis.docx", "data/notes.xlsx", "model.bin", ".git/config"])
def test_A8_foreign_files_are_never_deleted(long_short, scratch, stray):
    out = scratch / "out"
    run(long_short, out, method="linear")
    (out / stray).parent.mkdir(exist_ok=True)
    (out / stray).write_text("mine")
    before = checker.tree(out)
    with pytest.raises(OutputConflict) as caught:
        run(long_short, out, overwrite=True)
    assert caught.value.code == "E604" and Path(stray).name in caught.value.message
    assert checker.tree(out) == before


def test_A8_a_folder_that_is_no_model_is_not_replaced(long_short, scratch):
    out = scratch / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputConflict) as caught:
        run(long_short, out, overwrite=True)
    assert caught.value.code == "E604"
    assert (out / "notes.txt").read_text() == "mine"


def ways_to_an_input(scratch: Path) -> dict[str, Path]:
    long = scratch / "long"
    (scratch / "link").symlink_to(long)
    (scratch / "deep").mkdir()
    (scratch / "deep" / "link").symlink_to(scratch)
    return {
        "direct": long,
        "relative": Path(os.path.relpath(long)),
        "dots": scratch / "short" / ".." / "long",
        "link": scratch / "link",
        "link above": scratch / "deep" / "link" / "long",
        "inside": long / "sub",
        "inside through a link": scratch / "link" / "sub",
        "ancestor": scratch,
    }


@pytest.mark.parametrize(
    "way", ["direct", "relative", "dots", "link", "link above", "inside", "inside through a link", "ancestor"]
)
def test_A9_the_output_is_an_input(long_short, scratch, way):
    out = ways_to_an_input(scratch)[way]
    before = kit.snapshot(list(long_short))
    with pytest.raises(OutputConflict) as caught:
        run(long_short, out, overwrite=True)
    assert caught.value.code == "E602" and caught.value.exit_code == 6
    assert kit.snapshot(list(long_short)) == before


@pytest.mark.parametrize("way", ["direct", "hard link", "link"])
def test_A9_the_output_file_is_an_input_file(long_short, scratch, way):
    files = [m / "model.safetensors" for m in long_short]
    out = files[0]
    if way == "hard link":
        out = scratch / "same.safetensors"
        os.link(files[0], out)
    elif way == "link":
        out = scratch / "same.safetensors"
        out.symlink_to(files[0])
    before = kit.snapshot(files)
    with pytest.raises(OutputConflict) as caught:
        run(files, out, overwrite=True)
    assert caught.value.code in {"E602", "E601"}
    assert kit.snapshot(files) == before


def test_A9_an_output_folder_that_holds_a_hard_link_of_an_input(long_short, scratch):
    out = scratch / "out"
    out.mkdir()
    os.link(long_short[0] / "model.safetensors", out / "model.safetensors")
    with pytest.raises(OutputConflict) as caught:
        run(long_short, out, overwrite=True)
    assert caught.value.code == "E602"


def test_A10_a_file_where_a_folder_is_needed_and_the_reverse(long_short, scratch):
    file = scratch / "out"
    file.write_text("mine")
    with pytest.raises(OutputConflict) as caught:
        run(long_short, file, overwrite=True)
    assert caught.value.code == "E601" and file.read_text() == "mine"
    folder = scratch / "out.safetensors"
    folder.mkdir()
    with pytest.raises(OutputConflict):
        run([m / "model.safetensors" for m in long_short], folder, overwrite=True)
    with pytest.raises(OutputConflict):
        run(long_short, scratch / "other.safetensors")
    with pytest.raises(OutputConflict):
        run([m / "model.safetensors" for m in long_short], scratch / "other")


def test_A10_an_empty_folder_is_filled_and_staged_beside(long_short, scratch):
    out = scratch / "out"
    out.mkdir()
    run(long_short, out)
    checker.check(out)


def test_A10_a_publication_that_appeared_meanwhile_is_not_overwritten(long_short, scratch):
    for bare in (False, True):
        out = scratch / ("out.safetensors" if bare else "out")

        class Rival(kit.FaultyDisk):
            def _step(self, action, path, out=out, bare=bare):
                super()._step(action, path)
                if len(self.calls) == 20 and not out.exists():
                    if bare:
                        out.write_text("mine")
                    else:
                        out.mkdir()
                        (out / "config.json").write_text("mine")

        models = [m / "model.safetensors" for m in long_short] if bare else long_short
        with pytest.raises(OutputConflict) as caught:
            run(models, out, disk=Rival())
        assert caught.value.code == "E601" and "appeared" in caught.value.message
        assert (out if bare else out / "config.json").read_text() == "mine"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_A11_modes_follow_the_umask(long_short, scratch, mask):
    before = os.umask(mask)
    try:
        run(long_short, scratch / "out", max_shard_size=3000)
        run([m / "model.safetensors" for m in long_short], scratch / "out.safetensors")
        checker.check(scratch / "out")
        checker.check(scratch / "out.safetensors")
        assert (scratch / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    finally:
        os.umask(before)


def test_A12_equal_runs_give_equal_folders_whatever_the_circumstances(tmp_path):
    trees = []
    for number, (seed, threads) in enumerate([("0", 1), ("1", 2), ("12345", 3)]):
        place = tmp_path / f"user {number}" / "deep"
        place.mkdir(parents=True)
        models = [forge.model_folder(place / "long", 1), forge.model_folder(place / "short", 2, shards=2)]
        out = place / "out"
        given = [Path(os.path.relpath(m, place)) for m in models] if number == 1 else models
        child = kit.child(
            given, out, threads=threads, method="dare_ties", seed=5, max_shard_size=4000, cwd=place,
            environment={"PYTHONHASHSEED": seed, "TZ": f"UTC+{number}", "LC_ALL": "C", "HOME": str(place), "USER": f"u{number}"},
        )  # fmt: skip
        code, _, err = child.finish()
        assert code == 0, err
        checker.check(out, (str(tmp_path), "user ", f"u{number}/"))
        trees.append(checker.tree(out))
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "line\nbreak",
        "名前",
        "é",
        "e\u0301",
        "a'b\"c",
        "-o",
        "$(x)",
        "*",
        "a;b",
        "🙂",
        "x" * 200,
    ],
)
def test_A14_odd_names_work(long_short, scratch, name):
    out = scratch / name
    run(long_short, out)
    checker.check(out)
    assert run(long_short, out).unchanged
    assert not kit.leftovers(out)


@pytest.mark.parametrize(
    "kind", ["long name", "long path", "no parent", "parent is a file", "loop", "link", "dangling link"]
)
def test_A14_destinations_that_cannot_work_are_refused_early(long_short, scratch, kind):
    (scratch / "file").write_text("")
    (scratch / "loop").symlink_to(scratch / "loop")
    (scratch / "link").symlink_to(scratch / "file")
    (scratch / "dangling").symlink_to(scratch / "nowhere")
    out = {
        "long name": scratch / ("x" * 300),
        "long path": scratch.joinpath(*["y" * 200] * 25),
        "no parent": scratch / "absent" / "out",
        "parent is a file": scratch / "file" / "out",
        "loop": scratch / "loop" / "out",
        "link": scratch / "link",
        "dangling link": scratch / "dangling",
    }[kind]
    before = sorted(p.name for p in scratch.iterdir())
    with pytest.raises(SurgeonError) as caught:
        run(long_short, out)
    assert caught.value.exit_code in {5, 6} and caught.value.help
    assert sorted(p.name for p in scratch.iterdir()) == before


def test_A14_the_destination_vanishes_during_the_run(long_short, scratch):
    place = scratch / "place"
    place.mkdir()

    class Vanishing(kit.FaultyDisk):
        def _step(self, action, path):
            super()._step(action, path)
            if len(self.calls) == 30:
                shutil.rmtree(place)

    with pytest.raises(SurgeonError) as caught:
        run(long_short, place / "out", disk=Vanishing())
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT])
def test_A14_a_destination_that_turns_read_only_or_stale(long_short, scratch, number):
    for at in (1, 4, 30):
        with pytest.raises(SurgeonError) as caught:
            run(long_short, scratch / "out", disk=kit.FaultyDisk(at, number))
        assert caught.value.exit_code == 5 and not (scratch / "out").exists()


def test_D8_files_hold_their_tensors_and_nothing_else(long_short, scratch):
    out = scratch / "out"
    run(long_short, out, ignore=("model.norm.weight",))
    file = out / "model.safetensors"
    stored = sum(len(data) for _, _, data in checker.tensors_of(file).values())
    assert file.stat().st_size == 8 + int.from_bytes(file.read_bytes()[:8], "little") + stored


# --- several at once ----------------------------------------------------------------------------


def test_I1_a_second_run_names_the_holder(long_short, scratch):
    out = scratch / "out"
    first = kit.child(list(long_short), out, pause=0.05)
    first.wait_until_writing()
    try:
        with pytest.raises(OutputConflict) as caught:
            run(long_short, out)
        assert caught.value.code == "E603"
        assert (
            f"pid {first.process.pid}" in caught.value.message
            and socket.gethostname() in caught.value.message
        )
    finally:
        first.kill()
    run(long_short, out)  # the holder is gone: its work is taken over
    checker.check(out)
    assert not kit.leftovers(out)


def test_I1_two_processes_start_together(long_short, scratch):
    out = scratch / "out"
    children = [kit.child(list(long_short), out, pause=0.004) for _ in range(3)]
    codes = [child.finish()[0] for child in children]
    assert set(codes) <= {0, 6} and 0 in codes
    checker.check(out)
    assert not kit.leftovers(out)


@pytest.mark.parametrize(("age", "taken"), [(0, False), (3600, True)])
def test_I1_a_lock_of_another_host_expires(long_short, scratch, age, taken):
    out = scratch / "out"
    lock = scratch / ".out.surgeon-lock"
    lock.write_text(json.dumps({"host": "another-machine", "pid": 1, "since": "2001-02-03 04:05:06"}))
    os.utime(lock, (time.time() - age,) * 2)
    if taken:
        run(long_short, out)
        checker.check(out)
        return
    with pytest.raises(OutputConflict, match="another-machine"):
        run(long_short, out)


def test_I1_without_working_locks_results_stay_whole(long_short, scratch, monkeypatch):
    """Correctness must not depend on the lock: network file systems may ignore it."""
    monkeypatch.setattr(staging, "_try_lock", lambda descriptor: True)
    out = scratch / "out"
    wanted = expected(long_short, out)
    results: list[BaseException | None] = []

    def work():
        try:
            run(long_short, out)
            results.append(None)
        except (SurgeonError, OSError) as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None in results, results
    assert checker.tree(out) == wanted


def test_I2_runs_share_the_digest_cache(long_short, scratch):
    children = [kit.child(list(long_short), scratch / f"out{i}", method="linear") for i in range(4)]
    assert [child.finish()[0] for child in children] == [0] * 4
    trees = [checker.tree(scratch / f"out{i}")["surgeon.json"] for i in range(4)]
    assert len(set(trees)) == 1
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "surgeon" / "digests.json"
    assert isinstance(json.loads(cache.read_text()), dict)
    assert not [p for p in cache.parent.iterdir() if p.name != cache.name]


def test_I3_a_reader_sees_the_old_or_the_new_model(long_short, scratch):
    out = scratch / "out"
    trees = []
    for method in ("linear", "slerp"):
        run(long_short, out, method=method, overwrite=True)
        trees.append(
            {
                n: c
                for n, c in checker.tree(out).items()
                if n in {"config.json", "model.safetensors", "surgeon.json"}
            }
        )
    done = threading.Event()
    seen: list[int] = []
    problems: list[str] = []

    def read() -> None:
        while not done.is_set():
            try:
                folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                problems.append("the destination was absent for a moment")
                continue
            found = {}
            try:
                for name in ("config.json", "surgeon.json", "model.safetensors"):
                    descriptor = os.open(name, os.O_RDONLY, dir_fd=folder)
                    with os.fdopen(descriptor, "rb") as stream:
                        found[name] = stream.read()
            except FileNotFoundError:
                continue  # it was replaced and removed under us: what we hold is the old folder
            finally:
                os.close(folder)
            if found not in trees:
                problems.append("a mix of two models")
            else:
                seen.append(trees.index(found))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(12):
        run(long_short, out, method=("linear", "slerp")[number % 2], overwrite=True)
    done.set()
    reader.join()
    assert not problems and set(seen) == {0, 1}


def test_I4_H4_order_of_completion_does_not_change_bytes(scratch):
    shapes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    models = [forge.model_folder(scratch / n, s, **shapes) for n, s in (("long", 1), ("short", 2))]

    class Jitter(kit.FaultyDisk):
        def _step(self, action, path):
            time.sleep(random.uniform(0, 0.004))

    trees = []
    for number, threads in enumerate((1, 4, 4, 8)):
        out = scratch / f"{number}" / "out"
        out.parent.mkdir()
        run(models, out, threads=threads, disk=Jitter() if number else None, max_shard_size=30_000)
        trees.append(checker.tree(out))
    assert all(tree == trees[0] for tree in trees)


def test_A2_a_refused_input_leaves_nothing_behind(long_short, scratch):
    import numpy as np

    tensors = forge.llama_tensors(1)
    tensors["model.norm.weight"] = forge.bf16(np.full(16, np.nan, np.float32))
    forge.write(long_short[0] / "model.safetensors", tensors)
    with pytest.raises(InputError):
        run(long_short, scratch / "out")
    assert not (scratch / "out").exists() and not kit.leftovers(scratch / "out")


assert sys.platform.startswith("linux"), "these tests use /proc, flock and renameat2"

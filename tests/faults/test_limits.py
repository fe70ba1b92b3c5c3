"""Faults A2, H1, H3-H5: little disk, little memory, few files, many threads."""

from __future__ import annotations

import errno
import os
import resource

import checker
import forge
import kit
import numpy as np
import pytest

from surgeon import execute as execution
from surgeon.errors import EnvironmentFault, SurgeonError
from surgeon.execute import execute
from surgeon.plan import BLOCK_ELEMENTS, estimate

LARGE = 3 * BLOCK_ELEMENTS + 12_345


def large_files(folder, count=2, rows=None, dtype="<f4"):
    made = []
    for number in range(count):
        generator = np.random.default_rng(number)
        table = {
            "model.layers.0.large.weight": generator.standard_normal((rows or 3, LARGE // 3), dtype=np.float32).astype(dtype),
            "model.layers.0.small.weight": generator.standard_normal((7, 5), dtype=np.float32).astype(dtype),
        }  # fmt: skip
        made.append(forge.write(folder / f"m{number}.safetensors", table))
    return made


def test_A2_estimate_is_compared_with_the_free_space(long_short, scratch, monkeypatch):
    real = os.statvfs(scratch)
    low = os.statvfs_result((*real[:4], 1, *real[5:]))
    monkeypatch.setattr(execution.os, "statvfs", lambda path: low)
    with pytest.raises(EnvironmentFault) as caught:
        execute(kit.plan(list(long_short)), scratch / "out", threads=1)
    assert caught.value.code == "E501" and caught.value.exit_code == 5
    assert "needs" in caught.value.message and "free" in caught.value.message
    assert sorted(p.name for p in scratch.iterdir()) == ["long", "short"]


def test_A2_file_size_limit_keeps_the_finished_work(scratch):
    models = large_files(scratch)
    out = scratch / "out.safetensors"
    child = kit.child(models, out, limits={"RLIMIT_FSIZE": 1_000_000}, environment={"PYTHONFAULTHANDLER": ""})
    code, answer, err = child.finish()
    assert code == 5, err
    assert answer["code"] == "E505" and "allowed size" in answer["message"]
    assert not out.exists()
    code, answer, err = kit.child(models, out).finish()
    assert code == 0, err
    checker.check(out)
    assert not kit.leftovers(out)


def test_A2_what_is_kept_is_named(long_short, scratch):
    with pytest.raises(EnvironmentFault) as caught:
        execute(kit.plan(list(long_short)), scratch / "out", threads=1, disk=kit.FaultyDisk(40, errno.ENOSPC))
    (kept,) = [n for n in kit.leftovers(scratch / "out")]
    assert kept in caught.value.help and "continues" in caught.value.help
    assert "disk is full" in caught.value.message


def test_H1_a_memory_limit_below_the_need_is_refused_with_both_numbers(scratch):
    models = large_files(scratch)
    plan = kit.plan(models)
    need = estimate(plan, 1)
    with pytest.raises(EnvironmentFault) as caught:
        execute(plan, scratch / "out.safetensors", threads=4, memory_limit=need.memory_bytes // 2)
    error = caught.value
    assert error.code == "E504" and error.exit_code == 5
    assert "model.layers.0.large.weight" in error.message and "MB" in error.message
    assert "--memory-limit" in error.help
    assert sorted(p.name for p in scratch.iterdir()) == ["m0.safetensors", "m1.safetensors"]


def test_H1_threads_are_lowered_before_the_run_is_refused(scratch):
    plan = kit.plan(large_files(scratch))
    limit = estimate(plan, 2).memory_bytes
    check = execution.preflight(plan, scratch / "out", threads=8, memory_limit=limit)
    assert 1 <= check.threads <= 2


@pytest.mark.parametrize(
    ("method", "threads"), [("linear", 1), ("ties", 2), ("dare_ties", 1), ("slerp", 2), ("sce", 1)]
)
def test_H1_peak_memory_stays_within_the_estimate(tmp_path, method, threads):
    models = large_files(tmp_path, 2 if method == "slerp" else 3, rows=3)
    options = {"base": str(models[-1])} if method in {"ties", "dare_ties", "sce"} else {}
    wanted = estimate(kit.plan(models, method=method, **options), threads).memory_bytes
    code, answer, err = kit.child(
        models, tmp_path / "out.safetensors", method=method, threads=threads, **options
    ).finish()
    assert code == 0, err
    assert answer["peak"] <= 1.2 * wanted, (
        f"{answer['peak'] / 1e6:.0f} MB used, {wanted / 1e6:.0f} MB estimated"
    )


@pytest.mark.parametrize("name", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_H1_memory_that_runs_out_is_no_bug(tmp_path, name):
    models = large_files(tmp_path, 3)
    out = tmp_path / "out.safetensors"
    refused = 0
    for megabytes in (120, 200, 300, 420, 600):
        child = kit.child(models, out, method="linear", threads=2, limits={name: megabytes << 20}, environment={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})  # fmt: skip
        code, answer, err = child.finish()
        if code == 0:
            break
        assert not out.exists()
        if answer:
            assert code == 5 and answer["code"] == "E504", (code, answer, err)
            refused += 1
        else:  # not even the program could be imported
            assert "surgeon/execute.py" not in err or "in <module>" in err.split("surgeon/execute.py")[-1], (
                err[-800:]
            )
    assert refused
    code, _, err = kit.child(models, out, method="linear").finish()
    assert code == 0, err
    checker.check(out)


@pytest.mark.parametrize(
    "method", ["linear", "ties", "dare_linear", "slerp", "task_arithmetic", "sce", "breadcrumbs", "nuslerp"]
)
def test_H4_thread_counts_do_not_change_a_bit(scratch, method):
    models = large_files(scratch, 2, rows=3)
    trees = []
    for threads in (1, 2, 8):
        out = scratch / str(threads) / "out.safetensors"
        out.parent.mkdir()
        execute(kit.plan(models, method=method), out, threads=threads, memory_limit=1 << 40)
        trees.append(checker.tree(out))
    assert trees[0] == trees[1] == trees[2]


def test_H5_two_hundred_shards_with_sixty_four_files(tmp_path):
    folders = []
    for number in range(2):
        shapes = {"num_hidden_layers": 22}
        tensors = forge.llama_tensors(number + 1, **shapes)
        folder = forge.model_folder(tmp_path / f"m{number}", tensors=tensors, **shapes)
        (folder / "model.safetensors").unlink()
        forge.write_shards(folder, [{n: t} for n, t in tensors.items()])
        assert len(list(folder.glob("*.safetensors"))) > 200
        folders.append(folder)
    out = tmp_path / "out"
    child = kit.child(folders, out, threads=4, limits={"RLIMIT_NOFILE": 64}, max_shard_size=1, method="ties")
    code, answer, err = child.finish()
    assert code == 0, (answer, err[-2000:])
    checker.check(out)
    assert len(list(out.glob("*.safetensors"))) > 200


def test_H5_running_out_of_files_is_exit_5(long_short, scratch):
    plan = kit.plan(list(long_short))
    highest = max(int(n) for n in os.listdir("/proc/self/fd"))
    refused = 0
    for more in range(12):
        spare = [os.dup(2)]
        while spare[-1] < highest:  # no gaps below the limit
            spare.append(os.dup(2))
        try:
            with kit.limit(resource.RLIMIT_NOFILE, max(highest, *spare) + 1 + more):
                execute(plan, scratch / "out", threads=1)
            break
        except SurgeonError as error:
            assert error.exit_code == 5, repr(error)
            assert not (scratch / "out").exists()
            refused += 1
        finally:
            for descriptor in spare:
                os.close(descriptor)
    assert refused
    execute(plan, scratch / "out", threads=1)
    checker.check(scratch / "out")
    assert not kit.leftovers(scratch / "out")

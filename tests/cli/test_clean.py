"""``surgeon clean``: dead runs' leftovers only, and nothing without consent."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import forge
import pytest
from commands import run

from surgeon.output.disk import Disk
from surgeon.output.staging import DestinationLock, open_staging


def interrupted(destination: Path) -> Path:
    """Leave what a run leaves when it is interrupted after one item."""
    staging = open_staging(
        destination, {"verb": "merge", "inputs": {"long": [], "short": []}}, "plan", is_file=False, resume=True, disk=Disk()
    )  # fmt: skip
    (staging.model / "model.safetensors").write_bytes(b"x" * 5000)
    staging.journal.append({"item": 0, "blocks": [], "summaries": {}})
    staging.close()
    return staging.folder


def entries(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_nothing_to_clean(capsys, scratch):
    (scratch / ".merged.surgeon-notes").mkdir()
    (scratch / ".merged.surgeon-0123456789ab").mkdir()
    (scratch / ".merged.surgeon-0123456789ab" / "diary.txt").write_text("not a run's folder")
    (scratch / "merged").mkdir()
    before = entries(scratch)
    ran = run(capsys, "clean", scratch, "--yes")
    assert (ran.code, "nothing to clean" in ran.out) == (0, True)
    assert entries(scratch) == before


def test_without_consent_it_only_lists(capsys, scratch):
    folder = interrupted(scratch / "merged")
    ran = run(capsys, "clean", scratch)
    assert ran.code == 0
    assert "interrupted merge to merged of long, short, 1 items finished" in ran.out
    assert "nothing was changed" in ran.out
    document = run(capsys, "clean", scratch, "--json").document
    assert document["leftovers"][0]["bytes"] > 4000
    assert document["removed"] == []
    assert folder.is_dir()


def test_with_yes_it_removes_leftovers_and_locks(capsys, scratch):
    interrupted(scratch / "merged")
    (scratch / ".other.surgeon-lock").write_text("{}")
    (scratch / "merged").mkdir()
    (scratch / "keep.txt").write_text("mine")
    assert run(capsys, "clean", scratch, "--yes").code == 0
    assert entries(scratch) == {"merged", "keep.txt"}


@pytest.mark.parametrize(("answer", "left"), [("y", False), ("n", True), ("", True)])
def test_it_asks_on_a_terminal(capsys, scratch, monkeypatch, answer, left):
    folder = interrupted(scratch / "merged")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, default, **__: default if answer == "" else answer == "y")
    assert run(capsys, "clean", scratch).code == 0
    assert folder.exists() is left


def test_a_run_that_lives_is_left_alone(capsys, scratch):
    folder = interrupted(scratch / "merged")
    lock = DestinationLock.acquire(scratch / "merged")
    try:
        ran = run(capsys, "clean", scratch, "--yes")
        assert (ran.code, folder.is_dir()) == (0, True)
        assert "left alone" in ran.err
    finally:
        lock.release()
    assert run(capsys, "clean", scratch, "--yes").code == 0
    assert not folder.exists()


def test_the_heartbeat_of_another_machine_counts(capsys, scratch):
    folder = interrupted(scratch / "merged")
    lock = scratch / ".merged.surgeon-lock"
    lock.write_text(json.dumps({"host": f"not-{socket.gethostname()}", "pid": 1}))
    assert run(capsys, "clean", scratch, "--yes").code == 0
    assert folder.is_dir()
    os.utime(lock, (time.time() - 3600,) * 2)
    assert run(capsys, "clean", scratch, "--yes").code == 0
    assert not folder.exists()


def test_listing_changes_nothing(capsys, scratch):
    interrupted(scratch / "merged")
    lock = scratch / ".merged.surgeon-lock"
    lock.write_text('{"host": "x", "pid": 1}')
    os.utime(lock, (1, 1))
    run(capsys, "clean", scratch)
    assert (lock.read_text(), lock.stat().st_mtime) == ('{"host": "x", "pid": 1}', 1)


def test_the_only_copy_of_a_model_is_put_back(capsys, scratch):
    old = forge.model_folder(scratch / ".merged.surgeon-old-01234567", 1)
    ran = run(capsys, "clean", scratch)
    assert "put back" in ran.out
    assert old.is_dir()
    assert run(capsys, "clean", scratch, "--yes").code == 0
    assert (scratch / "merged" / "config.json").is_file()
    assert entries(scratch) == {"merged"}


def test_a_replaced_model_is_removed_only_with_consent(capsys, scratch):
    old = forge.model_folder(scratch / ".merged.surgeon-old-01234567", 1)
    forge.model_folder(scratch / "merged", 2)
    ran = run(capsys, "clean", scratch)
    assert "to go back" in ran.out
    assert old.is_dir()
    run(capsys, "clean", scratch, "--yes")
    assert entries(scratch) == {"merged"}


def test_links_are_never_followed(capsys, scratch):
    precious = scratch / "precious"
    (precious / "model").mkdir(parents=True)
    (scratch / "work").mkdir()
    (scratch / "work" / ".merged.surgeon-0123456789ab").symlink_to(precious)
    (scratch / "work" / ".merged.surgeon-lock").symlink_to(precious / "file")
    assert run(capsys, "clean", scratch / "work", "--yes").code == 0
    assert (precious / "model").is_dir()


def test_wrong_folders(capsys, scratch):
    assert run(capsys, "clean", scratch / "nowhere").code == 3
    file = scratch / "file"
    file.write_text("x")
    assert run(capsys, "clean", file).code == 3

"""Faults A1, A2, A3, A10, A13: every disk call fails once, kills once, in every way to publish."""

from __future__ import annotations

import errno
from pathlib import Path

import forge
import kit
import pytest

SMALL = {"num_hidden_layers": 1, "tie_word_embeddings": True}


def inputs(root: Path) -> list[Path]:
    made = [forge.model_folder(root / n, s, tokenizer=False, **SMALL) for n, s in (("long", 1), ("short", 2))]
    for folder in made:
        (folder / "generation_config.json").unlink()
    return made


def older_model(root: Path):
    """Return a function that puts a previous, different model at the destination."""
    kept = forge.model_folder(root / "kept", 9, tokenizer=False, shards=2, **SMALL)

    def place(destination: Path) -> None:
        destination.mkdir(exist_ok=True)
        for file in kept.iterdir():
            (destination / file.name).write_bytes(file.read_bytes())

    return place


def empty_folder(destination: Path) -> None:
    destination.mkdir()


def older_file(destination: Path) -> None:
    forge.write(destination, forge.llama_tensors(9, **SMALL))


def scenario(name: str, root: Path) -> kit.Scenario:
    models = inputs(root)
    if name.startswith("file"):
        models = [m / "model.safetensors" for m in models]
        out = root / "out.safetensors"
        over = name == "file-overwrite"
        return kit.Scenario(models, out, previous=older_file if over else None, overwrite=over)
    base = kit.Scenario(models, root / "out")
    if "overwrite" in name:
        base.previous, base.overwrite = older_model(root), True
    if name.startswith("mount"):
        base.disk, base.replaceable = kit.MountPoint, False
        base.previous = base.previous or empty_folder
    if name.startswith("other-file-system"):
        base.disk, base.replaceable = kit.OtherFileSystem, False
        base.previous = base.previous or empty_folder
    if name.startswith("no-exchange"):
        base.disk, base.replaceable = kit.NoExchange, False
    if name == "sharded":
        base.options = {"max_shard_size": 2000}
    if name == "threads":
        base.threads = 3
    return base


SCENARIOS = [
    "folder", "sharded", "overwrite", "no-exchange-overwrite", "mount", "mount-overwrite", "other-file-system-overwrite",
    "file", "file-overwrite",
]  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_A1_A10_A13_process_ends_at_every_third_disk_call(scratch, name):
    kit.enumerate_faults(scenario(name, scratch), None, step=3)


@pytest.mark.parametrize("name", ["overwrite", "file"])
def test_A1_A13_process_ends_at_every_disk_call(scratch, name):
    assert kit.enumerate_faults(scenario(name, scratch), None) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_A1_A10_A13_process_ends_at_every_disk_call_in_every_scenario(scratch, name):
    assert kit.enumerate_faults(scenario(name, scratch), None) > 20


@pytest.mark.parametrize("name", ["folder", "mount-overwrite", "file-overwrite"])
def test_A2_disk_stays_full_from_every_second_disk_call_on(scratch, name):
    kit.enumerate_faults(scenario(name, scratch), errno.ENOSPC, lasting=True, step=2)


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_A2_one_error_at_every_third_disk_call(scratch, number):
    kit.enumerate_faults(scenario("overwrite", scratch), number, step=3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.EFBIG, errno.ENOSPC])
@pytest.mark.parametrize("name", [*SCENARIOS, "threads"])
def test_A2_every_error_at_every_disk_call(scratch, name, number):
    kit.enumerate_faults(scenario(name, scratch), number)
    kit.enumerate_faults(scenario(name, scratch), number, lasting=True)

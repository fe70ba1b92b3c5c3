"""Passes that were cut off: what is on disk is continued bit for bit, or not believed at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from walk_models import Sums, model_folder, texts

from surgeon.calibrate.walk import Settings, Walk
from surgeon.checkpoint.checkpoint import open_path
from surgeon.errors import EnvironmentFault, OutputConflict


def settings(folder, **more):
    return Settings(**{"threads": 1, "batch_tokens": 64, "spill": folder, **more})


def finish(folder, samples=None, *, family="qwen3_moe", **more):
    """Run to the end with resume; return the sums, the hidden states and the stages that ran."""
    sums, stages = Sums(), []
    with Walk(open_path(model_folder(family)), samples or texts(), settings(folder, **more)) as walk:
        walk.run(sums, resume=True, progress=lambda done, total: stages.append(done))
        return sums, torch.cat([states for _, states in walk.hidden()]), stages


def cut_off(folder):
    with (
        pytest.raises(KeyboardInterrupt),
        Walk(open_path(model_folder("qwen3_moe")), texts(), settings(folder)) as walk,
    ):
        walk.run(Sums("model.layers.1.mlp.down_proj", KeyboardInterrupt))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("whole"))


def test_an_interrupted_pass_continues_bit_for_bit(tmp_path, whole):
    cut_off(tmp_path)
    sums, hidden, stages = finish(tmp_path)
    assert stages == [3, 4, 5]  # the embedding and layer 0 were done
    assert sums.equal(whole[0]) and torch.equal(hidden, whole[1])


def test_exhausted_memory_names_the_stage_and_keeps_what_is_done(tmp_path, whole):
    walk = Walk(open_path(model_folder("qwen3_moe")), texts(), settings(tmp_path))
    with pytest.raises(EnvironmentFault) as caught, walk:
        walk.run(Sums("model.layers.1.mlp.down_proj", MemoryError))
    assert caught.value.code == "E504" and "layer 1" in caught.value.message
    sums, _, stages = finish(tmp_path)
    assert stages == [3, 4, 5] and sums.equal(whole[0])


def test_a_finished_pass_is_not_run_again(tmp_path, whole):
    finish(tmp_path)
    sums, hidden, stages = finish(tmp_path)
    assert stages == [] and sums.equal(whole[0]) and torch.equal(hidden, whole[1])


def test_without_resume_it_starts_over(tmp_path, whole):
    cut_off(tmp_path)
    stages, sums = [], Sums()
    with Walk(open_path(model_folder("qwen3_moe")), texts(), settings(tmp_path)) as walk:
        walk.run(sums, progress=lambda done, total: stages.append(done))
    assert stages == [1, 2, 3, 4, 5] and sums.equal(whole[0])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    path.write_bytes(raw)


def pass_folder(spill):
    return next(path for path in spill.iterdir() if path.is_dir())


DAMAGE = {
    "activations changed": lambda folder: flip(folder / "activations-1.bin"),
    "activations cut": lambda folder: os.truncate(folder / "activations-1.bin", 100),
    "activations gone": lambda folder: (folder / "activations-1.bin").unlink(),
    "observer changed": lambda folder: flip(folder / "observer-1.npz"),
    "observer gone": lambda folder: (folder / "observer-1.npz").unlink(),
    "state changed": lambda folder: flip(folder / "state.json"),
    "state cut": lambda folder: os.truncate(folder / "state.json", 20),
    "state empty": lambda folder: (folder / "state.json").write_text("{}"),
    "state nested": lambda folder: (folder / "state.json").write_text("[" * 100_000),
    "state foreign": lambda folder: (folder / "state.json").write_text(
        json.dumps({**json.loads((folder / "state.json").read_text()), "identity": "0" * 64})
    ),
    "stage beyond the end": lambda folder: (folder / "state.json").write_text(
        json.dumps({**json.loads((folder / "state.json").read_text()), "stage": 99})
    ),
    "another file": lambda folder: (folder / "state.json").write_text(
        json.dumps(
            {**json.loads((folder / "state.json").read_text()), "observer": {"file": "../x", "sha256": ""}}
        )
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_state_is_never_trusted(tmp_path, whole, damage):
    cut_off(tmp_path)
    damage(pass_folder(tmp_path))
    sums, hidden, stages = finish(tmp_path)
    assert stages == [1, 2, 3, 4, 5]
    assert sums.equal(whole[0]) and torch.equal(hidden, whole[1])


@pytest.mark.parametrize(
    ("samples", "more"),
    [
        (texts(seed=1), {}),
        (texts((13, 17, 17, 18)), {}),
        (None, {"dtype": "bfloat16"}),
        (None, {"batch_tokens": 20}),
        (None, {"family": "olmoe"}),
    ],
)
def test_another_pass_does_not_take_it_up(tmp_path, samples, more):
    cut_off(tmp_path)
    _, _, stages = finish(tmp_path, samples, **more)
    assert stages == [1, 2, 3, 4, 5]
    assert len(list(tmp_path.iterdir())) == 2  # and the first one's work is still there


class Few(Sums):
    """The same sums, of other modules."""


def run_with(spill, sums, folder, **options):
    stages = []
    with Walk(open_path(folder), texts(), settings(spill), **options) as walk:
        walk.run(sums, resume=True, progress=lambda done, total: stages.append(done))
    return stages


def edit_config(folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.1}))


def touch(folder):
    (file,) = folder.glob("*.safetensors")
    os.utime(file, ns=(0, 0))


@pytest.mark.parametrize("change", [edit_config, touch])
def test_a_model_that_was_changed_in_place_is_run_from_the_start(tmp_path, change):
    folder, spill = tmp_path / "model", tmp_path / "spill"
    shutil.copytree(model_folder("qwen3_moe"), folder)
    assert run_with(spill, Sums(), folder) == [1, 2, 3, 4, 5]
    assert run_with(spill, Sums(), folder) == []
    change(folder)
    assert run_with(spill, Sums(), folder) == [1, 2, 3, 4, 5]


def test_what_another_observer_has_seen_is_not_taken_for_this_ones(tmp_path, monkeypatch):
    folder = model_folder("qwen3_moe")
    assert run_with(tmp_path, Sums(), folder) == [1, 2, 3, 4, 5]
    assert run_with(tmp_path, Few(), folder) == [1, 2, 3, 4, 5]  # another class
    few = Sums()
    monkeypatch.setattr(few, "wants", lambda module: module.endswith("down_proj"))
    assert run_with(tmp_path, few, folder) == [1, 2, 3, 4, 5]  # other modules
    assert all(module.endswith("down_proj") for module in few.sums)
    named = Sums()
    named.identity = "per channel"
    assert run_with(tmp_path, named, folder) == [1, 2, 3, 4, 5]  # other settings
    assert run_with(tmp_path, Sums(), folder, per_sample=True) == [1, 2, 3, 4, 5]
    assert run_with(tmp_path, Sums(), folder) == []


def test_observers_without_state_start_over(tmp_path):
    class Plain:
        def wants(self, module):
            return False

        def observe(self, module, inputs, outputs, sample):
            raise AssertionError

    walk = Walk(open_path(model_folder("qwen3_moe")), texts(), settings(tmp_path))
    steps = walk.steps(Plain())
    next(steps)
    next(steps)
    steps.close()
    walk.close()
    stages = []
    with Walk(open_path(model_folder("qwen3_moe")), texts(), settings(tmp_path)) as again:
        again.run(Plain(), resume=True, progress=lambda done, total: stages.append(done))
    assert stages == [1, 2, 3, 4, 5]


def test_two_passes_never_share_a_folder(tmp_path, whole):
    first = Walk(open_path(model_folder("qwen3_moe")), texts(), settings(tmp_path))
    steps = first.steps(Sums())
    next(steps)
    with pytest.raises(OutputConflict) as caught:
        finish(tmp_path)
    assert caught.value.code == "E603"
    steps.close()
    first.close()
    assert finish(tmp_path)[2] == [2, 3, 4, 5]


@pytest.mark.slow
def test_a_killed_process_is_continued(tmp_path, whole):
    """SIGKILL in the middle of a layer; the next process takes the pass up."""
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "architectures")]!r}
from pathlib import Path
from walk_models import Sums, texts
from surgeon.calibrate.walk import Settings, Walk
from surgeon.checkpoint.checkpoint import open_path
def observe(self, module, inputs, outputs, sample, plain=Sums.observe):
    if module == "model.layers.1.mlp.down_proj":
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, module, inputs, outputs, sample)
Sums.observe = observe
settings = Settings(threads=1, batch_tokens=64, spill=Path({str(tmp_path)!r}))
Walk(open_path(Path({str(model_folder("qwen3_moe"))!r})), texts(), settings).run(Sums())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == -9, done.stderr
    sums, hidden, stages = finish(tmp_path)
    assert stages == [3, 4, 5]
    assert sums.equal(whole[0]) and torch.equal(hidden, whole[1])

"""The pruning database: statistics and rankings against plain torch, resumption, and what it refuses."""

from __future__ import annotations

import functools
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "architectures"))
from walk_models import model_folder, stock, texts

from surgeon.calibrate.settings import Settings
from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.checkpoint import open_path
from surgeon.checkpoint.header import read_header
from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.prune.database import build, disk_bytes
from surgeon.prune.hessians import ChannelStatistics
from surgeon.prune.obs import removal_order
from surgeon.structure.find import structure_of

ONE = Settings(threads=1, batch_tokens=64)
FAMILIES = ("llama", "phi3", "gpt2", "bert")


@functools.cache
def rows_of(family):
    """Inputs of every matrix of the stock model, [tokens, in] float64, by the end of its path, and by sample."""
    model, found = stock(model_folder(family)), {}

    def keep(path):
        return lambda module, args: found.setdefault(path, []).append(
            args[0].detach().reshape(-1, args[0].shape[-1]).double()
        )

    for path, module in model.named_modules():
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2:
            module.register_forward_pre_hook(keep(path))
    with torch.no_grad():
        for sample in texts():
            model.base_model(torch.from_numpy(sample)[None])
    return found


def samples_of(family, module):
    return next(rows for path, rows in rows_of(family).items() if path.endswith(module))


def database(folder, family="llama", samples=None, settings=ONE, **options):
    checkpoint = open_path(model_folder(family))
    return build(checkpoint, structure_of(checkpoint), samples or texts(), settings, folder=folder, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


# ---- what is in it -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_stock_model(family, tmp_path):
    found = database(tmp_path, family, method="ziplm")
    structure = structure_of(open_path(model_folder(family)))
    for layer in range(structure.layers):
        for kind, parts in (("attention", structure.attention), ("ffn", structure.ffn)):
            rows = samples_of(family, parts[layer].output.module)
            x = torch.cat(rows)
            hessian = found.hessian(layer, kind)
            assert hessian.dtype == torch.float32
            wanted = x.T @ x / len(x)
            np.testing.assert_allclose(hessian, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
            moments = found.context(layer, kind, found.rankings[layer, kind, _mode(found, kind)].mode).moments
            assert moments.tokens == len(x)
            for name, value in {
                "mean": x.mean(0),
                "variance": x.var(0, correction=0),
                "norm": x.square().sum(0).sqrt(),
                "absolute": x.abs().mean(0),
                "active": (x != 0).sum(0),
            }.items():
                own = getattr(moments, name)
                np.testing.assert_allclose(own, value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
            assert moments.sample_absolute is None


def _mode(found, kind):
    return next(mode for _, one, mode in found.rankings if one == kind)


def test_statistics_by_sample_are_those_of_the_stock_model(tmp_path):
    found = database(tmp_path, method="minitron")
    rows = samples_of("llama", "layers.1.mlp.down_proj")
    wanted = torch.stack([row.abs().mean(0) for row in rows]).square().sum(0).sqrt()
    moments = found.context(1, "ffn", "channels").moments
    np.testing.assert_allclose(moments.sample_absolute, wanted, rtol=1e-5)
    with pytest.raises(InputError) as caught:
        found.hessian(1, "ffn")
    assert caught.value.code == "E312"


@pytest.mark.parametrize("family", FAMILIES)
def test_rankings_are_the_orders_of_the_matrices_as_linears(family, tmp_path):
    found = database(tmp_path, family)
    model = stock(model_folder(family))
    structure = structure_of(open_path(model_folder(family)))
    for (layer, kind, mode), ranking in found.rankings.items():
        part = (structure.attention if kind == "attention" else structure.ffn)[layer]
        path = next(p for p, _ in model.named_modules() if p.endswith(part.output.module))
        weight = model.get_submodule(path).weight.detach()
        weight = weight if part.output.input_axis == 1 else weight.T
        size, groups = 1, None
        if kind == "attention":
            size = part.head_dim * (part.per_group if mode == "groups" else 1)
            groups = part.groups if mode == "heads" else None
        wanted = removal_order(weight, found.hessian(layer, kind), size, groups=groups)
        assert ranking.order.tolist() == wanted.order.tolist()
        np.testing.assert_allclose(ranking.errors, wanted.errors, rtol=1e-9)
        assert (ranking.layer, ranking.kind, ranking.mode) == (layer, kind, mode)
        assert ranking.about["damp"] == 1e-2 and ranking.about["precision"] == "float64"
    modes = {"groups", "channels"} | ({"heads"} if family in ("llama", "phi3") else set())
    assert {mode for _, _, mode in found.rankings} == modes
    assert len(found.rankings) == 3 * len(modes)


def test_what_stays_is_named_as_a_cut_names_it(tmp_path):
    found = database(tmp_path)  # 4 query heads, 2 key/value heads, 48 channels
    groups, heads = found.ranking(0, "attention", "groups"), found.ranking(0, "attention", "heads")
    ffn = found.ranking(2, "ffn")
    first = int(groups.order[0])
    assert groups.units == 2 and groups.kept(1) == ((2, 3) if first == 0 else (0, 1))
    assert heads.units == 2 and heads.order.shape == (2, 2)
    assert heads.kept(1) == tuple(sorted(heads.order[1].tolist()))
    assert [head // 2 for head in heads.kept(1)] == [0, 1]
    for ranking, every in ((groups, 4), (heads, 4), (ffn, 48)):
        assert ranking.kept(0) == () and ranking.kept(ranking.units) == tuple(range(every))
        assert ranking.error(ranking.units) == 0 and ranking.error(0) == 1
        with pytest.raises(ValueError, match="cannot stay"):
            ranking.kept(ranking.units + 1)
    assert ffn.kept(47) == tuple(channel for channel in range(48) if channel != int(ffn.order[0]))
    assert ffn.error(47) == ffn.errors[1]


def test_channels_that_never_fire_are_counted_and_go_first(tmp_path):
    from surgeon.checkpoint.memory import MemoryCheckpoint
    from surgeon.kernels.cast import widen

    source = open_path(model_folder("llama"))
    state = {
        name: np.array(widen(source.read(name, 0, info.elements), info.dtype)).reshape(info.shape)
        for name, info in source.tensors.items()
    }
    state["model.layers.1.mlp.up_proj.weight"][[5, 9]] = 0
    changed = MemoryCheckpoint("changed", state)
    changed.config = source.config
    changed.folder = source.folder
    found = build(changed, structure_of(changed), texts(), ONE, folder=tmp_path, structures=("ffn",))
    assert found.ranking(1, "ffn").order[:2].tolist() == [5, 9]
    assert found.ranking(1, "ffn").error(46) == 0 < found.ranking(1, "ffn").error(45)
    counts = {name: entry["never_active"] for name, entry in found.record["modules"].items()}
    assert counts == {f"model.layers.{n}.mlp.down_proj": 2 * (n == 1) for n in range(3)}
    assert any("2 channels in 1 modules were never active" in note for note in found.notes)


def test_few_tokens_for_wide_matrices_are_said(tmp_path):
    few = database(tmp_path / "few", structures=("ffn",))
    assert any(f"use {4 * 48} or more" in note for note in few.notes)
    many = database(tmp_path / "many", samples=texts((40,) * 5), structures=("ffn",))
    assert many.notes == ()


def test_the_record_says_how_it_was_made(tmp_path):
    record = database(tmp_path, damp=0.02, seed=3).record
    assert record["method"] == "ziplm" and record["damp"] == 0.02 and record["seed"] == 3
    assert record["samples"] == 5 and record["tokens"] == sum(map(len, texts()))
    module = record["modules"]["model.layers.0.self_attn.o_proj"]
    assert module["tokens"] == record["tokens"] and module["heads"]["damp"] == 0.02
    assert str(tmp_path) not in str(record)


def test_disk_need_is_an_upper_bound_and_close(tmp_path):
    for method in ("ziplm", "flap", "magnitude"):
        found = database(tmp_path / method, method=method)
        structure = structure_of(open_path(model_folder("llama")))
        used = sum(len(content) for content in contents(found.folder).values())
        stated = disk_bytes(structure, method)
        assert used <= stated
    assert disk_bytes(structure) - disk_bytes(structure, "flap") == 4 * 3 * (48**2 + 32**2)
    assert disk_bytes(structure, structures=("ffn",)) < disk_bytes(structure)


def test_bfloat16_and_batches_change_little(tmp_path):
    whole = database(tmp_path / "a", structures=("ffn",))
    other = database(tmp_path / "b", structures=("ffn",), settings=Settings(threads=1, batch_tokens=13))
    rough = database(
        tmp_path / "c", structures=("ffn",), settings=Settings(threads=1, dtype="bfloat16", batch_tokens=64)
    )
    for layer in range(3):
        first, second, third = (one.hessian(layer, "ffn") for one in (whole, other, rough))
        np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-5)
        assert float((third - first).norm() / first.norm()) < 0.05


# ---- statistics alone --------------------------------------------------------------------------


def test_statistics_of_slices_and_blocks_join(tmp_path, monkeypatch):
    from surgeon.prune import hessians

    monkeypatch.setattr(hessians, "SLICE", 7)
    monkeypatch.setattr(hessians, "BLOCK", 5)
    monkeypatch.setattr(hessians, "ROWS", 3)
    x = torch.randn(50, 13, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for wide in (8192, 0):
        monkeypatch.setattr(hessians, "FLOAT64_COLUMNS", wide)
        path = tmp_path / f"{wide}.safetensors"
        observer = ChannelStatistics({"m": path}, lambda module: "key", frozenset({"hessian", "samples"}))
        for sample, rows in enumerate(x.split([20, 30])):
            observer.observe("m", rows, None, sample)
        observer.settle()
        header, about = tensor_file.find(path, "key")
        hessian = hessians.read_hessian(header)
        np.testing.assert_allclose(hessian, x.double().T @ x.double() / 50, rtol=2e-6, atol=2e-6)
        assert float((hessian - hessian.T).abs().max()) <= 1e-6 * float(hessian.abs().max())
        moments = hessians.read_moments(header, about)
        np.testing.assert_allclose(moments.mean, x.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance, x.double().var(0, correction=0), rtol=1e-12)
        halves = [rows.double().abs().mean(0) for rows in x.split([20, 30])]
        np.testing.assert_allclose(moments.sample_absolute, torch.stack(halves).norm(dim=0), rtol=1e-12)


def test_variance_survives_a_large_mean(tmp_path):
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(4000, 2, generator=draw, dtype=torch.float64) + 1e7).float()
    observer = ChannelStatistics({"m": tmp_path / "s"}, lambda module: "key", frozenset({"moments"}))
    observer.observe("m", x, None, None)
    observer.settle()
    from surgeon.prune.hessians import read_moments

    moments = read_moments(*tensor_file.find(tmp_path / "s", "key"))
    np.testing.assert_allclose(moments.variance, x.double().var(0, correction=0), rtol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_module(tmp_path, value):
    observer = ChannelStatistics({"m": tmp_path / "s"}, lambda module: "key", frozenset({"hessian"}))
    x = torch.ones(4, 3)
    x[1, 1] = value
    observer.observe("m", x, None, None)
    with pytest.raises(InputError) as caught:
        observer.settle()
    assert caught.value.code == "E384" and "activations of m" in caught.value.message
    assert list(tmp_path.iterdir()) == []


# ---- resumption --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    database(folder)
    return contents(folder)


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize(
    "moment", [("calibrating", 1), ("calibrating", 3), ("ranking units", 1), ("ranking units", 5)]
)
def test_a_run_that_was_stopped_goes_on_and_ends_in_identical_files(tmp_path, whole, spill, moment):
    settings = Settings(threads=1, batch_tokens=64, spill=tmp_path / "spill" if spill else None)
    stop = threading.Event()

    def tell(what, done, total):
        if (what, done) == moment:
            stop.set()

    with pytest.raises(Interrupted):
        database(tmp_path, settings=settings, progress=tell, stop=stop)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(before) < len(whole)
    seen = []
    database(tmp_path, settings=settings, progress=lambda *step: seen.append(step))
    assert contents(tmp_path) == whole
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert all(after[name] == stamp for name, stamp in before.items())  # nothing was made twice
    stages = [done for what, done, _ in seen if what == "calibrating"]
    if spill:
        assert stages[0] > 1  # the walk itself went on where it was


def test_a_finished_database_is_only_read(tmp_path, whole):
    database(tmp_path)
    seen = []
    database(tmp_path, progress=lambda *step: seen.append(step))
    assert {what for what, _, _ in seen} == {"ranking units"} and contents(tmp_path) == whole


@pytest.mark.parametrize("spill", [False, True])
def test_damaged_and_missing_results_are_made_again(tmp_path, whole, spill):
    settings = Settings(threads=1, batch_tokens=64, spill=tmp_path / "spill" if spill else None)
    database(tmp_path, settings=settings)
    (tmp_path / "layer-001.ffn.statistics.safetensors").unlink()
    broken = tmp_path / "layer-002.attention.heads.safetensors"
    broken.write_bytes(broken.read_bytes()[:-3])
    database(tmp_path, settings=settings)
    assert contents(tmp_path) == whole


def test_a_changed_setting_repeats_what_depends_on_it(tmp_path):
    def stamps():
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}

    database(tmp_path)
    first = stamps()
    database(tmp_path, damp=0.05)
    second = stamps()
    assert {name for name in first if first[name] != second[name]} == {
        n for n in first if "statistics" not in n
    }
    database(tmp_path, damp=0.05, samples=texts(seed=1))
    assert all(stamps()[name] != stamp for name, stamp in second.items())
    header = read_header(tmp_path / "layer-000.ffn.channels.safetensors")
    assert header.tensors["order"].dtype == "I32" and header.tensors["errors"].shape == (49,)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"method": "ziplmm"}, "E264"),
        ({"method": "../flap"}, "E264"),
        ({"structures": ("head",)}, "E265"),
        ({"structures": ()}, "E265"),
        ({"modes": ("channels",)}, "E265"),
        ({"damp": -0.1}, "E265"),
        ({"damp": float("nan")}, "E265"),
    ],
)
def test_wrong_requests_are_refused(tmp_path, options, code):
    with pytest.raises(UsageError) as caught:
        database(tmp_path, **options)
    assert caught.value.code == code


def test_a_model_with_nothing_to_rank_is_refused(tmp_path):
    checkpoint = open_path(model_folder("mixtral"))
    structure = structure_of(checkpoint)
    assert not any(structure.ffn)
    with pytest.raises(InputError) as caught:
        build(checkpoint, structure, texts(), ONE, folder=tmp_path, structures=("ffn",))
    assert caught.value.code == "E317"
    found = build(checkpoint, structure, texts(), ONE, folder=tmp_path)
    assert {kind for _, kind, _ in found.rankings} == {"attention"}
    with pytest.raises(InputError) as caught:
        found.ranking(0, "ffn")
    assert caught.value.code == "E316"


def test_an_unfinished_file_never_appears_under_its_name(tmp_path):
    target = tmp_path / "x.safetensors"
    with pytest.raises(KeyboardInterrupt), tensor_file.TensorFile(target, {"a": ("F32", (4,))}, {}) as out:
        out.write("a", np.zeros(2, np.float32))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="not complete"), tensor_file.TensorFile(target, {"a": ("F32", (4,))}, {}) as out:  # fmt: skip
        out.write("a", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="are due"), tensor_file.TensorFile(target, {"a": ("F32", (4,))}, {}) as out:  # fmt: skip
        out.write("a", np.zeros(5, np.float32))
    assert list(tmp_path.iterdir()) == []
    tensor_file.write(target, {"a": ("F32", np.ones((2, 2))), "b": ("I32", np.arange(3))}, {"key": "k"})
    header, about = tensor_file.find(target, "k")
    assert about == {"key": "k"} and tensor_file.find(target, "other") is None
    assert tensor_file.read(header, "b").tolist() == [0, 1, 2]
    assert tensor_file.read(header, "a").dtype == np.float32

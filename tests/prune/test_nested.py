"""Nested families: shapes inside one another, members equal to cuts of the source, a parent that computes what the source does."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "structure"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
import task
from structure_models import opened, write

from surgeon import api
from surgeon.calibrate import divided
from surgeon.checkpoint.checkpoint import open_path
from surgeon.deploy import members as families
from surgeon.deploy.build import load
from surgeon.errors import InputError, OutputConflict, UsageError
from surgeon.measure.compare import Measured
from surgeon.measure.environment import Environment
from surgeon.measure.table import LatencyTable
from surgeon.prune import nested, nested_shapes
from surgeon.prune.cost import SizeCost
from surgeon.prune.goal import Goal
from surgeon.prune.levels import ffn_multiples, useful_modes
from surgeon.prune.ranking import Ranking
from surgeon.prune.request import Target, build
from surgeon.prune.session import Session
from surgeon.structure.check import check, shapes
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.find import structure_of
from surgeon.structure.views import PrunedView

LONG = Path(__file__).resolve().parents[1] / "models" / "long"
STEP = 8


class Drawn:
    """A session over a tiny random model with drawn rankings: units and losses mean nothing, so nothing can be guessed."""

    def __init__(self, seed: int = 0, drops=((), (1,)), modes=None, tolerance: float = 0.1):
        self.checkpoint, self.structure = opened("qwen2", intermediate_size=64)
        plain = build(model="x", method="width", nested=True, sparsity=(0.2, 0.4), round_to=STEP)
        self.request = plain.model_copy(update={"tolerance": tolerance})
        self.structures, self.drops = ("heads", "ffn", "layers"), drops
        self.modes = useful_modes(self.structure) if modes is None else modes
        self.tell = lambda *_: None
        draw = np.random.default_rng(seed)
        self.weight = draw.random((self.structure.layers, 2))
        self._rankings = {}
        for layer, attention in enumerate(self.structure.attention):
            each, groups = attention.per_group, attention.groups
            heads = np.stack([draw.permutation(each) + g * each for g in range(groups)], 1)[
                :, draw.permutation(groups)
            ]
            for mode, order, size in (("groups", draw.permutation(groups), each), ("heads", heads, 1)):
                self._add(layer, "attention", mode, order, size, draw)
            self._add(layer, "ffn", "channels", draw.permutation(self.structure.ffn[layer].width), 1, draw)

    def _add(self, layer, kind, mode, order, size, draw):
        errors = np.r_[0.0, np.sort(draw.random(len(order) - 1)), 1.0]
        self._rankings[layer, kind, mode] = Ranking(layer, kind, mode, order.astype(np.int32), errors, size)

    def ranking(self, layer, kind, mode):
        return self._rankings[layer, kind, mode]

    def writable(self, cut):
        try:
            check(cut, self.structure, self.checkpoint.config, for_stock=True)
        except (UsageError, InputError):
            return False
        return True

    def loss(self, cut: Cut) -> float:
        """Weighted numbers of removed units."""
        total = 0.0
        for layer, kept in enumerate(cut.layers):
            whole = self.structure.shape(layer)
            heads = 0 if kept is None else whole.heads if kept.heads is None else len(kept.heads)
            ffn = 0 if kept is None else whole.ffn if kept.channels is None else len(kept.channels)
            gone = 1 - heads / whole.heads, 1 - ffn / whole.ffn
            total += self.weight[layer] @ np.array(gone)
        return float(total)

    def true_loss(self, cuts, weights=None):
        assert weights is None, "members have the parent's weights"
        return [self.loss(cut) for cut in cuts]

    def every_cut(self):
        """Yield (mode, drop, cut) of all uniform cuts."""
        first = self.structure.attention[0]
        sizes = [("", 0)] + [(mode, count) for mode in self.modes
                             for count in range(1, first.groups if mode == "groups" else first.per_group)]  # fmt: skip
        for (mode, count), width, drop in itertools.product(sizes, ffn_multiples(64, STEP), self.drops):
            layers = []
            for layer in range(self.structure.layers):
                heads = self.ranking(layer, "attention", mode).kept(count) if mode else None
                channels = self.ranking(layer, "ffn", "channels").kept(width) if width < 64 else None
                layers.append(None if layer in drop else LayerCut(heads, channels))
            yield mode, drop, Cut(tuple(layers))

    def goals(self, *shares):
        cost = SizeCost(self.checkpoint, self.structure)
        return [Goal("params", cost.dense - share * cost.prunable(), cost) for share in shares]


def units(cut: Cut, session: Drawn) -> set:
    """Return everything a cut keeps, by hand."""
    found = set()
    for layer, kept in enumerate(cut.layers):
        if kept is not None:
            whole = session.structure.shape(layer)
            found |= {(layer, "h", u) for u in (range(whole.heads) if kept.heads is None else kept.heads)}
            found |= {(layer, "f", u) for u in (range(whole.ffn) if kept.channels is None else kept.channels)}
            found.add((layer,))
    return found


def targets(*values: float, kind: str = "params") -> list[Target]:
    return [Target(kind, value) for value in values]


# ---- shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_every_member_is_the_best_that_lies_inside_the_larger(seed):
    """All cuts are listed; of each attention and depth the widest FFN inside the larger counts; the least loss wins."""
    session = Drawn(seed=seed)
    goals = session.goals(0.2, 0.45, 0.7)
    names = targets(*(goal.value for goal in goals))
    family = nested_shapes.decide_family(session, names, goals, nested_shapes.PlainLosses(session))
    larger, mode, exact = None, "", list[bool]()
    for goal, decision in zip(goals, family.decisions, strict=True):
        cost, fewest = goal.cost.total, set() if larger is None else set(range(3)) - set(larger.kept_layers)
        widest = {}
        for own, drop, cut in session.every_cut():
            inner = larger is None or units(cut, session) <= units(larger, session)
            if cost(cut) > goal.budget or not inner or (mode and own not in ("", mode)):
                continue
            shape = shapes(cut, session.structure)[0]
            key = (own, shape.heads, shape.groups, drop)
            if key not in widest or cost(cut) > cost(widest[key][1]):
                widest[key] = (own, cut)
        in_band = [cut for _, cut in widest.values() if cost(cut) >= 0.9 * goal.budget]
        listed = {cut: own for own, cut in widest.values()}
        assert decision.cut in listed and cost(decision.cut) <= goal.budget
        assert decision.loss == pytest.approx(session.loss(decision.cut))
        if in_band:
            assert decision.cut == min(in_band, key=session.loss) and decision.remarks == ()
        else:  # sizes are too coarse: nothing nearer to the budget may be better, and the user is told
            nearer = [cut for cut in listed if cost(cut) >= cost(decision.cut)]
            assert session.loss(decision.cut) == min(map(session.loss, nearer))
            assert "too coarse" in decision.remarks[0]
        exact.append(bool(in_band))
        assert fewest <= set(range(3)) - set(decision.cut.kept_layers)
        assert larger is None or units(decision.cut, session) < units(larger, session)
        larger, mode = decision.cut, mode or listed[decision.cut]
    assert family.mode == mode and sum(exact) >= 2


def test_a_family_keeps_to_the_unit_that_it_began_with():
    """Losses that would like groups for one member and heads for the next: the second follows the first."""
    found = set()
    for seed in range(12):
        session = Drawn(seed=seed, drops=((),))
        session.loss = lambda cut, s=session: (
            float(np.random.default_rng(hash(cut) % 2**32).random()) + 0 * s.structure.layers
        )
        goals = session.goals(0.3, 0.6)
        family = nested_shapes.decide_family(
            session, targets(1, 2), goals, nested_shapes.PlainLosses(session)
        )
        found.add(family.mode)
        for cut in family.cuts:
            for layer, kept in enumerate(cut.layers):
                attention = session.structure.attention[layer]
                if kept.heads is None:
                    continue
                groups = {head // attention.per_group for head in kept.heads}
                if family.mode == "heads":
                    assert len(groups) == attention.groups
                else:
                    assert len(kept.heads) == len(groups) * attention.per_group
    assert {"groups", "heads"} <= found


@pytest.mark.parametrize("mode", ["groups", "heads"])
def test_what_lies_inside_what(mode):
    session = Drawn(modes=(mode,))
    cuts = [cut for _, _, cut in session.every_cut()]
    for one, other in itertools.product(cuts[::3], cuts[::5]):
        assert nested_shapes.lies_inside(one, other, session.structure) == (
            units(one, session) <= units(other, session)
        )


@pytest.mark.parametrize("mode", ["groups", "heads"])
def test_members_of_the_sorted_parent_are_the_cuts_that_were_decided(mode, scratch):
    session = Drawn(modes=(mode,), drops=((),), seed=3)
    family = nested_shapes._shares(session, targets(0.34, 0.5, kind="sparsity"))
    assert family.mode == mode
    orders = nested_shapes.orders(session, family)
    parent = families.permute(session.checkpoint, session.structure, orders)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(6, 60, (2, 12)))

    def logits(view, name):
        with torch.no_grad():
            return load(write(view, scratch / name)).float()(input_ids=tokens).logits

    assert torch.allclose(logits(parent, "parent"), logits(session.checkpoint, "source"), atol=1e-4)
    kinds = []
    for number, cut in enumerate(family.cuts):
        member = families.Member("m", nested_shapes.kept_in_front(cut, session.structure))
        ours = logits(PrunedView(parent, session.structure, member.cut(session.structure)), f"ours{number}")
        theirs = logits(PrunedView(session.checkpoint, session.structure, cut), f"theirs{number}")
        assert torch.allclose(ours, theirs, atol=1e-4)
        kinds.append(theirs)
    assert float((kinds[0] - kinds[1]).abs().max()) > 1e-3  # the cuts matter
    # Without sorting the front would be other units.
    plain = PrunedView(session.checkpoint, session.structure, families.Member("m", nested_shapes.kept_in_front(family.cuts[0], session.structure)).cut(session.structure))  # fmt: skip
    assert float((logits(plain, "plain") - kinds[0]).abs().max()) > 1e-3


def test_shares_round_up_and_share_one_unit():
    session = Drawn(drops=((),))
    family = nested_shapes._shares(session, targets(0.3, 0.6, kind="sparsity"))
    for share, cut in zip((0.3, 0.6), family.cuts, strict=True):
        assert all(len(kept.channels) == STEP * math.ceil(64 * (1 - share) / STEP) for kept in cut.layers)
    assert units(family.cuts[1], session) < units(family.cuts[0], session)


def test_targets_that_cannot_be_told_apart_or_reached():
    session = Drawn()
    goals = session.goals(0.3, 0.301)
    with pytest.raises(UsageError, match="E264") as refused:
        nested_shapes.decide_family(session, targets(5, 4), goals, nested_shapes.PlainLosses(session))
    assert "params=4" in refused.value.message and "params=5" in refused.value.message
    goals = session.goals(0.3, 0.999)
    with pytest.raises(UsageError, match="E264") as refused:
        nested_shapes.decide_family(session, targets(5, 4), goals, nested_shapes.PlainLosses(session))
    assert "params=4" in (refused.value.help or "") and "inside" in (refused.value.help or "")


# ---- the whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    import random

    file = tmp_path_factory.mktemp("text") / "sums.jsonl"
    draw, asked = random.Random(1), task.questions("train", 5)
    lines = [json.dumps({"text": task.solve(next(asked), 0.0, draw)}) for _ in range(40)]
    file.write_text("\n".join(lines) + "\n")
    return file


def options(calibration: Path, **extra) -> dict:
    return {"nested": True, "calibration": (str(calibration),), "samples": 24, "sequence_length": 96, "threads": 1,
            "structures": ("heads", "ffn"), **extra}  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory, calibration):
    place = tmp_path_factory.mktemp("nested")
    document = api.prune(LONG, place / "family", target_params=(1.0e6, 0.8e6, 0.6e6), **options(calibration))
    return place / "family", document


TOKENS = torch.from_numpy(np.random.default_rng(0).integers(6, 281, (3, 40)))


def full_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, dtype=torch.float32)(input_ids=TOKENS).logits


def test_the_parent_computes_what_the_source_does(family):
    folder, _ = family
    ours, theirs = full_logits(folder), full_logits(LONG)
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())
    found, whole = {}, {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    for file in LONG.glob("*.safetensors"):
        whole |= load_file(file)
    assert found.keys() == whole.keys()
    moved = [name for name in whole if not torch.equal(found[name], whole[name])]
    assert moved and all(".mlp." in name or ".self_attn." in name for name in moved)
    assert all(
        torch.equal(found[n].sort().values.flatten().sort().values, whole[n].flatten().sort().values)
        for n in moved
    )
    assert api.verify(folder).errors == []


def test_members_are_extracted_bit_for_bit_and_have_the_quality_that_was_said(family, calibration, scratch):
    folder, document = family
    parent = open_path(folder)
    structure = structure_of(parent)
    record = families.read_members((folder / "members.json").read_bytes())
    assert [member.name for member in record] == ["params=1M", "params=800000", "params=600000"]
    sizes = [member.figures["parameters"] for member in record]
    assert (
        all(size <= limit for size, limit in zip(sizes, (1.0e6, 0.8e6, 0.6e6), strict=True))
        and sizes == sorted(sizes)[::-1]
    )
    request = build(model=str(LONG), target_params=(1.0e6, 0.8e6), **options(calibration))
    held_out = divided.load(
        request.calibration, LONG, samples=request.samples, sequence_length=request.sequence_length, seed=request.seed,
        offline=request.offline,
    ).held_out  # fmt: skip
    for member, said in zip(record, document["members"][0]["members"], strict=True):
        out = scratch / member.name
        api.export(folder, out, member=member.name)
        view, state = (
            PrunedView(parent, structure, member.cut(structure)),
            load_file(out / "model.safetensors"),
        )
        assert state.keys() == set(view.tensors)
        for name, tensor in state.items():
            values = np.array(view.read(name, 0, tensor.numel()))
            assert np.array_equal(tensor.view(torch.int16).numpy().ravel().view(np.uint16), values)
        model = load(out, dtype=torch.float32)
        assert (
            sum(p.numel() for p in model.parameters()) == member.figures["parameters"] == said["parameters"]
        )
        losses, count = 0.0, 0
        for ids in held_out:  # by hand, on the whole model
            row = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]
            with torch.no_grad():
                scores = torch.log_softmax(model(input_ids=row).logits[0, :-1].double(), -1)
            losses -= float(scores.gather(1, row[0, 1:, None]).sum())
            count += row.shape[1] - 1
        assert member.figures["quality"]["perplexity"][1] == pytest.approx(math.exp(losses / count), rel=1e-3)
    remarks = " ".join(document["members"][0]["remarks"])
    assert "nothing was solved again" in remarks and all(member.name in remarks for member in record)


def test_quality_falls_as_members_shrink_and_no_time_is_recorded(family):
    folder, document = family
    record = json.loads((folder / "members.json").read_bytes())
    losses = [entry["figures"]["quality"]["kl"] for entry in record["members"]]
    assert losses == sorted(losses) and losses[0] > 0
    for file in ("members.json", "surgeon.json", "README.md"):
        said = (folder / file).read_text()
        assert (
            str(folder.parent) not in said
            and "seconds" not in said
            and "measured" not in said.replace('"measured": {}', "")
        )
    assert document["members"][0]["name"] == "nested family"


def test_equal_runs_give_equal_folders_and_the_same_run_again_does_nothing(family, calibration, scratch):
    folder, _ = family
    same = options(calibration)
    api.prune(LONG, scratch / "family", target_params=(1.0e6, 0.8e6, 0.6e6), **same)
    for path in folder.iterdir():
        assert (scratch / "family" / path.name).read_bytes() == path.read_bytes(), path.name
    stamp = (scratch / "family" / "members.json").stat().st_mtime_ns
    again = api.prune(LONG, scratch / "family", target_params=(1.0e6, 0.8e6, 0.6e6), **same)
    assert again["output"]["unchanged"] and (scratch / "family" / "members.json").stat().st_mtime_ns == stamp
    with pytest.raises(OutputConflict, match="E601"):
        api.prune(LONG, scratch / "family", target_params=(1.0e6, 0.7e6), **same)


def test_a_dry_run_writes_nothing(calibration, scratch):
    document = api.prune(
        LONG, scratch / "family", target_params=(1.0e6, 0.8e6), dry_run=True, **options(calibration)
    )
    assert document["status"] == "dry-run" and list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ({"target_params": (1.0e6, 0.8e6), "sequential": True}, "E267"),
        ({"target_params": (1.0e6, 0.8e6), "allow_norm_approx": True}, "E267"),
        (
            {
                "sparsity": (0.2, 0.4),
                "method": "width",
                "criterion": "minitron",
                "structures": ("ffn", "hidden"),
            },
            "E267",
        ),
        ({"target_params": (1.0e6,)}, "E267"),
    ],
)
def test_options_without_effect_are_refused(extra, code, calibration, scratch):
    with pytest.raises(UsageError, match=code):
        api.prune(LONG, scratch / "family", **{**options(calibration), **extra})
    assert not (scratch / "family").exists()


# ---- timing -----------------------------------------------------------------------------------------


def made_up(structure, checkpoint) -> LatencyTable:
    """A table of a machine whose attention costs a tenth and whose FFN nearly all."""
    full = structure.shape(0)
    heads = {
        (full.groups * each, full.groups): 1e-4 * each for each in range(1, full.heads // full.groups + 1)
    }
    heads |= {
        (groups * (full.heads // full.groups), groups): 1e-4 * groups for groups in range(1, full.groups + 1)
    }
    attention = {**heads, (0, 0): 0.0}
    ffn = {width: 1e-5 * width for width in (*ffn_multiples(full.ffn, 8), 0)}
    here = Environment("cpu", "made up", 1, "float32", "2", "5", "sdpa", "none")
    from surgeon.measure.workload import Workload

    return LatencyTable(here, Workload("prefill", 1, 64, 1), "model", structure.layers, full, 1e-3, attention, ffn,
                        dict.fromkeys(attention, 0.0), dict.fromkeys(ffn, 0.0))  # fmt: skip


@pytest.mark.parametrize("slow", [pytest.param(1.0, marks=pytest.mark.slow), 1.6])
def test_members_are_timed_and_the_table_corrected_until_they_meet_their_targets(
    slow, calibration, scratch, monkeypatch
):
    """The machine's FFNs are ``slow`` times what the table says: the first family is too fast, a later one is right."""
    checkpoint = open_path(LONG)
    structure = structure_of(checkpoint)
    table = made_up(structure, checkpoint)
    truth = table.corrected(ffn=slow)
    timed = []

    def speedup(dense, pruned, workload, conditions, **_):
        assert Path(dense) == LONG
        config = load(Path(pruned)).config  # what is timed is a member as it is extracted
        one = SimpleNamespace(
            heads=config.num_attention_heads, groups=config.num_key_value_heads, ffn=config.intermediate_size
        )
        ratio = truth.speedup([one] * config.num_hidden_layers)
        timed.append(ratio)
        return Measured(
            ratio,
            ratio * 0.999,
            ratio * 1.001,
            9,
            1.0,
            1 / ratio,
            True,
            0.01,
            table.workload,
            table.environment,
            {},
        )

    monkeypatch.setattr(nested, "speedup", speedup)
    monkeypatch.setattr(Session, "table", table)
    document = api.prune(LONG, scratch / "family", target_speedup=(1.3, 1.8), **options(calibration))
    entries = document["members"][0]["members"]
    assert [entry["speedup"]["verdict"] for entry in entries] == ["met", "met"]
    for entry, target in zip(entries, (1.3, 1.8), strict=True):
        assert abs(entry["speedup"]["measured"] / target - 1) < 0.031
    assert len(timed) == 2 if slow == 1.0 else 2 < len(timed) <= 8
    record = (scratch / "family" / "members.json").read_text()
    assert "speedup=1.3" in record and str(entries[0]["speedup"]["measured"]) not in record
    assert not (scratch / "family.work").exists()

"""Every way a request of `surgeon prune` is refused: by one sentence, with the right exit code, before calibration."""

from __future__ import annotations

import json
import shutil

import pruning_runs as runs
import pytest

from surgeon.errors import InputError, UsageError
from surgeon.prune import request

SHORT = ("--samples", 12, "--sequence-length", 64)


@pytest.fixture
def machine(monkeypatch):
    return runs.install(monkeypatch, runs.Machine())


@pytest.fixture
def refused(capsys, scratch, machine, monkeypatch):
    """Run a request that must be refused before anything is calibrated; return what was said."""
    from surgeon.prune import database

    monkeypatch.setattr(database, "build", lambda *a, **k: pytest.fail("calibrated before it was refused"))
    text = runs.text(scratch / "cal.jsonl")

    def run(code, exit_code, *arguments, calibration=text):
        before = runs.snapshot(scratch)
        ran = runs.command(
            capsys, "prune", *arguments, "-o", scratch / "out", *SHORT, "--calibration", calibration
        )
        assert f"error[{code}]" in ran.err, ran.err
        assert ran.code == exit_code, ran.err
        found = runs.snapshot(scratch)
        left = {name for name in found.keys() - before.keys() if not name.startswith("out.work/prune/table-")}
        assert not left and not (scratch / "out").exists()
        return ran.err

    return run


OPTIONS = [
    ("E266", {}, "one kind of target, none given"),
    ("E266", {"target_speedup": 1.5, "sparsity": 0.5}, "--target-speedup, --sparsity given"),
    ("E266", {"target_speedup": 1.0}, "1 is not above 1"),
    ("E266", {"target_speedup": float("nan")}, "is not above 1"),
    ("E266", {"target_params": float("nan")}, "is no size"),
    ("E266", {"target_size": float("inf")}, "is no size"),
    ("E266", {"target_params": 0}, "is no size"),
    ("E266", {"sparsity": 1.0}, "between 0 and 1"),
    ("E266", {"sparsity": float("nan")}, "between 0 and 1"),
    ("E266", {"method": "wanda", "target_speedup": 2}, "leaves every shape as it is"),
    ("E266", {"pattern": "2:4"}, "--pattern is for"),
    ("E266", {"method": "wanda", "pattern": "2-4"}, "is not N:M"),
    ("E266", {"keep_layers": 3}, "--keep-layers is for --method depth"),
    ("E266", {"method": "wanda", "sparsity": (0.3, 0.5)}, "one model at a time"),
    ("E265", {"method": "zipml", "sparsity": 0.5}, 'unknown pruning method "zipml"'),
    ("E265", {"method": "width", "criterion": "flop", "sparsity": 0.5}, 'unknown criterion "flop" of width'),
    ("E265", {"criterion": "flap", "sparsity": 0.5}, "ziplm has no --criterion"),
    ("E267", {"method": "depth", "sparsity": 0.5, "layout": "per-layer"}, "--layout has no effect on depth"),
    ("E267", {"method": "depth", "sparsity": 0.5, "sequential": True}, "--sequential has no effect on depth"),
    ("E267", {"sparsity": 0.5, "mode": "decode"}, "--mode has no effect without --target-speedup"),
    ("E267", {"sparsity": 0.5, "context": 64}, "--context has no effect without --target-speedup"),
    ("E267", {"sparsity": 0.5, "measure": False}, "--no-measure has no effect without --target-speedup"),
    ("E267", {"sparsity": 0.5, "distill_steps": 5}, "--distill-steps has no effect without --distill"),
    ("E267", {"sparsity": 0.5, "structures": ("layers",)}, "names neither"),
    ("E267", {"sparsity": 0.5, "structures": ("hidden", "ffn")}, "the hidden size is only cut"),
    ("E267", {"method": "width", "criterion": "minitron", "target_params": 5, "structures": ("hidden", "ffn")}, "hidden"),
    ("E267", {"method": "width", "sparsity": 0.5, "structures": ("ffn", "layers")}, "layers in --structures has no effect"),
    ("E267", {"method": "width", "sparsity": 0.5, "layout": "per-layer"}, "--layout per-layer has no effect here"),
    ("E267", {"sparsity": 0.5, "protect_layers": (0,)}, "--protect-layers cannot be kept in a uniform layout"),
    ("E267", {"sparsity": 0.5, "nested": True}, "--nested needs two or more targets"),
    ("E267", {"sparsity": (0.2, 0.5), "nested": True, "distill": True}, "no --distill"),
    ("E267", {"sparsity": (0.2, 0.5), "layout": "per-layer", "distill": True}, "--layout per-layer cannot take up"),
    ("E268", {"sparsity": 0.5, "layout": "ragged"}, '--layout is "ragged": input should be'),
    ("E268", {"sparsity": 0.5, "structures": ("head",)}, '--structures is "head": input should be'),
    ("E268", {"sparsity": 0.5, "dtype": "int8"}, '--dtype is "int8": input should be'),
    ("E268", {"sparsity": 0.5, "damp": 0}, "--damp is 0: input should be greater than 0"),
    ("E268", {"sparsity": 0.5, "damp": float("nan")}, "--damp is nan: input should be"),
    ("E268", {"target_speedup": 2, "tolerance": 0.9}, "--tolerance is 0.9: input should be"),
    ("E268", {"sparsity": 0.5, "colour": "red"}, "prune has no option --colour"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "options", "said"), OPTIONS, ids=[f"{n}-{o[2][:28]}" for n, o in enumerate(OPTIONS)]
)
def test_options_that_do_not_go_together_are_refused(code, options, said):
    with pytest.raises(UsageError) as caught:
        request.build(model="m", **options)
    assert caught.value.code == code and said in caught.value.message and caught.value.help
    assert len(caught.value.message) < 200


def test_unprintable_characters_do_not_reach_the_terminal():
    with pytest.raises(UsageError) as caught:
        request.build(model="m", method="\x1b[31m", sparsity=0.5)
    assert "\x1b" not in str(caught.value)


def test_criteria_may_be_written_with_dashes():
    asked = request.build(model="m", method="depth", criterion="Block-Influence", keep_layers=3)
    assert asked.solver == "block_influence"


# ---- targets out of reach (J6) -------------------------------------------------------------------


def test_J6_unreachable_targets_are_refused_before_calibration_with_what_is_reachable(refused, scratch):
    model = runs.small(scratch / "model")
    said = refused("E264", 2, model, "--target-speedup", 30)
    assert "speedup 30.0 cannot be reached: at most" in said and "help: between 1.00x and" in said
    assert "at most" in refused("E264", 2, model, "--method", "depth", "--target-speedup", 5)
    assert "cannot be reached: at least" in refused("E264", 2, model, "--target-params", "50K")
    assert "asks for nothing" in refused("E264", 2, model, "--target-params", "3B")
    assert "MB" in refused("E264", 2, model, "--target-size", "90kB")
    assert "cannot be reached" in refused("E264", 2, model, "--sparsity", 0.99, "--structures", "ffn")
    assert "2 to 3" in refused("E264", 2, model, "--method", "depth", "--keep-layers", 1)
    assert "2 to 3" in refused("E264", 2, model, "--method", "depth", "--keep-layers", 4)
    assert "a share from 0.250 to 0.500" in refused("E264", 2, model, "--method", "depth", "--sparsity", 0.9)
    refused("E264", 2, model, "--method", "width", "--criterion", "magnitude", "--sparsity", 0.001)


def test_J6_what_the_first_check_lets_through_the_search_reaches(scratch, machine, capsys):
    """The limit named in a refusal can be asked for."""
    model = runs.small(scratch / "model")
    text = runs.text(scratch / "cal.jsonl")
    for kind in (("--structures", "ffn"), ("--structures", "heads,ffn,layers"), ("--layout", "per-layer")):
        given = (
            model,
            "-o",
            scratch / "out",
            *SHORT,
            "--calibration",
            text,
            "--overwrite",
            "--no-resume",
            *kind,
        )
        said = runs.command(capsys, "prune", *given, "--target-speedup", 99).err
        most = said.partition("cannot be reached: at most ")[2].partition("x")[0]
        ran = runs.command(capsys, "prune", *given, "--target-speedup", most, "--search", "dp", "--json")
        assert ran.code == 0, (kind, ran.err)
        assert ran.document["members"][0]["speedup"]["measured"] >= 0.97 * float(most)


def test_protected_layers_and_rounding_that_cannot_be_are_refused(refused, scratch):
    model = runs.small(scratch / "model")
    assert "layers 0 to 3" in refused(
        "E267", 2, model, "--method", "depth", "--keep-layers", 3, "--protect-layers", "4"
    )
    assert "of 432 channels" in refused("E269", 2, model, "--sparsity", 0.3, "--round-to", 500)
    assert "protect" in refused(
        "E267", 2, model, "--method", "depth", "--keep-layers", 3, "--protect-layers", "0,1,2,3"
    )


def test_J7_tables_that_do_not_fit_are_refused_before_calibration(refused, scratch, machine, capsys):
    from dataclasses import replace

    from surgeon.measure.workload import Workload

    model, file = runs.small(scratch / "model"), scratch / "table.json"
    asked = (model, "--target-speedup", 1.5, "--latency-table", file)
    table = runs.table_of(machine, model, Workload())
    replace(table, environment=replace(runs.HERE, device_name="Another CPU", threads=8)).save(file)
    said = refused("E516", 5, *asked)
    assert "Another CPU there, Made up here" in said and "--table-anyway" in said
    text = scratch / "cal.jsonl"
    table.save(file)
    refused("E283", 2, *asked, "--mode", "decode")
    replace(table, model="another").save(file)
    assert "other sizes" in refused("E283", 2, *asked)
    file.write_text("{}")
    refused("E283", 2, *asked)
    file.unlink()
    ran = runs.command(capsys, "prune", *asked, "-o", scratch / "out", *SHORT, "--calibration", text)
    assert ran.code in (2, 3, 5) and "table.json" in ran.err


def test_J7_a_table_of_another_machine_may_be_used_anyway(scratch, machine, capsys):
    from dataclasses import replace

    from surgeon.measure.workload import Workload

    model, file, text = (
        runs.small(scratch / "model"),
        scratch / "table.json",
        runs.text(scratch / "cal.jsonl"),
    )
    table = runs.table_of(machine, model, Workload())
    replace(table, environment=replace(runs.HERE, threads=8)).save(file)
    ran = runs.command(capsys, "prune", model, "--target-speedup", 1.5, "--latency-table", file, "--table-anyway",
                       "-o", scratch / "out", *SHORT, "--calibration", text, "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "used anyway" in " ".join(ran.document["table"]["notes"]) and machine.tables == 0


def test_a_workload_that_an_encoder_does_not_have_is_refused(refused, scratch):
    assert "generates nothing" in refused(
        "E280", 2, runs.tiny("bert", scratch / "bert"), "--target-speedup", 1.5, "--mode", "mix"
    )


# ---- text (J3) -----------------------------------------------------------------------------------


def test_J3_text_that_cannot_be_divided_is_refused_before_the_latency_table_is_measured(
    refused, scratch, machine
):
    model = runs.small(scratch / "model")
    few = scratch / "few.jsonl"
    few.write_text('{"text": "three plus five"}\n{"text": "two plus two"}\n')
    said = refused("E314", 3, model, "--target-speedup", 1.5, calibration=few)
    assert "gives 2 samples" in said and "at least 3" in said and machine.tables == 0
    empty = scratch / "empty.jsonl"
    empty.write_text("")
    refused("E372", 3, model, "--target-speedup", 1.5, calibration=empty)
    refused("E370", 3, model, "--target-speedup", 1.5, calibration=scratch / "absent.jsonl")
    assert machine.tables == 0


def test_J3_fewer_samples_than_asked_for_are_said_and_recorded(capsys, scratch, machine):
    model, text = runs.small(scratch / "model"), runs.text(scratch / "cal.jsonl", 9)
    ran = runs.command(capsys, "prune", model, "-o", scratch / "out", "--sparsity", 0.3, "--samples", 40,
                       "--sequence-length", 64, "--calibration", text, "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "7 calibration samples for statistics, not 40" in " ".join(ran.document["warnings"])
    recorded = json.loads((scratch / "out" / "surgeon.json").read_text())["recipe"]["calibration"]
    assert recorded["statistics"]["samples"] == 7 and recorded["held_out"]["samples"] == 1


# ---- models --------------------------------------------------------------------------------------


def test_models_that_cannot_be_pruned_are_refused(refused, scratch, machine):
    model = runs.small(scratch / "model")
    bare = scratch / "bare.safetensors"
    shutil.copy(runs.TESTS / "models" / "short" / "model.safetensors", bare)
    assert "config.json" in refused("E365", 3, bare, "--target-speedup", 1.5)
    (model / "tokenizer.json").rename(scratch / "tokenizer.json")
    assert "has no tokenizer" in refused("E375", 3, model, "--target-speedup", 1.5)
    (scratch / "tokenizer.json").rename(model / "tokenizer.json")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    assert "quantized (gptq)" in refused("E311", 3, model, "--target-speedup", 1.5)
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert "structures are not known" in refused("E365", 3, model, "--target-speedup", 1.5)
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    assert "is missing" in refused("E365", 3, model, "--target-speedup", 1.5)
    assert machine.tables == 0


def test_D1_weights_that_are_not_finite_are_refused_and_nothing_is_published(capsys, scratch, machine):
    import torch
    from safetensors.torch import load_file, save_file

    model, text = runs.small(scratch / "model"), runs.text(scratch / "cal.jsonl")
    shard = model / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name][3, 5] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    for method in (("ziplm",), ("depth",), ("width", "--criterion", "minitron")):
        ran = runs.command(capsys, "prune", model, "-o", scratch / "out", "--sparsity", 0.3, "--method", *method,
                           *SHORT, "--calibration", text)  # fmt: skip
        assert ran.code == 3 and "not finite" in ran.err, (method, ran.err)
        assert not (scratch / "out").exists()


def test_shapes_no_class_holds_are_refused_before_calibration(refused, scratch):
    gpt2, bert = runs.tiny("gpt2", scratch / "gpt2"), runs.tiny("bert", scratch / "bert")
    qwen, mixtral = runs.small(scratch / "qwen"), runs.tiny("mixtral", scratch / "mixtral")
    assert "heads" in refused("E367", 3, gpt2, "--sparsity", 0.3, "--structures", "heads,ffn")
    refused("E367", 3, bert, "--sparsity", 0.3, "--structures", "heads")
    refused("E327", 3, gpt2, "--sparsity", 0.3, "--layout", "per-layer")
    assert "a bias" in refused("E369", 3, qwen, "--method", "width", "--sparsity", 0.3)
    said = refused("E317", 3, mixtral, "--method", "ziplm", "--sparsity", 0.3, "--structures", "ffn")
    assert "routed experts" in said and "leave ffn out" in said
    refused("E368", 3, runs.tiny("gemma2", scratch / "gemma2"), "--method", "width", "--criterion", "minitron",
            "--sparsity", 0.4, "--structures", "heads,ffn,hidden")  # fmt: skip


def test_places_that_are_inputs_are_refused(capsys, scratch, machine):
    model, text = runs.small(scratch / "model"), runs.text(scratch / "cal.jsonl")
    given = ("--sparsity", 0.3, *SHORT, "--calibration", text)
    for output, more in ((model, ()), (model / "inner", ()), (scratch / "out", ("--work", model / "w"))):
        ran = runs.command(capsys, "prune", model, "-o", output, *given, *more)
        assert ran.code == 6 and "error[E602]" in ran.err, ran.err
    ran = runs.command(capsys, "prune", model, "-o", scratch / "no" / "where", *given)
    assert ran.code == 5 and "error[E502]" in ran.err


def test_no_model_is_a_usage_error(capsys, scratch, monkeypatch):
    monkeypatch.chdir(scratch)
    ran = runs.command(capsys, "prune", "--target-speedup", 1.5)
    assert ran.code == 2 and "error[E204]" in ran.err


def test_too_little_memory_or_disk_is_said_before_the_work(capsys, scratch, machine, monkeypatch):
    from collections import namedtuple

    model, text = runs.small(scratch / "model"), runs.text(scratch / "cal.jsonl")
    given = (model, "-o", scratch / "out", "--target-speedup", 1.5, *SHORT, "--calibration", text)
    ran = runs.command(capsys, "prune", *given, "--memory-limit", "2MB")
    assert ran.code == 5 and "error[E517]" in ran.err and "--no-measure" in ran.err
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 0, 10**5))
    ran = runs.command(capsys, "prune", *given)
    assert ran.code == 5 and "error[E501]" in ran.err and machine.tables == 0


def test_bad_numbers_on_the_command_line_name_the_option(capsys):
    for option, value in (("--target-params", "3X"), ("--target-size", "6QB"), ("--keep-layers", "2.5"), ("--sparsity", "half"),
                          ("--structures", ","), ("--protect-layers", "a"), ("--round-to", "many")):  # fmt: skip
        ran = runs.command(capsys, "prune", ".", option, value)
        assert ran.code == 2 and option in ran.err, (option, ran.err)


def test_depth_rankings_that_do_not_go_far_enough_are_input_for_another_choice(scratch):
    from surgeon.prune import layer_order
    from surgeon.prune.depth_ranking import DepthRanking

    class Asked:
        protect_layers = (2,)

    class Stub:
        request, work, key = Asked(), scratch, "k"

    ranking = DepthRanking("nmse", 4, ((), (1,), (1, 2)), (0.0, 0.1, 0.2), (None,) * 4)
    (scratch / "layers-nmse.json").write_text(json.dumps({"key": "k", "ranking": ranking.document()}))
    kept = layer_order.ranked(Stub(), "nmse", 2)  # type: ignore[arg-type]
    assert kept.drops == ((), (1,))
    with pytest.raises((UsageError, InputError)):
        kept.dropped(2)

"""Faults A4, A9, F7, F9 and H8 at the command line: exit codes, messages, signals, pipes; never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import checker
import forge
import kit
import pytest

from surgeon.cli import app


def surgeon(capsys, *arguments) -> tuple[int, str, str]:
    """Run the command line in this process."""
    code = app.run(str(arguments[0]), [str(a) for a in arguments[1:]])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and "E001" not in printed.err, printed.err
    return code, printed.out, printed.err


def test_the_two_documented_lines_work_as_written(long_short, scratch, capsys, monkeypatch):
    monkeypatch.chdir(scratch)
    forge.write(scratch / "long.safetensors", forge.llama_tensors(1))
    forge.write(scratch / "short.safetensors", forge.llama_tensors(2))
    code, _, err = surgeon(capsys, "merge", "long.safetensors", "short.safetensors", "--method", "ties")
    assert code == 0, err
    checker.check(scratch / "merged.safetensors")
    code, _, err = surgeon(capsys, "merge", "./long", "./short", "--method", "ties", "-o", "merged")
    assert code == 0, err
    checker.check(scratch / "merged", (str(scratch),))


def test_A8_exit_code_6_and_an_identical_rerun_is_exit_code_0(long_short, scratch, capsys):
    out = scratch / "out"
    for _ in range(2):
        code, _, err = surgeon(capsys, "merge", *long_short, "--method", "ties", "-o", out)
        assert code == 0, err
    code, _, err = surgeon(capsys, "merge", *long_short, "--method", "slerp", "-o", out)
    assert code == 6 and "error[E601]" in err and "--overwrite" in err
    code, _, err = surgeon(capsys, "merge", *long_short, "--method", "slerp", "-o", out, "--overwrite")
    assert code == 0, err
    checker.check(out)


def test_A9_an_output_that_is_an_input_is_exit_code_6(long_short, capsys):
    before = kit.snapshot(list(long_short))
    code, _, err = surgeon(
        capsys, "merge", *long_short, "--method", "ties", "-o", long_short[1], "--overwrite"
    )
    assert code == 6 and "error[E602]" in err and "help:" in err
    assert kit.snapshot(list(long_short)) == before


USAGE = [
    (["--method", "tise"], "E201", "did you mean"),
    (["--method", "ties", "--param", "desnity=0.2"], None, "density"),
    (["--method", "ties", "--density", "2"], None, "density"),
    (["--method", "ties", "--density", "nan"], None, "density"),
    (["--method", "ties", "--density", "abc"], None, "density"),
    (["--method", "slerp", "--t", "0.5", "--weight", "1"], None, "weight"),
    (["--method", "linear", "--weight", "1,2,3"], None, "weight"),
    (["--layers", "5:9"], None, ""),
    (["--layers", "x"], "E214", "--layers"),
    (["--layers", "2:1"], "E214", "empty"),
    (["--ignore", "no.such.tensor"], "E218", "matches no tensor"),
    (["--ignore", "re:("], "E218", "regular expression"),
    (["--max-shard-size", "-1"], None, ""),
    (["--max-shard-size", "many"], None, "max-shard-size"),
    (["--memory-limit", "lots"], None, "memory-limit"),
    (["--dtype", "int8"], None, ""),
    (["--threads", "0"], None, ""),
    (["--threads", "-3"], None, ""),
    (["--base", ""], None, ""),
    (["--sweep", "lambda=1:2:0"], None, "sweep"),
    (["--sweep", "nonsense"], None, ""),
    (["--no-such-option"], None, ""),
    (["--tokenizer", "./absent"], None, "absent"),
    (["--chat-template", "nonsense"], None, ""),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "word"), USAGE, ids=[" ".join(a) for a, _, _ in USAGE])
def test_F6_usage_errors_are_exit_code_2_before_any_work(long_short, scratch, capsys, arguments, code, word):
    method = [] if "--method" in arguments else ["--method", "task-arithmetic"]
    status, _, err = surgeon(capsys, "merge", *long_short, *method, *arguments, "-o", scratch / "out")
    assert status in {2, 3}, (status, err)
    assert status == 2 or arguments[0] == "--tokenizer", err
    assert word in err
    assert code is None or f"error[{code}]" in err
    assert not (scratch / "out").exists() and not kit.leftovers(scratch / "out")


@pytest.mark.parametrize(
    "models",
    [[], ["one"], ["one", "one"], ["absent-a", "absent-b"], ["-x", "--", "-y"], ["", ""], ["a\0b", "c"]],
)
def test_F7_F9_models_that_are_not_there(scratch, capsys, monkeypatch, models):
    monkeypatch.chdir(scratch)
    forge.model_folder(scratch / "one", 1)
    code, _, err = surgeon(capsys, "merge", *models, "-o", scratch / "out")
    assert code in {2, 3} and err
    assert not (scratch / "out").exists()


def test_json_is_one_document_for_results_and_refusals(long_short, scratch, capsys):
    code, out, _ = surgeon(capsys, "merge", *long_short, "--method", "ties", "-o", scratch / "out", "--json")
    done = json.loads(out)
    assert code == 0 and done["status"] == "ok" and done["exit_code"] == 0 and done["error"] is None
    (long_short[0] / "model.safetensors").write_bytes(b"")
    code, out, _ = surgeon(capsys, "merge", *long_short, "--method", "ties", "-o", scratch / "no", "--json")
    failed = json.loads(out)
    assert code == 3 == failed["exit_code"] and failed["error"]["code"] == "E303"
    assert failed["error"]["help"] and failed["error"]["where"]["file"].endswith("model.safetensors")


def test_a_dry_run_refuses_what_the_run_would_refuse_and_writes_nothing(long_short, scratch, capsys):
    before = kit.snapshot([scratch])
    code, _, err = surgeon(
        capsys, "merge", *long_short, "--method", "ties", "-o", scratch / "out", "--dry-run"
    )
    assert code == 0, err
    code, _, err = surgeon(capsys, "merge", *long_short, "--method", "ties", "-o", long_short[0], "--dry-run")
    assert code == 6, err
    code, _, err = surgeon(
        capsys, "merge", *long_short, "-o", scratch / "out", "--dry-run", "--memory-limit", "1MB"
    )
    assert code == 5 and "E504" in err
    assert kit.snapshot([scratch]) == before


def test_A2_exit_code_5_names_what_is_kept(long_short, scratch):
    import resource

    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "from surgeon.cli.app import main; main(sys.argv[1:])"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", *map(str, long_short), "--method", "ties", "-o", str(scratch / "out")],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(kit.REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "error[E505]" in done.stderr and ".out.surgeon-" in done.stderr and "Traceback" not in done.stderr


# --- signals and pipes ------------------------------------------------------------------------------


def heavy(scratch: Path) -> list[Path]:
    """Two large files of zeros that take no room: enough work to be interrupted."""
    made = []
    for name in "ab":
        file = scratch / f"{name}.safetensors"
        entries = {
            f"t{i:02d}": {
                "dtype": "F32",
                "shape": [1500, 2000],
                "data_offsets": [i * 12_000_000, (i + 1) * 12_000_000],
            }
            for i in range(12)
        }
        content = forge.raw_file(json.dumps(entries).ljust(4000))
        with open(file, "wb") as stream:
            stream.write(content)
            stream.truncate(len(content) + 12 * 12_000_000)
        made.append(file)
    return made


def started(models, out: Path, **options) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "surgeon", "merge", *map(str, models), "--method", "dare-linear", "-o", str(out), "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(kit.REPOSITORY)}, **options,
    )  # fmt: skip

    def working() -> bool:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        journals = list(out.parent.glob(f".{out.name}.surgeon-*/journal"))
        return bool(journals) and len(journals[0].read_bytes().splitlines()) > 2

    kit.wait_for(working)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_A4_a_signal_keeps_the_work_and_says_how_to_go_on(scratch, number, code):
    models, out = heavy(scratch), scratch / "out.safetensors"
    process = started(models, out)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "Traceback" not in err and "again to continue" in err
    assert not out.exists()
    done = kit.surgeon("merge", *models, "--method", "dare-linear", "-o", out, "--json", "--threads", "2")
    assert done.returncode == 0, done.stderr
    checker.check(out)
    assert not kit.leftovers(out)
    assert json.loads(done.stdout)["status"] == "ok"


def test_A4_a_second_signal_ends_at_once(scratch):
    models, out = heavy(scratch), scratch / "out.safetensors"
    process = started(models, out)
    os.kill(process.pid, signal.SIGSTOP)  # both arrive before the first can be obeyed
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=30)
    assert process.returncode in {130, 143} and "Traceback" not in err
    assert not out.exists()


def test_A4_a_closed_pipe_neither_stops_the_work_nor_shows_a_traceback(long_short, scratch):
    out = scratch / "out"
    line = f"{sys.executable} -m surgeon merge {long_short[0]} {long_short[1]} --method ties -o {out} | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(kit.REPOSITORY)},
    )  # fmt: skip
    assert (
        "Traceback" not in done.stderr
        and "Exception ignored" not in done.stderr
        and "BrokenPipe" not in done.stderr
    ), done.stderr
    checker.check(out)


@pytest.mark.parametrize("where", [">&-", "2>&-", ">/dev/full", "2>/dev/full"])
def test_A4_closed_and_full_streams_do_not_stop_the_work(long_short, scratch, where):
    out = scratch / "out"
    line = f"{sys.executable} -m surgeon merge {long_short[0]} {long_short[1]} --method ties -o {out} {where}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(kit.REPOSITORY)}
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    checker.check(out)


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, {"TERM": "dumb", "COLUMNS": "1"}, {"NO_COLOR": "1", "TZ": "Asia/Kathmandu"}],
)  # fmt: skip
def test_H8_circumstances_of_the_terminal_change_nothing(long_short, scratch, environment):
    reference = kit.surgeon(
        "merge", *long_short, "--method", "ties", "-o", scratch / "a" / ".." / "reference"
    )
    assert reference.returncode in {0, 5}
    named = forge.model_folder(scratch / "größe", 1)
    out = scratch / "out"
    done = kit.surgeon("merge", named, long_short[1], "--method", "ties", "-o", out, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    checker.check(out)


def test_nothing_heavy_is_imported_for_a_refusal():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "surgeon", "merge", "absent", "absent2"], capture_output=True, text=True,
        timeout=60, env={**os.environ, "PYTHONPATH": str(kit.REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 3
    assert not [
        line for line in done.stderr.splitlines() if line.endswith((" torch", " transformers", " mergekit"))
    ]

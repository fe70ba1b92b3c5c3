"""Progress has the same three arguments everywhere; an interruption leaves what the same call goes on with."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

import pytest
from rich.console import Console

import surgeon
from surgeon.cli.bars import SHOWN, Bars
from surgeon.python.progress import counted, of_three, telling, told

MODELS = Path(__file__).resolve().parents[1] / "models"
LONG, SHORT = MODELS / "long", MODELS / "short"


class Seen:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.closed = 0

    def __call__(self, what: str, done: int, total: int, /) -> None:
        self.calls.append((what, done, total))

    def close(self) -> None:
        self.closed += 1


def test_every_function_tells_the_same_three_things(scratch):
    work = {
        "merging": lambda tell: surgeon.merge(
            [LONG, SHORT], method="ties", output=scratch / "m", progress=tell
        ),
        "reading": lambda tell: surgeon.inspect(LONG, stats=True, progress=tell),
        "comparing": lambda tell: surgeon.diff(LONG, SHORT, values=True, progress=tell),
        "checking files and values": lambda tell: surgeon.verify(LONG, progress=tell),
        "": lambda tell: surgeon.export(LONG, scratch / "e", progress=tell),
    }
    _check_told(work)


@pytest.mark.slow
def test_functions_that_run_models_tell_the_same_three_things(scratch):
    text = {"samples": 4, "sequence_length": 64}
    work = {
        "perplexity": lambda tell: surgeon.evaluate(LONG, perplexity="shipped", limit=2, progress=tell),
        "timing": lambda tell: surgeon.measure(LONG, repeat=3, context=8, generate=4, progress=tell),
        "writing": lambda tell: surgeon.prune(
            LONG, scratch / "p", method="depth", keep_layers=3, progress=tell, **text
        ),
        "quantize": lambda tell: surgeon.quantize(LONG, scratch / "q", scheme="W8A16", progress=tell, **text),
        "loading": lambda tell: surgeon.verify(LONG, load=True, progress=tell),
    }
    _check_told(work)


def _check_told(work):
    for what, call in work.items():
        seen = Seen()
        call(seen)
        assert seen.calls and seen.closed == 1, what
        for title, done, total in seen.calls:
            assert isinstance(title, str) and title and 0 <= done <= total, (what, title, done, total)
        assert any(what in title for title, *_ in seen.calls), seen.calls[:3]


def test_a_callback_of_two_arguments_is_called_as_before(scratch):
    seen = []
    surgeon.merge(
        [LONG, SHORT],
        method="ties",
        output=scratch / "m",
        progress=lambda done, total: seen.append((done, total)),
    )  # type: ignore[call-overload]
    assert seen[-1][0] == seen[-1][1] > 0


def test_callbacks_are_told_apart_by_what_they_take():
    seen: list = []
    kept = seen.append
    assert of_three(kept) is kept  # takes one: whoever gave it sees its own TypeError
    for given in (lambda a, b: kept((a, b)), lambda *a: kept(a), lambda a, b, c=None: kept((a, b, c))):
        found = of_three(given)
        assert found is not None
        found("step", 1, 2)
    assert seen == [(1, 2), ("step", 1, 2), ("step", 1, 2)]
    assert of_three(None) is None and counted(None, "x") is None
    with pytest.raises(ValueError), told(shown := Seen()) as tell:
        assert tell is shown
        raise ValueError
    assert shown.closed == 1

    @telling
    def work(*, progress=None):
        """What it does."""
        progress("a", 1, 1)

    work(progress=shown)
    assert shown.calls == [("a", 1, 1)] and shown.closed == 2 and work.__doc__ == "What it does."


# ---- interruption --------------------------------------------------------------------------------------


class Interrupting:
    """Presses Ctrl-C once when half of a step is done."""

    def __init__(self, what: str) -> None:
        self.what, self.pressed = what, threading.Event()

    def __call__(self, what: str, done: int, total: int, /) -> None:
        if what == self.what and done >= total / 2 and not self.pressed.is_set():
            self.pressed.set()
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, as in a notebook."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_in_a_merge_leaves_what_the_same_call_goes_on_with(scratch, ctrl_c, threads):
    def merge(name: str, **more):
        return surgeon.merge([LONG, SHORT], method="ties", output=scratch / name, threads=threads, **more)

    with pytest.raises(KeyboardInterrupt):
        merge("merged", progress=Interrupting("merging"))
    assert not (scratch / "merged").exists()
    left = surgeon.clean(scratch)
    assert left["live"] == [] and [one["kind"] for one in left["leftovers"]] == ["staging"]
    found = merge("merged")
    assert found.resumed_items > 0
    whole = merge("whole")
    assert (found.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert surgeon.clean(scratch)["leftovers"] == []


@pytest.mark.slow
def test_ctrl_c_in_pruning_leaves_what_the_same_call_goes_on_with(scratch, ctrl_c):
    def prune(name: str, **more):
        return surgeon.prune(LONG, scratch / name, method="width", criterion="magnitude", sparsity=0.3, samples=4, sequence_length=64,
                             **more)  # fmt: skip

    seen = Seen()
    whole = prune("whole", progress=seen)
    (first, *_) = [what for what, _, total in seen.calls if total > 1]
    with pytest.raises(KeyboardInterrupt):
        prune("pruned", progress=Interrupting(first))
    assert not (scratch / "pruned").exists() and surgeon.clean(scratch)["live"] == []
    found = prune("pruned")
    assert found.path is not None and whole.path is not None
    assert (found.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def test_stop_ends_the_work_and_the_same_call_goes_on(scratch):
    stop = threading.Event()
    with pytest.raises(surgeon.SurgeonError) as caught:
        surgeon.merge([LONG, SHORT], method="ties", output=scratch / "merged", stop=stop, threads=1,
                      progress=lambda what, done, total: stop.set())  # fmt: skip
    assert caught.value.code == "E130"
    assert surgeon.merge([LONG, SHORT], method="ties", output=scratch / "merged").resumed_items > 0


# ---- bars ------------------------------------------------------------------------------------------------


def terminal() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=100, color_system=None), out


def test_bars_draw_every_step(scratch):
    console, out = terminal()
    bars = Bars(console)
    surgeon.merge([LONG, SHORT], method="ties", output=scratch / "m", progress=bars)
    text = out.getvalue()
    assert "merging" in text and "100%" in text
    surgeon.inspect(LONG, stats=True, progress=bars)  # and again, after it was closed
    assert "reading" in out.getvalue()


def test_bars_show_the_latest_steps_and_take_any_text():
    console, out = terminal()
    with Bars(console) as bars:
        for number in range(20):
            bars(f"step [red]{number}[/nonsense]", 1, 0)
            bars(f"step [red]{number}[/nonsense]", 5, 4)
        assert len(bars._tasks) == SHOWN
    assert (
        "step [red]19[/nonsense]" in out.getvalue()
        and "step [red]1[/" not in out.getvalue().split("\r")[-1].splitlines()[-1]
    )


def test_bars_are_silent_where_nothing_can_be_drawn():
    out = io.StringIO()
    with Bars(Console(file=out, force_terminal=False)) as bars:
        bars("merging", 1, 2)
    assert out.getvalue() == ""


def test_bars_in_a_notebook_need_no_widgets(monkeypatch):
    pytest.importorskip("IPython")
    import IPython.display

    shown, updated = [], []

    class Handle:
        def update(self, what):
            updated.append(what._repr_mimebundle_([], [])["text/html"])

    def display(what, display_id):
        shown.append(what)
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr("surgeon.cli.bars.in_notebook", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bars = surgeon.bars()
        for done in range(5):
            bars("merging", done, 4)
        bars.close()
    assert len(shown) == 1 and "merging" in updated[-1] and "100%" in updated[-1]

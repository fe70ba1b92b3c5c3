"""A notebook for real: a kernel runs the cells, and what they show is looked at."""

from __future__ import annotations

import html
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

MODELS = Path(__file__).resolve().parents[1] / "models"

CELLS = {
    "merge": """
import surgeon
r = surgeon.merge(["long", "short"], method="ties", output="merged", progress=surgeon.bars())
r
""",
    "manifest": "r.manifest['verb'], r.manifest['output']['parameters']",
    "report": "r.report()",
    "inspect": "surgeon.inspect('merged', stats=True)",
    "diff": "surgeon.diff('long', 'merged', values=True)",
    "verify": "surgeon.verify('merged')",
    "help": "import inspect; print(inspect.signature(surgeon.merge)); print(surgeon.merge.__doc__)",
    "interrupted": """
import os, signal, threading
pressed = threading.Event()
def press(what, done, total):
    if what == 'merging' and done >= total / 2 and not pressed.is_set():
        pressed.set()
        os.kill(os.getpid(), signal.SIGINT)
surgeon.merge(['long', 'short'], method='dare-ties', output='again', progress=press)
""",
    "resumed": "surgeon.merge(['long', 'short'], method='dare-ties', output='again').resumed_items > 0",
    "prune": """
p = surgeon.prune('merged', 'pruned', method='depth', keep_layers=3, samples=4, sequence_length=64, progress=surgeon.bars())
p
""",
    "evaluate": "surgeon.evaluate('pruned', perplexity='shipped', limit=2, gate='perplexity < 1', gate_limited=True)",
    "refused": "surgeon.merge(['long', 'short'], method='tise')",
}
FAILING = {"interrupted": "KeyboardInterrupt", "refused": "UsageError"}


def run(folder: Path) -> dict[str, Any]:
    """Run the cells in a kernel; return outputs by cell."""
    for package in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(
            package, reason=f"{package} is not installed: pip install nbclient nbformat ipykernel"
        )
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook()
    for name, text in CELLS.items():
        cell = nbformat.v4.new_code_cell(text.strip())
        cell.metadata["tags"] = ["raises-exception"] if name in FAILING else []
        notebook.cells.append(cell)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the client's own event loop and sockets
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return dict(zip(CELLS, (cell.outputs for cell in notebook.cells), strict=True))


def shown(outputs: list[Any], kind: str = "text/html") -> str:
    (found,) = (o.data for o in outputs if o.output_type == "execute_result")
    return found[kind]


def plain(text: str) -> str:
    """Return the text of HTML without rules and elements."""
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", text)).split()))


@pytest.mark.slow
def test_a_notebook_shows_what_was_done(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(MODELS.parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for name in ("long", "short"):
        shutil.copytree(MODELS / name, tmp_path / name)
    cells = run(tmp_path)
    for name, outputs in cells.items():
        errors = [o.ename for o in outputs if o.output_type == "error"]
        assert errors == ([FAILING[name]] if name in FAILING else []), (name, errors, outputs)
        noise = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
        assert 'install "ipywidgets"' not in noise, name  # what rich says where it draws nothing

    merged = plain(shown(cells["merge"]))
    for text in (
        "merge ties",
        "long, short",
        "density 0.2",
        "50 (50 merged, 0 copied)",
        "2.37 MB, 1.18M parameters",
    ):
        assert text in merged
    assert shown(cells["merge"]).startswith('<div class="surgeon-view">')
    assert shown(cells["merge"], "text/plain").startswith("merge ties\n  models    long, short")
    drawn = [o for o in cells["merge"] if o.output_type == "display_data"]
    assert (
        len(drawn) == 1
        and "merging" in plain(drawn[0].data["text/html"])
        and "100%" in plain(drawn[0].data["text/html"])
    )

    assert shown(cells["manifest"], "text/plain") == "('merge', 1184320)"
    assert shown(cells["report"]).startswith('<iframe sandbox="" srcdoc="&lt;!DOCTYPE html&gt;')
    assert "2.37 MB" in html.unescape(shown(cells["report"]))
    assert "qwen2 (layers 4, hidden 160" in plain(shown(cells["inspect"]))
    assert "they differ" in plain(shown(cells["diff"]))
    assert "every check passed" in plain(shown(cells["verify"]))
    told = "".join(o.text for o in cells["help"])
    assert "density: 'float | Sequence[float]' = ..." in told and "Merge checkpoints" in told
    assert shown(cells["resumed"], "text/plain") == "True"
    pruned = plain(shown(cells["prune"]))
    for text in (
        "3 of 4 layers",
        "weights 2.37 MB 1.8 MB -24.0 %",
        "perplexity, held out",
        "KL from the source",
    ):
        assert text in pruned
    evaluated = plain(shown(cells["evaluate"]))
    assert "a gate failed" in evaluated and "FAILED perplexity < 1" in evaluated
    (error,) = (o for o in cells["refused"] if o.output_type == "error")
    assert "E201" in error.evalue and "tise" in error.evalue

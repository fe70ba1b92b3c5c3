"""Who may import whom: the picture in docs/architecture.md, checked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "surgeon"

# From the bottom up. A module may import from its own level and from every level below.
LEVELS = [
    {"errors", "explanations", "seeds", "scalars", "system", "callable_package", "__init__"},
    {"checkpoint"},
    {"kernels", "architectures", "data", "search"},
    {"traits"},
    {"formats"},
    {"structure"},
    {"plan", "copying"},
    {"output"},
    {"engine"},
    {"inspection", "comparison", "derive"},
    {"verify"},
    {"execute", "unwritten"},
    {"calibrate"},
    {"experts"},
    {"deploy"},
    {"measure", "train"},
    {"merge", "evaluate", "prune", "edit", "quantize"},
    {"recipe", "report"},
    {"python"},
    {"api"},
    {"pipeline"},
    {"cli", "__main__"},
]
# checkpoint/adapter.py computes while reading, with the casts of kernels/. A package that shares its name with a
# public function forwards calls to it.
ALLOWED = {("checkpoint", "kernels")}


def level(unit: str) -> int:
    for number, names in enumerate(LEVELS):
        if unit in names:
            return number
    raise AssertionError(f"surgeon/{unit} has no level: add it to LEVELS and to docs/architecture.md")


def unit_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def test_imports_point_downwards():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        me = unit_of(path)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "surgeon" or len(parts) < 2:
                continue
            other = parts[1]
            if not ((PACKAGE / other).exists() or (PACKAGE / f"{other}.py").exists()):
                continue  # a name of surgeon/__init__
            if other != me and level(other) > level(me) and (me, other) not in ALLOWED:
                wrong.append(f"{path.relative_to(PACKAGE)} imports surgeon.{other}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_families_do_not_import_each_other():
    for family, others in (("merge", {"evaluate", "report"}), ("evaluate", {"merge", "report"})):
        for path in sorted((PACKAGE / family).rglob("*.py")):
            found = {name.split(".")[1] for name in imports(path) if name.startswith("surgeon.")}
            assert not found & others, path


def test_only_the_command_line_imports_typer_and_rich():
    for path in PACKAGE.rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        if unit_of(path) != "cli":
            assert not roots & {"typer", "rich"}, path


def test_nothing_in_the_package_imports_mergekit():
    for path in PACKAGE.rglob("*.py"):
        assert "mergekit" not in {name.split(".")[0] for name in imports(path)}, path


def test_no_module_prints_or_is_called_utils():
    for path in PACKAGE.rglob("*.py"):
        assert path.stem not in {"utils", "helpers", "misc", "common"}, path
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path


def modules_after(code: str) -> set[str]:
    text = f"{code}\nimport sys\nprint('MODULES', ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


HEAVY = {"torch", "transformers", "mergekit", "numba", "accelerate", "scipy"}


def test_import_surgeon_is_light():
    assert not modules_after("import surgeon") & (HEAVY | {"numpy", "pydantic", "typer"})


def test_help_imports_nothing_heavy():
    code = "import surgeon.cli.app as app\ntry:\n    app.main(['--help'])\nexcept SystemExit:\n    pass"
    assert not modules_after(code) & (HEAVY | {"numpy", "pydantic", "typer"})


def test_planning_a_merge_imports_neither_torch_nor_numba():
    assert not modules_after("import surgeon.api") & HEAVY

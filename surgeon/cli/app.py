"""The command line's entry: knows the names of the commands, imports only the chosen one."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

COMMANDS = {
    "merge": "Merge models: TIES, task arithmetic, SLERP, DARE, ... or a mergekit YAML.",
    "prune": "Prune to a measured speedup, a size or a share: ZipLM, width, depth, sparse; experts: REAP, EASY-EP, HEAPr.",
    "edit": "Edit weights along a direction: ThinkEdit, projection, baked steering.",
    "quantize": "Quantize by scheme, or to a size, bits or divergence: GPTQ, AWQ; compressed-tensors, auto-round, bitsandbytes, GGUF.",
    "export": "Write another form of a model, GGUF included, or a member of a nested family.",
    "push": "Upload a finished model to the hub: verified first, then one commit.",
    "run": "Run a recipe: steps with gates, or a mergekit YAML, with or without the key surgeon:.",
    "recipe": "Check, show, list and copy recipes; print their JSON Schema.",
    "eval": "Measure accuracy, answer length, perplexity, KL; compare with a baseline, apply gates.",
    "measure": "Time a model: speed, speedup against another, latency tables, memory.",
    "report": "Turn results of eval into a page: HTML, Markdown, SVG or PNG.",
    "inspect": "Show what a checkpoint holds, and how the experts of a mixture are used.",
    "diff": "Compare two checkpoints: structure, config, values, delta anatomy.",
    "verify": "Check a model: structure, config, index, hashes, values; load it in stock transformers.",
    "methods": "List methods, or show one method's page.",
    "doctor": "Report on this machine, and what can be done with a model here.",
    "explain": "Explain an error code; without one, list all by subject.",
    "clean": "List or remove what interrupted runs left behind.",
}
"""Command -> one line. The module `surgeon.cli.<name>` holds a function of the same name."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with an exit code of `surgeon.errors`."""
    _fill_closed_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = next((a for a in given if not a.startswith("-")), None)
    if not given or (name is None and given[0] in {"-h", "--help"}) or given[0] in {"-h", "--help"}:
        print_help()
        sys.exit(0 if given else 2)
    if given[0] == "--version":
        from surgeon import __version__

        sys.stdout.write(f"surgeon {__version__}\n")
        sys.exit(0)
    if name is None or name not in COMMANDS or given[0] != name:
        unknown(given[0])
        return
    sys.exit(run(name, given[1:]))


def _fill_closed_streams() -> None:
    """Give closed standard streams a place to write to (fault A4).

    Else the next file that is opened gets their number, and what is meant for stderr lands in a weight file.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 it lives as long as the process


def print_help() -> None:
    from surgeon import __version__

    width = max(map(len, COMMANDS))
    lines = [
        f"surgeon {__version__}: model surgery on LLM checkpoints.",
        "",
        "Usage: surgeon COMMAND [ARGS] [OPTIONS]",
        "",
        *(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
        "",
        '"surgeon COMMAND --help" shows the options. Exit codes: 0 done, 1 bug, 2 usage, 3 input,',
        "4 check failed, 5 environment, 6 output conflict, 130/143 interrupted (resumable).",
        "",
        "  surgeon merge long.safetensors short.safetensors --method ties",
        "  surgeon merge ./long ./short --method ties -o merged",
        "  surgeon prune ./model --target-speedup 1.5 -o fast",
        "  surgeon quantize ./model --target-size 5GB -o small",
        "",
    ]
    sys.stdout.write("\n".join(lines))


def unknown(name: str) -> None:
    from surgeon.errors import close_matches

    near = close_matches(name, COMMANDS)
    shown = "".join(c if c.isprintable() else "?" for c in name)[:60]
    what = "option" if name.startswith("-") else "command"
    sys.stderr.write(f'error[E200]: unknown {what} "{shown}"\n')
    sys.stderr.write(f"  help: {near or 'commands: ' + ', '.join(COMMANDS)}\n")
    sys.exit(2)


def build(name: str) -> Any:
    """Return the Typer application of one command."""
    import typer

    module = importlib.import_module(f"surgeon.cli.{name}")
    if hasattr(module, "app"):  # a group of commands
        return module.app
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name, context_settings={"help_option_names": ["-h", "--help"]})(getattr(module, name))
    return app


def run(name: str, arguments: list[str]) -> int:
    """Run one command; return its exit code."""
    import typer

    try:
        code = build(name)(arguments, prog_name=f"surgeon {name}", standalone_mode=False)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 1 if ending.code else 0
    except typer.Abort:
        sys.stderr.write("aborted\n")
        return 1
    except BrokenPipeError:
        # Whoever read the output has gone; what is still buffered must not fail once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # what Typer says of arguments
            raise
        return _misused(name, error, "--json" in arguments)
    return code if isinstance(code, int) else 0


def _misused(name: str, error: Any, as_document: bool) -> int:
    """Say that the arguments are none of the command's, as Typer does; as a document where one was asked for."""
    error.show()
    if as_document:
        import json

        said = {"code": "E200", "message": error.format_message(), "where": None, "help": f'"surgeon {name} --help" shows the options',
                "exit_code": error.exit_code, "others": []}  # fmt: skip
        document = {
            "schema": 1,
            "command": name,
            "status": "failed",
            "exit_code": error.exit_code,
            "error": said,
        }
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return error.exit_code

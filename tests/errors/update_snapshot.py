"""Write the texts of all errors to messages.snapshot: `python tests/errors/update_snapshot.py`.

Sites without help that have gained one leave without_help.txt; a new one is never added to it by this script.
"""

from __future__ import annotations

import sys
from pathlib import Path

import error_sites

HERE = Path(__file__).resolve().parent
SNAPSHOT = HERE / "messages.snapshot"
WITHOUT_HELP = HERE / "without_help.txt"


def text() -> str:
    """Return the snapshot: one block for each site, sorted, without file and line, which may move."""
    return "\n\n".join(site.block for site in error_sites.sites()) + "\n"


def without_help() -> set[str]:
    """Return 'CODE message' of every site that says what is wrong and not what to do."""
    # The command line adds how to go on to every interruption.
    return {
        f"{s.code} {s.message}" for s in error_sites.sites() if s.help is None and s.kind != "Interrupted"
    }


def accepted() -> set[str]:
    """Return the sites that may lack help."""
    return set(WITHOUT_HELP.read_text("utf-8").splitlines())


def main() -> None:
    new = text()
    changed = not SNAPSHOT.exists() or SNAPSHOT.read_text("utf-8") != new
    SNAPSHOT.write_text(new, "utf-8")
    kept = sorted(accepted() & without_help())
    WITHOUT_HELP.write_text("".join(f"{line}\n" for line in kept), "utf-8")
    print(
        f"{SNAPSHOT.name}: {len(error_sites.sites())} sites, {'changed: read the diff' if changed else 'unchanged'}"
    )
    for line in sorted(without_help() - accepted()):
        print(f"no help: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Hook of mkdocs: pages link to files of the repository beside docs/, and the site has to lead there, too.

Markdown and figures that a page links to (benchmarks, recipes, the changelog) become pages and files of the site under beyond/;
a link to a program or a folder without a README becomes its name. So the same link works in the repository and on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")
CODE = re.compile(r"(^```.*?^```|^    .*?$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
BEYOND = "beyond"
SHOWN = {".md", ".svg", ".png"}


def on_files(files: Files, config) -> Files:
    """Add what the pages link to outside docs/, and what those link to in turn."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for target, _ in _targets(page, (ROOT / page).read_text()):
            if target in seen or target.startswith("docs/") or Path(target).suffix not in SHOWN:
                continue
            seen.add(target)
            files.append(File.generated(config, f"{BEYOND}/{target}", abs_src_path=str(ROOT / target)))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Point links that leave docs/ to where the site has their target."""
    here = page.file.src_uri
    source = here.removeprefix(f"{BEYOND}/") if here.startswith(f"{BEYOND}/") else f"docs/{here}"

    def moved(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        path, sign, anchor = link.partition("#")
        target = _resolved(source, path)
        if target is None:
            return match[0]
        place = target.removeprefix("docs/") if target.startswith("docs/") else f"{BEYOND}/{target}"
        if files.get_file_from_path(place) is None:
            return text
        return f"{mark}[{text}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{sign}{anchor})"

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)


def _targets(source: str, text: str) -> list[tuple[str, str]]:
    found = [(_resolved(source, link.partition("#")[0]), link) for _, _, link in LINK.findall(text)]
    return [(target, link) for target, link in found if target is not None]


def _resolved(source: str, path: str) -> str | None:
    """Return the file a link of ``source`` leads to, from the repository's root; None where it is none of ours.

    A folder stands for its README, or its index. A link that leads nowhere stays, for mkdocs to refuse.
    """
    if not path or "://" in path or path.startswith(("/", "mailto:")):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    place = ROOT / target
    if target.startswith("..") or not place.exists():
        return None
    if place.is_dir():
        pages = [name for name in ("README.md", "index.md") if (place / name).is_file()]
        return f"{target}/{pages[0]}" if pages else target
    return target

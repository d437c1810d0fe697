"""The repository's own pages in the site, at the paths that they have in the repository, with what they link to.

Links are relative and both trees are the same, so one text serves GitHub and the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"""(?P<before>\]\(|\b(?:src|href|srcset)=["'])(?P<target>[^)#\s"':]+)""")


def sources() -> dict[str, list[str]]:
    """Sections of the navigation and their pages: a README beside the code it explains is one without being listed."""
    beside = sorted(path for folder in ("isa_triton", "bench") for path in (ROOT / folder).rglob("README.md"))
    recipes = sorted((ROOT / ".docs/recipes").glob("*.md"))
    api = sorted((ROOT / ".docs/pages/api").glob("*.md"), key=lambda path: (path.name != "index.md", path.name))
    return {
        "Recipes": [path.relative_to(ROOT).as_posix() for path in recipes],
        "Guides": [path.relative_to(ROOT).as_posix() for path in beside],
        "API": [path.relative_to(ROOT / ".docs/pages").as_posix() for path in api],
        "Project": [".github/CONTRIBUTING.md", "CHANGELOG.md"],
    }


def on_config(config: Any) -> Any:
    config.nav = ["README.md", *({title: pages} for title, pages in sources().items() if pages)]
    return config


def on_files(files: Files, config: Any) -> Files:
    sections = sources()
    for page in ("README.md", *sections["Recipes"], *sections["Guides"], *sections["Project"]):
        file = File.generated(config, page, abs_src_path=str(ROOT / page))
        file.dest_uri = re.sub(r"^\.\w+/", "", file.dest_uri)  # servers hide dot folders
        files.append(file)
    for page in list(files.documentation_pages()):
        for link in LINK.finditer(page.content_string):
            target = _resolved(page.src_uri, link["target"])
            if target not in files.src_uris and (ROOT / target).is_file():
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a folder goes to the page that GitHub shows under it, or to its `__init__.py`."""

    def rewritten(link: re.Match[str]) -> str:
        target = _resolved(page.file.src_uri, link["target"])
        return link["before"] + posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewritten, markdown)


def _resolved(page: str, target: str) -> str:
    """What a link of a page means, from the root of the repository."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if (ROOT / path).is_dir():
        names = [name for name in ("README.md", "__init__.py") if (ROOT / path / name).is_file()]
        path = posixpath.normpath(posixpath.join(path, names[0])) if names else path
    return path

"""MkDocs hooks: pages of the site that lie outside docs/, and links that hold on a repository page and in the site.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages. Links are relative to the file that they stand in, as a
repository page wants them. Those to pages of the site become relative to the page; those to other files of the
repository lead to `repo_url`, or become plain text where the build has none.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?P<label>\[[^\]]*\])\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Adapt a page's links."""
    uri = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(uri, f"docs/{uri}"))

    def adapted(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link["path"]))
        page_uri = PAGES.get(target) or target.removeprefix("docs/") * target.startswith("docs/")
        if files.get_file_from_path(page_uri):
            path = posixpath.relpath(page_uri, posixpath.dirname(uri) or ".")
            return f"{link['label']}({path}{link['anchor'] or ''})"
        if not (ROOT / target).exists():
            return link[0]  # MkDocs warns
        return f"{link['label']}({config.repo_url}/blob/HEAD/{target})" if config.repo_url else link["label"][1:-1]

    return LINK.sub(adapted, markdown)

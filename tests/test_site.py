"""The documentation as a site: it builds without a warning, needs no other host, and documents every public name."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from dspnet_fast import nn, ops

pytest.importorskip("mkdocs", reason="MkDocs is not installed: pip install -e '.[docs]'")

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
ELEMENTS = re.compile(
    "a|article|b|br|code|details|div|em|h[1-6]|hr|img|input|label|li|ol|p|pre|small|span|strong|su[bp]|summary|table|"
    "tbody|td|th|thead|tr|ul"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}


def test_site_holds_readme_and_guides(site):
    titles = {page: re.search(r"<h1[^>]*>([^<]*)", text)[1] for page, text in pages(site).items()}
    assert titles[site / "index.html"] == "dspnet-fast"
    assert titles[site / "contributing" / "index.html"] == "Contributing"
    assert titles[site / "changelog" / "index.html"] == "Changelog"


def test_local_links_and_images_exist(site):
    for page, text in pages(site).items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not parts.path:
                continue
            target = (page.parent / parts.path).resolve()
            assert target.is_file() or (target / "index.html").is_file(), f"{page.relative_to(site)}: {link}"


def test_pages_load_nothing_from_other_hosts(site):
    for page, text in pages(site).items():
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:href|src)="(?:https?:)?//[^"]*"', text), page


def test_placeholders_in_angle_brackets_are_not_lost_as_elements(site):
    for page, text in pages(site).items():
        article = text[text.index("<article") : text.index("</article>")]
        assert not [name for name in re.findall(r"<(\w+)", article) if not ELEMENTS.fullmatch(name)], page


@pytest.mark.parametrize(("module", "page"), [(nn, "nn"), (ops, "ops")])
def test_every_public_name_has_a_reference(module, page):
    documented = {
        path.split(".")[-1] for path in re.findall(r"^::: (\S+)", (REFERENCE / f"{page}.md").read_text(), re.M)
    }
    assert documented >= set(module.__all__)


@pytest.mark.parametrize(
    ("page", "link", "adapted"),
    [
        ("index.md", "[data](docs/data.md)", "[data](data.md)"),
        ("index.md", "![knn](docs/images/demo-knn.png)", "![knn](images/demo-knn.png)"),
        ("index.md", "[a run](docs/architecture.md#a-run)", "[a run](architecture.md#a-run)"),
        ("index.md", "[recipes](recipes)", "[recipes](https://host/repository/blob/HEAD/recipes)"),
        ("results/cifar-10.md", "[data](../data.md)", "[data](../data.md)"),
        ("layers.md", "[how](../CONTRIBUTING.md)", "[how](contributing.md)"),
        ("results/cifar-10.md", "[start](../../README.md#start)", "[start](../index.md#start)"),
        ("layers.md", "[gone](gone.md)", "[gone](gone.md)"),
        ("index.md", "[gone](docs/gone.md)", "[gone](docs/gone.md)"),
        ("layers.md", "[torch](https://pytorch.org)", "[torch](https://pytorch.org)"),
    ],
)
def test_links_are_adapted_to_the_site(page, link, adapted):
    assert adapt(page, link, "https://host/repository") == adapted


def test_links_to_repository_files_are_plain_text_without_repository_address():
    assert adapt("index.md", "see [recipes](recipes) there", "") == "see recipes there"


def adapt(page: str, link: str, repository: str) -> str:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    within = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.*")} | set(hooks.SOURCES)
    return hooks.on_page_markdown(
        link,
        SimpleNamespace(file=SimpleNamespace(src_uri=page)),
        SimpleNamespace(repo_url=repository),
        SimpleNamespace(get_file_from_path=lambda path: path in within),
    )

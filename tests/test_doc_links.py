"""Every relative link of README and docs leads to a file that is there, and to a heading of it where it names one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_script_that_a_page_names_is_there(page):
    for name in re.findall(r"\bscripts/[\w/]+(?:\.\w+)?", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{name}: no such file"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_module_that_a_page_names_is_there(page):
    for name in re.findall(r"`(compressor(?:\.[a-z_0-9]+)+)`", page.read_text(encoding="utf-8")):
        owner, _, leaf = name.rpartition(".")
        assert importlib.util.find_spec(owner) is not None, name
        assert hasattr(importlib.import_module(owner), leaf) or importlib.util.find_spec(name) is not None, name


def test_every_operation_of_the_kernels_page_is_in_its_module():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    table = text.partition("| operation | module in `compressor.kernels.ops` |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]+) \| `(\w+)` \| ", table, flags=re.MULTILINE)
    assert len(rows) > 10
    for operations, module in rows:
        source = (ROOT / "compressor" / "kernels" / "ops" / f"{module}.py").read_text()
        for name in re.findall(r"`(\w+)(?:`|\()", operations):
            assert re.search(rf"\b{name}\b", source), (name, module)


def test_every_stored_layer_has_a_section_in_the_page_of_formats():
    headings = " ".join(re.findall(r"^#+ (.+)$", (ROOT / "docs" / "format.md").read_text(), flags=re.MULTILINE))
    sources = [path.read_text() for path in (ROOT / "compressor" / "layers").rglob("*.py")]
    names = {name for text in sources for name in re.findall(r'^    format_name = "(\w+)"$', text, flags=re.MULTILINE)}
    assert len(names) > 10 and not {name for name in names if f"`{name}`" not in headings}


def test_the_page_of_benchmarks_is_one_that_is_read():
    """Results are one page; how they were made is in the log."""
    assert len((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()) <= 150

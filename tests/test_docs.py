"""The pages name files. A page that names what was moved or renamed leads its reader astray."""

import re

import pytest

from common.files import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "common|tokenizer|model|dataset|inference|trainer|evaluation|tests|benchmarks|configs|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", text) if not link.startswith("http")}
    assert not [link for link in links if not (page.parent / link).exists()]
    headings = re.findall(r"^#+ (.+)", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_named_files_exist(page):
    """Paths below our folders. Left out: data files, which users bring, and the files called "mine" that a walk of
    CONTRIBUTING.md adds."""
    named = set(re.findall(rf"`((?:{FOLDERS})/[\w/]+\.\w+)", page.read_text(encoding="utf-8")))
    named = {name for name in named if not name.endswith(".jsonl") and "mine" not in name}
    assert not [name for name in named if not (ROOT / name).is_file()]


def shown(page: str) -> set[tuple[str, ...]]:
    """Script and flags of each command of a page; names and prompts may differ between languages."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    return {tuple(re.findall(r"\S+\.py|--\w+", line.partition("  #")[0])) for line in lines}


def test_the_chinese_page_of_comparing_shows_every_command():
    assert shown("compare.md") <= shown("compare_zh.md")

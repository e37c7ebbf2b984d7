"""The documents are whole: links lead somewhere, decisions have their form, the README tells how to test."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from substrate_cluster.ingress.errors import STATUS, told_reason
from substrate_seam.errors import Reason

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "packages/*/*.md", "apps/*/*.md", "bench/*.md", "examples/*/*.md")
    for path in ROOT.glob(pattern)
)
DECISIONS = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_within_the_repository_lead_somewhere(document):
    prose = CODE.sub("", document.read_text())
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose)
    assert [target for target in targets if not (document.parent / target).exists()] == []


def headings_of(text: str) -> list[str]:
    """Where a link may lead within a document: what GitHub makes of its headings, in order."""
    slugs: list[str] = []
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#{1,6} +(.+?)[ #]*$", FENCED.sub("", text), re.MULTILINE):
        words = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        slugs.append(slug if not seen[slug] else f"{slug}-{seen[slug]}")
        seen[slug] += 1
    return slugs


def anchors_astray(document: Path) -> list[str]:
    """The links of a document to headings that there are not."""
    prose = CODE.sub("", document.read_text())
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)#([^)\s]*)\)", prose)
    pages = [(document.parent / target if target else document, anchor) for target, anchor in links]
    return [anchor for page, anchor in pages if anchor not in headings_of(page.read_text())]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_a_link_to_a_heading_leads_to_one(document):
    assert anchors_astray(document) == []


def test_headings_are_named_as_github_names_them(tmp_path):
    """Small, with hyphens for blanks, without signs and markup, numbered from the second of a name on; not in code."""
    (tmp_path / "other.md").write_text("# The `x-y_z` & *all*, [linked](there.md) #\n\n## Again\n\n### Again\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n\n```sh\n# no heading\n```\n[a](#here) [b](other.md#the-x-y_z--all-linked) [c](other.md#again-1)"
    )
    assert anchors_astray(page) == []
    page.write_text(
        "# Here\n\n```sh\n# no heading\n```\n[a](#no-heading) [b](other.md#again-2) `[c](#code)` [d](#Here)"
    )
    assert anchors_astray(page) == ["no-heading", "again-2", "Here"]


@pytest.mark.parametrize("decision", DECISIONS, ids=name_of)
def test_a_decision_has_its_form_and_its_place_in_the_index(decision):
    text = decision.read_text()
    number = decision.name[:4]
    assert re.match(rf"# {number}\. .+\n\nStatus: (accepted|replaced by \[\d{{4}}\]), \d{{4}}-\d\d\n", text)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert text.rpartition("\n\n")[2].startswith("A change violates this decision when it ")
    assert f"[{number}]({decision.name})" in (decision.parent / "README.md").read_text()


def test_the_readme_has_one_marked_command_that_runs_the_tests():
    """It is the one that continuous integration runs."""
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"<!-- tests: begin -->\n```sh\n(.+?)```\n<!-- tests: end -->", text, re.DOTALL)
    assert block.strip() == "uv run pytest"


def test_the_published_table_of_errors_is_the_one_in_force():
    rows = re.findall(
        r"^\| (\d{3}.*?) \| (`.+?`) \| (no|maybe) \|", (ROOT / "docs/calling.md").read_text(), re.MULTILINE
    )
    told = {
        (int(status), reason, ran)
        for statuses, reasons, ran in rows
        for status, reason in paired(statuses.split(", "), re.findall(r"`(.+?)`", reasons))
    }
    in_force = {
        (STATUS[reason], told_reason(reason).value, "maybe" if STATUS[reason] in {500, 502, 504} else "no")
        for reason in Reason
    }
    assert told == in_force


def paired(statuses: list[str], reasons: list[str]) -> zip:
    """One status for all reasons, or one for each."""
    return zip(statuses * len(reasons) if len(statuses) == 1 else statuses, reasons, strict=True)

"""The documents: what they show is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
MOST_BYTES = 120 * 1024
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)[^)]*\)")


def images(text: str) -> list[tuple[str, str]]:
    """(What it shows, path) of each image of a document that is a file."""
    return [(shown, path) for shown, path in _IMAGE.findall(text) if not path.startswith(("http:", "https:"))]


def test_images_are_found() -> None:
    assert images("a ![of x](images/x.png) b\n![](y.svg 'title') [no](image.md)") == [
        ("of x", "images/x.png"),
        ("", "y.svg"),
    ]
    assert images((ROOT / "docs" / "policies.md").read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_image_of_a_document_is_there_and_small(document: Path) -> None:
    for shown, path in images(document.read_text()):
        image = document.parent / path
        assert image.is_file(), path
        assert image.stat().st_size <= MOST_BYTES, path
        assert shown, f"{path}: who cannot see it is told nothing"


def test_every_image_is_shown() -> None:
    used = {(d.parent / path).resolve() for d in DOCUMENTS for _, path in images(d.read_text())}
    assert {path.resolve() for path in (ROOT / "docs" / "images").iterdir()} <= used

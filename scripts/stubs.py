"""Writes src/kvtier/_core.pyi from the built module; with --check only says whether it still fits."""

import difflib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).resolve().parent.parent / "src" / "kvtier" / "_core.pyi"
BIN = Path(sys.executable).parent
HEADER = "# Written by `make stubs` from the native module; do not edit.\n"


def generate() -> str:
    """Returns the stub of kvtier._core as pybind11-stubgen sees it, formatted by ruff."""
    with tempfile.TemporaryDirectory() as folder:
        stubgen = [BIN / "pybind11-stubgen", "kvtier._core", "--exit-code", "--output-dir", folder]
        subprocess.run(stubgen, check=True)
        text = (Path(folder) / "kvtier" / "_core.pyi").read_text()
    text = re.sub(r"^(__version__: str) = .*", r"\1", text, flags=re.MULTILINE)  # pyproject.toml has it
    ruff = [BIN / "ruff", "format", "--stdin-filename", STUB.name, "-"]
    formatted = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True)
    return HEADER + formatted.stdout


def main() -> int:
    """Returns the exit status: 1 when --check finds a difference."""
    fresh = generate()
    if "--check" not in sys.argv[1:]:
        STUB.write_text(fresh)
        return 0
    stored = STUB.read_text() if STUB.exists() else ""
    names = (STUB.name, "the built module")
    diff = list(difflib.unified_diff(stored.splitlines(), fresh.splitlines(), *names, lineterm=""))
    if diff:
        print(*diff, "", "The stub is out of date: run `make stubs` and commit it.", sep="\n")
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())

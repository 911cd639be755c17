"""The rules of the house (docs/architecture.md): which layer may see which, and who may touch what."""

import ast
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
CPP_TESTS = ROOT / "tests" / "cpp"
PACKAGE = ROOT / "src" / "kvtier"

# What each layer may include besides itself. csrc/CMakeLists.txt says the same to the compiler.
BELOW = {
    "core": set(),
    "index": {"core"},
    "platform": {"core"},
    "memory": {"core", "platform"},
    "storage": {"core", "platform"},
    "transfer": {"core", "platform", "memory", "storage"},
    "replay": {"core", "index"},
    "engine": {"core", "index", "platform", "memory", "storage", "transfer"},
}
BELOW["bindings"] = {"engine", "replay"} | BELOW["engine"]

# Headers from outside that only one place may include: a pattern for the header, one for the file.
RESERVED = [
    (r"cuda|cub/|thrust/|nvml", r"csrc/platform/.*|csrc/transfer/.*\.cuh?"),
    (r"liburing", r"csrc/platform/.*"),
    (r"lmdb\.h", r"csrc/storage/.*"),
    (r"Python\.h|pybind11/", r"csrc/bindings/.*"),
    (r"torch/|ATen/|c10/", r"(?!)"),
]

# Modules that only some files of the package may import.
IMPORTERS = {
    "torch": r"paged\.py|adapters/.*|cli/(demo|bench_ttft).*",
    "kvtier._core": r"engine\.py|gpus\.py|keys\.py|replay\.py|stores\.py|testing\.py",
}


def cpp_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', path.read_text(), re.MULTILINE)


def layer_of(path: Path) -> str:
    """The layer a file of csrc/ or tests/cpp/ belongs to."""
    return path.relative_to(CSRC if path.is_relative_to(CSRC) else CPP_TESTS).parts[0]


def public_headers(layer: str) -> list[str]:
    include = CSRC / layer / "include"
    return sorted(str(p.relative_to(include)) for p in include.rglob("*.h"))


def imported_modules(path: Path) -> Iterator[str]:
    """Every module a Python file imports, at any depth; `from a import b` yields a and a.b."""
    package = ("kvtier", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


# --- what the text says -------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [CSRC, CPP_TESTS], ids=["csrc", "tests"])
def test_includes_follow_the_arrows(folder: Path) -> None:
    wrong = []
    seen = 0
    for path in cpp_files(folder):
        layer = layer_of(path)
        if layer not in BELOW:  # conformance/ and support/ are seen through the layer that includes them
            continue
        for header in includes(path):
            if match := re.match(r"kvtier/(\w+)/", header):
                seen += 1
                if match[1] != layer and match[1] not in BELOW[layer]:
                    wrong.append(f"{path.relative_to(ROOT)} includes {header}")
    assert seen > 0
    assert not wrong


def test_every_source_lies_in_a_known_layer() -> None:
    assert {layer_of(p) for p in cpp_files(CSRC)} <= set(BELOW)
    assert {layer_of(p) for p in cpp_files(CPP_TESTS)} <= set(BELOW) | {"conformance", "support"}


@pytest.mark.parametrize(("header", "allowed"), RESERVED)
def test_outside_headers_stay_in_their_place(header: str, allowed: str) -> None:
    wrong = []
    for path in cpp_files(CSRC):
        name = path.relative_to(ROOT).as_posix()
        if not re.fullmatch(allowed, name):
            wrong += [f"{name} includes {h}" for h in includes(path) if re.match(header, h)]
    assert not wrong


@pytest.mark.parametrize("name", ["cuda_copy.cpp", "cuda_paths.cpp", "cuda_kernels.cu"])
def test_nothing_on_the_way_of_a_cuda_copy_allocates_or_waits_for_the_device(name: str) -> None:
    waits = (
        r"\bcuda(?:Malloc\w*|HostAlloc|Free\w*|HostRegister|HostUnregister|DeviceSynchronize|Memcpy|Memset)\("
    )
    assert re.findall(waits, (CSRC / "platform" / name).read_text()) == []


@pytest.mark.parametrize(("module", "allowed"), IMPORTERS.items())
def test_python_modules_are_imported_only_where_allowed(module: str, allowed: str) -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    wrong = []
    for path in files:
        name = path.relative_to(PACKAGE).as_posix()
        if not re.fullmatch(allowed, name):
            hits = [m for m in imported_modules(path) if f"{m}.".startswith(f"{module}.")]
            wrong += [f"{name} imports {m}" for m in hits]
    assert not wrong


# --- what the compiler says ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[str]]:
    """The compile command of every source in the dev preset, configured afresh in a folder of its own."""
    build = tmp_path_factory.mktemp("dev")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    assert cmake, "cmake is not installed (make setup)"
    configure = [cmake, "--preset", "dev", "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(
        configure, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads((build / "compile_commands.json").read_text())
    return {Path(e["file"]).resolve(): shlex.split(e["command"]) for e in entries}


def test_every_source_is_compiled_by_some_target(commands: dict[Path, list[str]]) -> None:
    sources = [p for p in (*cpp_files(CSRC), *cpp_files(CPP_TESTS)) if p.suffix in {".cpp", ".cu"}]
    if not any(p.suffix == ".cu" for p in commands):
        # No CUDA compiler here: it is only known that the build would find those in the right folders.
        in_cuda_layers = [p for p in sources if p.suffix == ".cu" and layer_of(p) in {"platform", "transfer"}]
        sources = [p for p in sources if p not in in_cuda_layers and p.parent.name != "fake_cuda"]
    assert sources
    orphans = [str(p.relative_to(ROOT)) for p in sources if p not in commands]
    assert not orphans


def syntax_check(command: list[str], probe: Path) -> subprocess.CompletedProcess[str]:
    """Compiles `probe` with the flags of another source's command, without writing an object."""
    flags = [a for a in command if a.startswith(("-I", "-D", "-std="))]
    flags += [f"-isystem{b}" for a, b in itertools.pairwise(command) if a == "-isystem"]
    compiler = next(a for a in command if not Path(a).name.startswith("ccache"))
    check = [compiler, *flags, "-fsyntax-only", str(probe)]
    return subprocess.run(check, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("layer", [layer for layer in BELOW if layer != "bindings"])
def test_the_compiler_refuses_an_include_against_the_arrows(
    layer: str, commands: dict[Path, list[str]], tmp_path: Path
) -> None:
    source = next((p for p in commands if p.parent == CSRC / layer and p.suffix == ".cpp"), None)
    if source is None:  # a layer without sources has no target, and nobody to stop
        assert not list((CSRC / layer).glob("*.cpp"))
        return
    probe = tmp_path / "probe.cpp"

    targets = {layer_of(p) for p in commands if p.is_relative_to(CSRC)}
    visible = [h for below in {layer, *BELOW[layer]} & targets for h in public_headers(below)]
    assert visible
    probe.write_text("".join(f'#include "{h}"\n' for h in visible))
    control = syntax_check(commands[source], probe)
    assert control.returncode == 0, control.stderr

    for hidden in BELOW.keys() - {layer, "bindings"} - BELOW[layer]:
        for header in public_headers(hidden):
            probe.write_text(f'#include "{header}"\n')
            refused = syntax_check(commands[source], probe)
            assert refused.returncode != 0, f"{layer} can include {header}"
            assert f"{header}: No such file" in refused.stderr

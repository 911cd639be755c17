# The project's verbs; .ci/run calls the same ones. `make demo` and `make test` set up all they need.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
export PATH := $(CURDIR)/.venv/bin:$(PATH)

cpp_files = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
pytest_vllm = .venv-vllm/bin/python -m pytest -c tests/vllm/pytest.ini --rootdir tests/vllm tests/vllm --durations 8
# Folders too: their times change when a file comes or goes.
native_inputs = pyproject.toml CMakeLists.txt $(shell find csrc cmake)

.PHONY: help setup build vllm-env demo test test-cpp test-py test-vllm test-vllm-full test-deep torture asan tsan lint lint-py lint-cpp tidy stubs stubs-check format bench gpu-check offline-deps wheel clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 24

setup: .venv/.ready  ## system packages (if any is missing) and .venv
vllm-env: .venv-vllm/.built  ## .venv-vllm: vLLM's CPU build and this package, for test-vllm
build: .venv/.built  ## the package, editable, into .venv; rebuilds what changed in csrc/
	@ls -t build/cp*/kvtier-cuda.txt | head -n 1 | xargs cat

demo: build  ## the demonstration
	kvtier demo

test: test-cpp test-py  ## all tests that need no GPU
test-cpp: setup  ## C++ tests (CTEST_ARGS="-R name")
	scripts/ctest.sh dev $(CTEST_ARGS)
test-py: build  ## Python tests (PYTEST_ARGS="-k name")
	pytest -n auto --maxprocesses 4 --dist worksteal -m "not gpu and not slow" $(PYTEST_ARGS)
test-vllm: .venv-vllm/.built  ## the connector against the real vLLM on the CPU: the tests that CI runs
	$(pytest_vllm) -m smoke $(PYTEST_ARGS)
test-vllm-full: .venv-vllm/.built  ## all of them, a soak and vLLM's own included (KVTIER_SOAK_SECONDS=600; PYTEST_ARGS="-k name")
	scripts/vllm-sources.sh
	$(pytest_vllm) $(PYTEST_ARGS)
test-deep: build  ## the model tests with many more examples (minutes)
	pytest -m slow --timeout 1800 $(PYTEST_ARGS)
torture: build  ## ten minutes of fuzzing (KVTIER_FUZZ_SECONDS=600), then thousands of crashes of the disk tier, and its mutants (KVTIER_TORTURE_CYCLES=4000)
	scripts/fuzz.sh
	python scripts/torture.py
asan: setup  ## C++ tests under AddressSanitizer and UBSan
	scripts/ctest.sh asan $(CTEST_ARGS)
tsan: setup  ## C++ tests under ThreadSanitizer
	scripts/ctest.sh tsan $(CTEST_ARGS)

lint: lint-py lint-cpp stubs-check  ## every static check
lint-py: setup
	ruff check .
	ruff format --check .
	mypy
	PYTHONPATH=src lint-imports --no-logo
lint-cpp: setup tidy
	clang-format --dry-run -Werror $(cpp_files)
tidy: setup
	scripts/tidy.sh
stubs-check: build
	python scripts/stubs.py --check
stubs: build  ## writes src/kvtier/_core.pyi from the built module
	python scripts/stubs.py
format: setup  ## formats Python and C++ in place
	ruff check --fix-only --quiet .
	ruff format .
	clang-format -i $(cpp_files)

# Where vLLM is installed, its copy of the package is made again: what is measured is what is here.
bench: build $(if $(wildcard .venv-vllm/.ready),.venv-vllm/.built)  ## all benchmarks that this machine can run in an hour, into benchmarks/results/, and the report (BENCH_ARGS="--without vllm")
	kvtier bench all $(BENCH_ARGS)

gpu-check:  ## on a machine with a GPU, network or none: builds, GPU tests, GPU benchmarks into benchmarks/results/
	scripts/gpu-check.sh
offline-deps:  ## the libraries that gpu-check needs where there is no network, into build/offline-deps
	scripts/offline-deps.sh

wheel: setup  ## a wheel, into dist/
	pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
clean:  ## removes what was built; keeps .venv's packages
	rm -rf build dist .venv/.built .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

.venv/.ready: requirements-dev.txt scripts/system-packages.sh scripts/make-venv.sh
	scripts/system-packages.sh
	scripts/make-venv.sh
	touch $@
.venv/.built: .venv/.ready $(native_inputs)
	mkdir -p build
	flock build/pip.lock pip install --quiet --no-deps --no-build-isolation \
	  --config-settings=cmake.define.KVTIER_WERROR=ON --editable .
	touch $@

.venv-vllm/.ready: requirements-vllm-py311.txt scripts/make-venv-vllm.sh
	scripts/make-venv-vllm.sh
	touch $@
# Installed as users install it, not editable: the entry point too is what vLLM meets.
.venv-vllm/.built: .venv-vllm/.ready .venv/.built $(shell find src)
	mkdir -p build
	flock build/pip.lock pip wheel --quiet --no-deps --no-build-isolation \
	  --config-settings=cmake.define.KVTIER_WERROR=ON --wheel-dir build/vllm-wheel .
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall \
	  build/vllm-wheel/kvtier-*.whl
	touch $@

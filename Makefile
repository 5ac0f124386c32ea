# make demo   set up .venv and run the main job
# make test   set up what the tests need and pass them
# make test-bindings   the plugin's tests through NVIDIA's older bindings, which it fetches
# make test-torch   the tests that need PyTorch, with one for CPUs and transformers, which it fetches
# make test-all   make test, and the long sweeps of which it runs some cases each
# make test-processors   the tests of numbers, as processors without AVX-512 and without AVX2 see them
# make wheel   dist/pyfmha-*.whl with a library inside, which needs neither Triton nor a C compiler; half an hour
#              make wheel WHEEL_ARCHS=sm_90 WHEEL_OPTIONS='--dtype fp16 --head-size 64' for less of it
# make wheel-pure   dist/pyfmha-*.whl without one
# make docs   build/docs/index.html: the reference of the Python API, with the guides
# make lint   style and types only; changes nothing

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo test test-all test-torch test-processors test-bindings wheel wheel-pure docs lint clean

# A file's tests stay together: they share what they build.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

demo: $(VENV)/.demo
	$(BIN)/pyfmha demo

# Compiled before, for tests start hundreds of processes that import it, and some environments tell Python to keep none.
test: lint
	$(BIN)/python -m compileall -q pyfmha tests/*.py
	$(PYTEST)

test-all: test
	PYFMHA_SWEEPS=1 $(PYTEST) -m 'long or swept'

# PyTorch for CPUs asks for no Triton of its own, which the tests' is another than. Where pip finds no such build, its
# variable PIP_EXTRA_INDEX_URL takes the index for CPUs that PyTorch's page on installing names.
TORCH ?= torch==2.13.0 transformers
TORCH_TESTS := tests/torch_models tests/test_host_times.py tests/runtime/test_tensors.py tests/onnx_models/test_model_examples.py

test-torch: $(VENV)/.torch
	$(PYTEST) $(TORCH_TESTS)

test-processors: $(VENV)/.test
	$(BIN)/python tests/processors.py

# Through NVIDIA's bindings of TensorRT 10, with numpy 1.26 and numpy 2.
test-bindings: $(VENV)/.test
	$(BIN)/python tests/real_bindings.py

WHEEL_ARCHS ?= sm_80 sm_86 sm_89 sm_90 sm_100 sm_120
WHEEL_OPTIONS ?=

wheel: $(VENV)/.wheel
	$(BIN)/pyfmha build --fresh --arch $(WHEEL_ARCHS) $(WHEEL_OPTIONS) -o build/wheel
	PYFMHA_WHEEL_LIBRARY=build/wheel/libpyfmha.so $(BIN)/python -m hatchling build -t wheel -d dist
	ls -lh dist/pyfmha-*.whl

wheel-pure: $(VENV)/.wheel
	$(BIN)/python -m hatchling build -t wheel -d dist

docs: $(VENV)/.docs
	$(BIN)/python .ci/docs.py build/docs

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[aot]'
	touch $@

$(VENV)/.wheel: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[wheel]'
	touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# Without them, the tests against the real bindings are skipped, which pytest lists with the reason.
	-$(BIN)/python -m pip install --quiet --editable '.[bindings]'
	touch $@

$(VENV)/.torch: $(VENV)/.test
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

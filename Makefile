PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What runs the demo, and what the tests need on top of it.
DEMO := $(VENV)/.installed
TEST := $(VENV)/.installed-for-tests

.PHONY: demo test lint lab clean

# torch is named first and exactly: this release's wheel serves every Python of ours, and a CPU is enough.
$(DEMO): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[tflite,onnx,coreml,report]'
	touch $(DEMO)

$(TEST): $(DEMO) tests/requirements.txt tests/requirements-alone.txt
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt -e '.[all,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/requirements-alone.txt
	touch $(TEST)

# Compress, export, check and profile the embedded model; the report is build/demo/report.html.
# One thread: it does not wait for a second core that is busy.
demo: $(DEMO)
	OMP_NUM_THREADS=1 $(BIN)/edgecomp run edgecomp/demo/recipe.yaml --out build/demo

test: $(TEST) lint lab
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The rooms are seen as edgecomp's only in an installed copy, so that is what mypy checks.
lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/check build/lib build/bdist.*
	$(BIN)/python -m pip install --quiet --no-deps --target build/check .
	cd build/check && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p edgecomp

# The emulated Arm device; says why and goes on where it cannot be built.
lab: $(TEST)
	$(BIN)/python tests/lab/lab_build.py

clean:
	rm -rf build dist *.egg-info

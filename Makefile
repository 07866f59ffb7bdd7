PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := tflite,onnx,coreml,ssh,adb,report,dev

.PHONY: demo test lint clean

# torch is named first and exactly: the wheel of this release is a CPU build.
$(STAMP): pyproject.toml tests/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r tests/requirements.txt -e '.[$(EXTRAS)]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/edgecomp run edgecomp/demo/recipe.yaml --out build/demo

test: $(STAMP) lint
	-$(BIN)/python tests/lab/build.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/check && $(BIN)/pip install --quiet --no-deps --target build/check .
	cd build/check && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p edgecomp

clean:
	rm -rf build dist *.egg-info

# make demo       trains, evaluates and shows a small DreamLLM on scanned digits (its own environment, a few minutes)
# make test       runs every test but the slow ones
# make test-slow  runs those: models of the published size; about 14 GiB of memory
# make lint       ruff and mypy
# make bench      times operators and models against PyTorch on this machine and writes a report (about ten minutes)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
RUN    := OMP_WAIT_POLICY=passive
TEST   := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

NATIVE  := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
OUT     ?= runs/digits
BENCH   ?= runs/bench

.PHONY: demo test test-slow lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(RUN) $(BIN)/dreamllm train digits --out $(OUT)
	@echo "Trained model: $(OUT)/model   Look at: $(OUT)/report.html"

# The interpreter tests and the ahead-of-time compilations need processes of their own: Triton reads
# TRITON_INTERPRET when a kernel is decorated. The main run is last, so its closing line is the last line.
test: $(VENV)/.test
	TRITON_INTERPRET=1 $(RUN) $(TEST) tests/kernels/interpreter
	$(RUN) $(TEST) tests/kernels/aot
	$(RUN) $(TEST) --dist loadfile --ignore=tests/kernels/interpreter --ignore=tests/kernels/aot

# One after the other: each of them may need most of a machine's memory.
test-slow: $(VENV)/.test
	$(RUN) $(BIN)/python -m pytest -m slow --durations=0 --ignore=tests/kernels

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(RUN) $(BIN)/python -m benchmarks bench --out $(BENCH)

clean:
	rm -rf build *.egg-info dreamkernels/*.so

# torch first (the build reads its headers), then triton (a CPU build of torch does not bring it), then this package.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy "setuptools>=77" wheel ninja pybind11
	if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(PIP) install -q -c constraints.txt triton; fi
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(NATIVE)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(NATIVE)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) install -q -c constraints.txt -e ".[lint]" --no-build-isolation
	touch $@

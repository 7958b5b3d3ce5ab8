# Every target sets up what it needs in .venv; the first run downloads PyTorch (a few minutes).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint types contracts unit kernels sweep bench test-oldest clean

demo: $(VENV)/.demo
	$(BIN)/lora-adapters demo

test: lint types contracts unit kernels

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

# Two workers with one thread each: the tests are small, and idle threads of one worker would slow the other.
unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile

# The Triton kernels on CPU tensors. A process of its own: triton is imported as an interpreter there.
kernels: $(VENV)/.dev
	TRITON_INTERPRET=1 LORA_ADAPTERS_KERNELS=interpret OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/ops/kernels

# Every model type that transformers registers, every module of timm, every denoiser of diffusers, and their tables in docs/;
# `make test` runs a sample of them.
sweep: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/transformers/sweep.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/timm/sweep.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/diffusers/sweep.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/attach.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/parity.py
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
	  $(BIN)/python benchmarks/layers.py && $(BIN)/python benchmarks/models.py && $(BIN)/python benchmarks/unet.py; fi
	$(BIN)/python benchmarks/dreambooth.py

# The oldest supported versions (see tests/oldest.txt).
test-oldest: .venv-oldest/.done
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -q -n 2 --dist loadfile

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[dev]" -e examples/third_party_plugin
	touch $@ $(VENV)/.demo

.venv-oldest/.done: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --upgrade pip
	.venv-oldest/bin/python -m pip install -q -c tests/oldest.txt -e ".[dev]" -e examples/third_party_plugin
	touch $@

clean:
	rm -rf .venv .venv-oldest build dist

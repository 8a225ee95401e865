# `make demo` and `make test` are the two commands of the README. All targets install into .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CHECKED = hf_stompp examples tests benchmarks setup.py

RESULT ?= bench.json

.PHONY: demo test bench gpu-check quality style clean

$(VENV)/installed: setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-deps --requirement constraints.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	# Beside site-packages: torch would use it, and it is there to be interpreted by the tests.
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/triton triton==3.9.0
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo/run_demo.py

test: $(VENV)/installed
	$(BIN)/python -m pytest

bench: $(VENV)/installed
	$(BIN)/hf-stompp bench --threads 1 2 --kernels avx2 scalar --output $(RESULT)

# On a machine with a GPU, with the PyTorch, Triton and Transformers that it has: nothing is installed.
gpu-check:
	PYTHONPATH=. $(PYTHON) -m pytest -m cuda tests/ops/test_cuda.py
	for model in bert-base bert-large; do \
		PYTHONPATH=. $(PYTHON) benchmarks/training.py --device cuda --model $$model --dtype bf16 --steps 60 \
			--output benchmarks/results/training_$${model}_bf16_cuda.json || exit 1; \
	done

quality: $(VENV)/installed
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

clean:
	rm -rf $(VENV) build dist *.egg-info demo

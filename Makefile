# make demo       set up, then learn CartPole-v1 in dreams; prints where the report is
# make test       the tests that fit in minutes; make test-slow runs the others
# make lint       ruff and mypy
# make docs       the API reference, from the docstrings, in build/api
# make wheel      a wheel in build/dist

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
DEMO   := runs/demo

.PHONY: demo test test-slow lint docs wheel clean

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/raywm train cartpole --out $(DEMO)
	@echo "report: $(CURDIR)/$(DEMO)/report.html"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(PIP) -e ".[docs]"
	$(BIN)/python docs/api.py build/api

wheel: $(VENV)/.created
	$(BIN)/python -m pip wheel -q --no-deps -w build/dist .

clean:
	rm -rf $(VENV)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 10); ok or sys.exit("raywm needs Python >= 3.10; $(PYTHON) is %d.%d. Try: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Without an NVIDIA driver on Linux PyPI's torch brings gigabytes of CUDA for nothing. If PyTorch's own index cannot be
# reached, the install below takes whatever torch pip finds.
$(VENV)/.torch: $(VENV)/.created
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		echo "installing torch for CPUs"; \
		$(PIP) -q --retries 1 --timeout 30 --extra-index-url https://download.pytorch.org/whl/cpu torch \
			|| echo "not from PyTorch's index; trying without it"; \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -e ".[dev,atari,box2d,doom]"
	@touch $@ $(VENV)/.installed

# make train: install, then distil the embedded teacher (six to thirteen minutes on two cores, with the installation)
# make test:  install, then run the tests (no GPU, no network)
# make bench: benchmarks and their gates; ARGS="--results FILE" keeps the numbers

PYTHON ?= python3
CONFIG ?= configs/ddpm.json
VENV := .venv
READY := $(VENV)/.ready
# Where PyTorch sees no GPU, this keeps DeepSpeed from looking for one and warning; asked once the installation is there.
ACCELERATOR = $(shell $(VENV)/bin/python -c "import torch; torch.cuda.is_available() or print('DS_ACCELERATOR=cpu')")

# Ctrl-C reaches training and its launcher, and training stops in order; the command `deepspeed` would print a traceback.
# Why a run ends it says itself; the launcher would add a line with the whole command.
train: $(READY)
	trap '' INT; $(ACCELERATOR) $(VENV)/bin/deepspeed --log_level critical sidfast/train.py --config $(CONFIG) $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest -m "not gpu and not slow" --numprocesses auto --dist loadfile \
		--no-loadscope-reorder $(ARGS)

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -m slow $(ARGS)

test-gpu: $(READY)
	$(VENV)/bin/python -m pytest -m gpu $(ARGS)

bench: $(READY)
	$(VENV)/bin/python -m pytest bench $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(READY)
	$(VENV)/bin/python -m sidfast.config.describe docs

# Most modules of the libraries are never loaded, so none is compiled beforehand: Python keeps what it compiles at the
# first import, if it may.
unexport PYTHONDONTWRITEBYTECODE

$(READY): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache

.PHONY: train test test-slow test-gpu bench lint docs clean

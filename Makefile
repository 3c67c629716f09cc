# minillama: `make demo` and `make test` are all you need; both set up .venv by themselves.

PYTHON ?= python3
# On a GPU machine whose driver needs another CUDA build: make demo TORCH_INDEX=URL, with the URL
# of the package index that PyTorch's install page names for that build.
TORCH_INDEX ?=
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
          $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help demo test check lint lab notebooks data toy lock clean

help:       ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */\1\t/' | expand -t 12

demo: $(VENV)/core  ## set up, train a small model on the tales of the toy world, make an assistant of it
	$(BIN)/minillama demo

test: $(VENV)/dev   ## set up, then all tests and all notebooks
	$(BIN)/python -m pytest tests -n auto --dist loadfile
	$(BIN)/python -m pytest -p nbval --nbval --nbval-current-env --nbval-cell-timeout=300 notebooks

check: lint         ## format, lint, types and the fast tests
	$(BIN)/python -m pytest tests -n auto --dist loadfile -m "not slow"

lint: $(VENV)/dev   ## format, lint and types
	$(BIN)/python -m ruff format --check . && $(BIN)/python -m ruff check . && $(BIN)/python -m mypy

lab: $(VENV)/dev    ## open the course in JupyterLab
	$(BIN)/python -m jupyterlab notebooks/00_tour.ipynb

notebooks: $(VENV)/dev  ## rebuild notebooks/*.ipynb, with outputs, from notebooks/src/*.py
	$(BIN)/python notebooks/build.py

data: $(VENV)/core  ## rebuild data/ from the toy world's grammar, bit for bit
	$(BIN)/python -m minillama.data.tales data
	$(BIN)/python -m minillama.data.dialogues data

toy: $(VENV)/core   ## train anew what the notebooks show, in data/toy: a model, an assistant, one that keeps its word
	$(BIN)/minillama demo --no-chat --out data/toy
	rm -rf runs/toy-chat data/toy/chat
	$(BIN)/minillama sft data/toy/checkpoint --data toy --out runs/toy-chat
	cp -R runs/toy-chat/checkpoint data/toy/chat
	rm -rf runs/toy-gatt data/toy/gatt
	$(BIN)/minillama gatt data/toy/chat --out runs/toy-gatt
	cp -R runs/toy-gatt/checkpoint data/toy/gatt

lock:       ## make constraints.txt anew from pyproject.toml (needs uv)
	uv pip compile --universal --python-version 3.11 --all-extras --no-header --no-annotate \
	  --no-emit-package minillama -c pins.in pyproject.toml -o constraints.txt

clean:      ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "minillama needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python's venv module is missing: on Debian and Ubuntu, apt install python3-venv"; exit 2; }

$(VENV)/core: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e . && touch $@

$(VENV)/dev: $(VENV)/core
	$(PIP) -e '.[dev]' && touch $@

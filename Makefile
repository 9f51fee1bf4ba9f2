# make demo    set everything up and run the main job; ends in runs/index.html
# make test    lint, notebooks without outputs, all tests
# make lab     JupyterLab on the first notebook
# make parity FOLDER=...   compare with reference values computed elsewhere
# make lock    write constraints.txt again from pyproject.toml
#
# .venv is built on first use, by uv when there is one, else by pip (Python 3.11 or newer).
# PYTHON=python3.12 chooses the interpreter. TORCH=cpu|auto chooses the torch build when your package index
# would otherwise bring CUDA: auto looks at the driver (uv only). CORES=n limits the notebooks run at once.

SHELL      := /bin/bash
PYTHON     ?= python3
TORCH      ?=
CORES      ?= all
BIN        := .venv/bin
STAMP      := .venv/.companion-installed
UV          = $(shell command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1 && echo uv)
# uv does not read pip's settings: pass the caller's on, so that both installers find the same wheels.
FIND_LINKS  = $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
NOTEBOOKS  := $(wildcard notebooks/*.ipynb notebooks/*/*.ipynb)
INSTALL    := -c constraints.txt -e ".[dev,batch]"

.PHONY: setup demo test lab parity lock clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@if [ -n "$(UV)" ]; then set -e; \
	   [ -x $(BIN)/python ] || uv venv --quiet --python "$$(command -v $(PYTHON))" .venv; \
	   UV_FIND_LINKS="$(shell echo $(FIND_LINKS) | tr -s " " ",")" uv pip install --python $(BIN)/python $(if $(TORCH),--torch-backend=$(TORCH)) $(INSTALL); \
	 else set -e; \
	   if [ "$(TORCH)" = auto ]; then echo "TORCH=auto needs uv: pip install uv"; exit 2; fi; \
	   [ -x $(BIN)/python ] || $(PYTHON) -m venv .venv; \
	   $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --quiet; \
	   $(if $(filter cpu,$(TORCH)),$(BIN)/python -m pip install torch -c constraints.txt --index-url https://download.pytorch.org/whl/cpu;) \
	   $(BIN)/python -m pip install $(INSTALL); \
	 fi
	@touch $@

demo: $(STAMP)
	@$(BIN)/companion batch --cores $(CORES)

test: $(STAMP)
	$(BIN)/ruff check .
	$(if $(NOTEBOOKS),$(BIN)/nbstripout --verify --extra-keys "metadata.papermill cell.metadata.papermill" $(NOTEBOOKS))
	$(BIN)/python -m pytest

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks/start_here.ipynb

parity: $(STAMP)
	@$(if $(FOLDER),,echo "say where the reference values are: make parity FOLDER=path"; exit 2)
	@$(BIN)/python -m tests.parity $(FOLDER)

# Found without find-links, so that the lock names released versions only, for every platform.
lock:
	env -u UV_FIND_LINKS uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --upgrade \
	  --no-annotate --quiet --custom-compile-command "make lock" --output-file constraints.txt

clean:
	rm -rf .venv .snakemake .pytest_cache .ruff_cache build
	find src tests -name __pycache__ -prune -exec rm -rf {} +

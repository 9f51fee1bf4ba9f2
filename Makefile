# make demo    set everything up and run the main job; ends in runs/index.html
# make test    lint, types, notebooks without outputs, all tests
# make types   the type checker over src
# make lab     JupyterLab on the first notebook
# make figures the pictures of the README, again from the runs of make demo
# make docs    the site, build/site/index.html, with the notebooks as make demo left them
# make parity FOLDER=...   compare with reference values computed elsewhere
# make lock    write constraints.txt again from pyproject.toml
# make clean   remove .venv and working files; runs/ stays
#
# .venv is built on first use, by uv when there is one, else by pip (Python 3.11 or newer).
# PYTHON=python3.12 chooses the interpreter. TORCH=cpu|auto chooses the torch build when your package index
# would otherwise bring CUDA: auto looks at the driver. CORES=n limits the notebooks run at once, WORKERS=n the
# processes that share the tests: as many as there are cores, 4 at most, of one thread each.

PYTHON    ?= python3
CORES     ?= all
WORKERS   ?= $(shell $(PYTHON) -c "import os; print(min(4, len(os.sched_getaffinity(0))))")
BIN       := .venv/bin
INSTALLED := .venv/.companion-installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb notebooks/*/*.ipynb)
export TORCH

.PHONY: setup demo test types lab figures docs parity lock clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) tools/install.py

demo: $(INSTALLED)
	@$(BIN)/companion batch --cores $(CORES)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(if $(NOTEBOOKS),$(BIN)/nbstripout --verify --extra-keys "metadata.papermill cell.metadata.papermill" $(NOTEBOOKS))
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

types: $(INSTALLED)
	$(BIN)/basedpyright

lab: $(INSTALLED)
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/jupyter lab notebooks/start_here.ipynb

figures: $(INSTALLED)
	@$(BIN)/python tools/figures.py

docs: $(INSTALLED)
	@$(BIN)/python tools/docs.py

parity: $(INSTALLED)
	@$(if $(FOLDER),,echo "say where the reference values are: make parity FOLDER=path"; exit 2)
	@$(BIN)/python -m tests.parity $(FOLDER)

# Without find-links, so that the lock names released versions only, for every platform.
lock:
	env -u UV_FIND_LINKS uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --upgrade \
	  --no-annotate --quiet --custom-compile-command "make lock" --output-file constraints.txt

clean:
	rm -rf .venv .venv-busy .venv-lock .snakemake .pytest_cache .ruff_cache build
	find src tests -name __pycache__ -prune -exec rm -rf {} +

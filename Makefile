# Every target sets up what it needs: a virtual environment in .venv, made once and again when pyproject.toml or
# constraints.txt change.
VENV := .venv
BIN := $(VENV)/bin
PYTHON := python3
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
ALL := -m "not gpu and not network and not torture"

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint types check mutants torture soak fuzz bench gpu docs wheel notebooks clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'

# torch comes first and alone, so that pip keeps the build it finds for this machine (CPU or CUDA). Compiled as pip compiles what
# it installs: tests and benchmarks start hundreds of processes, and some machines keep no bytecode.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,notebooks,dev,scale]'
	$(BIN)/python -m compileall -q sftdata sfttrain
	@touch $@

install: $(STAMP) ## Make the virtual environment with everything in it

demo: $(STAMP) ## Prepare four small files, look at the mask, train a tiny model and talk to it (under two minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh demo

test: $(STAMP) ## Run the quick tests: units, properties, rules of the house, a thin line from end to end (under four minutes)
	$(PYTEST)

test-all: $(STAMP) ## Run every test that needs neither a GPU nor the network, and the notebooks
	$(PYTEST) $(ALL) --nbmake --nbmake-timeout=300

lint: $(STAMP) ## Check style and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP) ## Check types (mypy --strict)
	$(BIN)/mypy

check: lint types test ## Check what every change must pass; CI runs test-all

mutants: $(STAMP) ## Break the product in seventy places, one at a time: the quick tests must notice each
	$(BIN)/python -m tests.mutants

torture: $(STAMP) ## Break everything at length: 240 kills, failing disks, lost power, bombs, 24 runs of one digest, resumed training (about 25 minutes)
	$(PYTEST) -m torture tests

GIGABYTES := 4
soak: $(STAMP) ## Prepare GIGABYTES=4 on this disk, killed on the way (takes six times that space, about ten minutes)
	$(BIN)/python -m tests.torture.soak $(GIGABYTES)

MINUTES := 10
fuzz: $(STAMP) ## Fuzz readers, masks, manifests and shards for MINUTES=10
	-$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(MINUTES)

bench: $(STAMP) ## Run the CPU benchmarks (under ten minutes) and put a dated table on top of benchmarks/RESULTS.md
	$(BIN)/python benchmarks/all.py

GPU_MINUTES := 4.8
gpu: $(STAMP) ## On one NVIDIA card: run the tests of steps on text, then the benchmark beside TRL (under eight minutes)
	-$(BIN)/python -m pip install --quiet liger-kernel
	timeout 170 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m gpu -W default tests/integration/test_train_gpu.py \
	    tests/unit/test_train_gated.py; tests=$$?; $(BIN)/python benchmarks/gpu_step.py --minutes $(GPU_MINUTES) && exit $$tests

docs: $(STAMP) ## Write the pages that the code knows, and build the site in build/site; a link that leads nowhere stops it
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/make_reference.py
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet -c docs -d build/doctrees . build/site

wheel: ## Build dist/, and use the wheel in a clean environment without the source tree
	$(PYTHON) -m venv --clear build/wheel
	build/wheel/bin/python -m pip install --quiet build
	build/wheel/bin/python -m build --outdir dist
	$(PYTHON) -m venv --clear build/wheel
	build/wheel/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cp -r examples build/wheel
	cd build/wheel && bin/sftdata prepare examples/prepare.yaml -o set && bin/sftdata verify set \
	    && bin/sftdata stats set --html report.html && bin/sftdata explain nothing-trained && bin/sfttrain --version

notebooks: $(STAMP) ## Execute the notebooks
	$(PYTEST) --nbmake --nbmake-timeout=300 notebooks

clean: ## Remove what can be made again
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

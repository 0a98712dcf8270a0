# The commands of README and CONTRIBUTING: make demo, make test, make check, make docs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo federation-demo test check format docs clean

# Reinstalled only when what is to be installed changes.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "samfed needs Python 3.11 or newer; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/samfed demo

# a SuperLink and three sites on this machine; OMP: four processes share the cores
federation-demo: .venv/installed
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tools/federation_demo.py

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# a process for each core; coverage of what these processes run, not of the commands they start.
# torch cannot trace what slipcover counts: the tests that trace come by themselves
test: check
	$(BIN)/python -m slipcover --source pipeline --json --out .coverage.json \
	  -m pytest -n logical --maxprocesses 4 --dist worksteal
	$(BIN)/python -m pytest tests/sam/test_tuning.py -k "flex or one_graph"
	$(BIN)/python -m slipcover --merge .coverage.json --out .coverage.json \
	  --skip-covered --fail-under 95

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the site, in build/site; the variable silences an announcement about the theme's successor
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

clean:
	rm -rf .venv build samfed.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage.json

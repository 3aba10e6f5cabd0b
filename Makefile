# Every target creates .venv if needed and installs what it uses; only Python 3.11+ with pip must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train mqar test test-wheel test-long lint docs format bench clean

train: .venv/base.done  ## train the tiny language model on a CPU
	$(BIN)/dma-lightning fit -c configs/model/tiny.yaml -c configs/data/pydoc.yaml -c configs/trainer/cpu.yaml

mqar: .venv/base.done  ## train associative recall on a CPU
	$(BIN)/dma-lightning fit -c configs/model/mqar.yaml -c configs/data/mqar.yaml -c configs/trainer/mqar.yaml

test: .venv/test.done  ## run the tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-wheel: .venv/base.done  ## build the wheel, and use it outside of the clone; two minutes
	$(BIN)/python tests/try_wheel.py

test-long: .venv/test.done  ## half an hour of drawn cases against oracles, and of killed runs; results under runs/
	$(BIN)/python benchmarks/fuzz.py --cases 3000 --processes 2 --out runs/fuzz.json
	$(BIN)/python tests/lightning/kill_runs.py --kills 20 --out runs/kill_runs.json

lint: .venv/lint.done  ## check style, format, types, and files that services read
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yaml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff

docs: .venv/docs.done  ## build the website, with an API reference, in build/site; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/site-cache . build/site
	@echo open build/site/index.html

format: .venv/lint.done  ## repair style and format where that is automatic
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/base.done  ## measure the attention backends on this machine's CPU
	$(BIN)/python benchmarks/cpu_attention.py

clean:
	rm -rf .venv runs build

# A CUDA build of torch pins its own Triton, which pip would hold to be in conflict with ours.
.venv/constraints.txt: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("dma-lightning needs Python 3.11 or newer, got " + sys.version.split()[0] + "; set PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	grep -v '^triton' constraints.txt > $@

.venv/base.done: .venv/constraints.txt pyproject.toml
	$(BIN)/python -m pip install --quiet -c .venv/constraints.txt -e .
	touch $@

.venv/lint.done: .venv/base.done
	$(BIN)/python -m pip install --quiet -c .venv/constraints.txt -e '.[lint]'
	touch $@

.venv/docs.done: .venv/base.done
	$(BIN)/python -m pip install --quiet -c .venv/constraints.txt -e '.[docs]'
	touch $@

.venv/test.done: .venv/base.done
	$(BIN)/python -m pip install --quiet -c .venv/constraints.txt -e '.[test]'
	$(BIN)/python -c 'import triton' 2> /dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt triton
	touch $@

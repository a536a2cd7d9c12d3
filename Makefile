# On a fresh machine: `make demo` sets up and does the main job, `make test` sets up and passes the tests.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
DEMO   := $(VENV)/.demo
READY  := $(VENV)/.ready

.PHONY: demo test lint bench clean

demo: $(DEMO)
	$(BIN)/python main.py --dataset digits --mode train_test \
		--save_dir checkpoints/demo --output_dir visualizations/demo --overwrite
	@echo 'to use it from here:  . $(BIN)/activate   then  diffmoe --help'
	@echo 'to see what its experts do:  diffmoe visualize --checkpoint checkpoints/demo/digits_model.pth'

# Two processes of one thread each: tests are small, and torch's threads would only wait for each other.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) checkpoints visualizations

# The environment is made once, and again when what it is made from changes: for the demo what the program needs and no
# more, for everything else also the tools, the page, the scorer of captions and what the benchmarks compare with.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

$(READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -c constraints.txt -e '.[dev,caption,bench,app]'
	touch $(DEMO) $@

# On a fresh machine: `make demo` sets up and does the main job, `make test` sets up and passes the tests.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/python main.py --dataset digits --mode train_test \
		--save_dir checkpoints/demo --output_dir visualizations/demo --overwrite
	@echo 'to see what its experts do with a picture: $(BIN)/diffmoe app   then open http://127.0.0.1:7860'

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) checkpoints visualizations

# The environment is made once, and again when what it is made from changes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[dev,caption,bench,app]'
	touch $@

# make demo   set up, then the whole path on a made-up data set: films, shards, training, evaluation, bench
# make test   set up, then linter, type check and every test that needs no GPU
# make soak   kill and resume training for MINUTES=10, and compare with a run that was never interrupted, bit by bit
# make gpu    on a machine with CUDA (and DALI; without, the cpu backend is measured): GPU tests and bench, JSON into bench/results (or $OUT)
# make clean  undo all of it

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
NEED_GB := 9
MINUTES ?= 10
# Much of a test's time goes into waiting for processes to start: two at a time take little over half the time of one.
TEST_WORKERS ?= 2

.PHONY: demo test soak gpu clean

demo: $(VENV)/installed
	$(BIN)/python -m bench.demo --out $(DEMO)

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile

soak: $(VENV)/installed
	$(BIN)/python tests/soak_train.py --minutes $(MINUTES)

# Uses the Python that has torch and DALI there: such a machine is often offline and brings its own.
gpu:
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m bench.gpu; else $(PYTHON) -m bench.gpu; fi

$(VENV)/installed: pyproject.toml constraints.txt
	@[ "$$(uname -s)" = Linux ] || { echo "shardclip runs on Linux only, this is $$(uname -s)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Python 3.11 or 3.12 is needed, $$($(PYTHON) --version) was found; set PYTHON=python3.11" >&2; exit 2; }
	@echo "Installing pinned torch, DALI and the rest into $(VENV): about 7 GB of disk, a few minutes."
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); [ -x $(BIN)/python ] || [ "$$free" -ge $(NEED_GB) ] || \
	  { echo "Only $$free GB are free here; $(NEED_GB) GB are needed." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,cluster,dicom,export,tune,wandb]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

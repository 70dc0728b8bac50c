# `make demo` and `make test` each work alone on a machine with Python 3.11+, pip and venv.
PYTHON ?= python3
BIN := .venv/bin
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.PHONY: demo test soak lint options api docs notebooks dist same house bench quality demo-weights clean

demo: .venv/installed
	$(OFFLINE) OMP_WAIT_POLICY=PASSIVE $(BIN)/lpl demo --output_dir lpl-demo

test: .venv/installed lint
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest -n 2 --dist loadfile tests

# What `make test` leaves out. Kills caching at 500 random moments and at 500 system calls, training at 100 of each, every
# other command at 30; tries 150 changes of every kind of file: two hours.
soak: .venv/installed
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest -m slow tests
	LPL_KILLS=100 OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest tests/invariants/test_killed_training.py
	LPL_KILLS=30 OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest -m "slow or not slow" tests/invariants/test_killed_commands.py
	LPL_KILLS=500 OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest tests/invariants/test_killed_caching.py
	LPL_FUZZ=150 OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest tests/fuzz

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/options.md, made of what is declared beside the options.
options: .venv/installed
	$(BIN)/python tools/options_page.py

# docs/api.md, made of the docstrings of the public names.
api: .venv/installed
	$(BIN)/python tools/api_page.py

# The site of README and docs, in build/docs/html; a link that leads nowhere fails.
docs: .venv/installed
	$(BIN)/python tools/docs_site.py

# Runs the notebooks of examples/ and stores their outputs: minutes.
notebooks: .venv/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(OFFLINE) $(BIN)/python tools/notebooks.py

# Archive and wheel for a package index, in dist: `make dist REPOSITORY=https://github.com/OWNER/NAME`.
dist: .venv/installed
	$(BIN)/python tools/distribution.py $(REPOSITORY)

# Runs the same commands with an older commit (BASE=..., else where this branch left main), and compares what they leave.
same: .venv/installed
	$(BIN)/python tools/same_results.py $(if $(BASE),--base $(BASE)) $(SAME)

# Size, rooms and circles of the code, and how far options spread.
house: .venv/installed
	$(BIN)/python tools/house.py --frames

# The figures of docs/performance.md, the pictures of docs/how_it_works.md: over half an hour on two CPU cores.
bench: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	for what in loss_cost "loss_cost cpu" "loss_time time" "loss_time memory" "loss_time sweep" random_depth budget crop_bias step_time \
	    step_profile plan_check plan_table data_reading data_start "data_start memory" "data_start million" loss_pictures; do \
	    set -- $$what; echo "## $$what"; $(OFFLINE) $(BIN)/python benchmarks/$$1.py $$2 || exit 1; done

# LPL against the plain objective at their best guidance, searched alike, five seeds: days of two CPU cores; the same command
# continues, and begins with what is published of it.
# See benchmarks/quality/README.md.
quality: .venv/installed
	$(OFFLINE) $(BIN)/python -m benchmarks.quality.run --stage all $(QUALITY)

# Remakes the shipped weights: over two hours on two CPU cores.
demo-weights: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[pretrain]'
	for part in vae decoder base; do $(BIN)/python -m tools.demo_weights $$part || exit 1; done

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo,dev,docs]'
	touch $@

clean:
	rm -rf .venv lpl-demo lpl-output build dist src/*.egg-info

# Targets for people; `make` alone lists them.

PYTHON ?= python3
SEED ?= 0
PY = .venv/bin/python
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q -rs -n auto --dist worksteal

DEMO = --data-dir demo/data --weights-dir demo/weights --observations-dir demo/observations_dir \
       --image-size 36 --seed $(SEED)
DEMO_LABELLED = $(PY) train_stl_after_ssl.py $(DEMO) --batch-size 64 --lr 0.1 --full-fine-tune True --full-epochs 1

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */make \1\t/' | expand -t 18

.venv/runtime: requirements.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/development: requirements-dev.txt .venv/runtime
	$(PY) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

demo: .venv/runtime  ## synthetic images, pretraining, fine-tuning and the table, in the folder demo/ (SEED=0)
	rm -rf demo
	$(PY) -m benchmarks.synthetic --raw-dir demo/raw --seed $(SEED)
	$(PY) stl10_data_load.py --raw-dir demo/raw --data-dir demo/data
	$(PY) pirl_stl_train_test.py $(DEMO) --batch-size 32 --epochs 5 --knn-every 0 --only-train True --experiment-name pirl
	$(DEMO_LABELLED) --experiment-name labelled_random
	$(DEMO_LABELLED) --experiment-name labelled_pirl --pirl-model-name pirl
	@echo; cat demo/observations_dir/results.md

test: .venv/development  ## the test suite
	$(PYTEST)

FAULTS ?= 200
faults: .venv/development  ## the slow tests; then kill, interrupt, fill the disk …, long (FAULTS=200 SEED=0)
	$(PYTEST) -m slow
	$(PY) tests/faults.py --faults $(FAULTS) --seed $(SEED)

endurance: .venv/development  ## 2,000 steps and hundreds of checkpoints: memory and open files must not grow
	OMP_NUM_THREADS=1 $(PY) tests/endurance.py

DATA ?= stl10_data
SEEDS ?= 3
EPOCHS ?= 100
LABELLED_EPOCHS ?= 100
results: .venv/runtime  ## the whole results table (DATA=stl10_data SEEDS=3 EPOCHS=100 LABELLED_EPOCHS=100 FLAGS='')
	$(PY) -m benchmarks.results --data-dir $(DATA) --seeds $(SEEDS) --epochs $(EPOCHS) \
	    --labelled-epochs $(LABELLED_EPOCHS) --flags="$(FLAGS)" --labelled-flags="$(LABELLED_FLAGS)"

gpu-report: .venv/development  ## tests and speed on your GPU, in results/gpu_<card>.md: ten minutes (FLAGS='')
	$(PY) -m benchmarks.gpu_report $(FLAGS)

lint: .venv/development  ## ruff's checks and its formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:  ## remove the demo's files and caches, nothing else
	rm -rf demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: help demo test faults endurance results gpu-report lint clean

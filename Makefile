# Targets for people; `make` alone lists them.

PYTHON ?= python3
SEED ?= 0
PY = .venv/bin/python
PYTEST_FLAGS = -q -rs -n auto --dist worksteal

# Idle threads sleep instead of spinning, which leaves their cores to other programs.
# torch reads this when it is imported.
export OMP_WAIT_POLICY ?= passive

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */make \1\t/' | expand -t 18

.venv/runtime: requirements.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/development: requirements-dev.txt .venv/runtime
	$(PY) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

# ---- The demo ------------------------------------------------------------------------
DEMO = --data-dir demo/data --weights-dir demo/weights \
       --observations-dir demo/observations_dir --image-size 36 --seed $(SEED)
# Larger crops than the default: so short a run gains more with them.
DEMO_PRETRAINING = --only-train True --batch-size 32 --epochs 20 --crop-area 0.4 --knn-every 0
DEMO_LABELLED = --batch-size 64 --lr 0.1 --epochs 50 --full-fine-tune True --full-epochs 4

demo: .venv/runtime  ## synthetic images, pretraining, fine-tuning, the table: five to seven minutes (SEED=0)
	@echo "This takes five to seven minutes on two cores. All files are written to demo/."
	rm -rf demo
	$(PY) -m benchmarks.synthetic --raw-dir demo/raw --seed $(SEED)
	$(PY) stl10_data_load.py --raw-dir demo/raw --data-dir demo/data
	$(PY) pirl_stl_train_test.py $(DEMO) $(DEMO_PRETRAINING) --experiment-name pirl
	$(PY) train_stl_after_ssl.py $(DEMO) $(DEMO_LABELLED) --experiment-name from_random
	$(PY) train_stl_after_ssl.py $(DEMO) $(DEMO_LABELLED) --experiment-name from_pirl \
	    --pirl-model-name pirl --neighbours demo/neighbours.png
	@echo
	$(PY) -m benchmarks.compare --weights-dir demo/weights from_random from_pirl
	@echo "Nearest neighbours by the PIRL trunk: demo/neighbours.png"

# ---- Tests ---------------------------------------------------------------------------
test: .venv/development  ## the test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_FLAGS)

OLDEST = .venv-oldest/bin/python
test-oldest:  ## the test suite with the oldest torch that is supported
	test -d .venv-oldest || $(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --disable-pip-version-check -q -r requirements-dev.txt \
	    torch==2.6.0 torchvision==0.21.0
	OMP_NUM_THREADS=1 $(OLDEST) -m pytest $(PYTEST_FLAGS)

FAULTS ?= 200
faults: .venv/development  ## the slow tests; then kill, interrupt, fill the disk …, long (FAULTS=200 SEED=0)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_FLAGS) -m slow
	$(PY) tests/faults.py --faults $(FAULTS) --seed $(SEED)

endurance: .venv/development  ## 2,000 steps and hundreds of checkpoints: memory and open files must not grow
	OMP_NUM_THREADS=1 $(PY) tests/endurance.py

mutants: .venv/development  ## change the code line by line and list what no test notices (ALL=1: all files, hours)
	$(PY) tests/mutants.py $(if $(ALL),--all)

lint: .venv/development  ## ruff's checks and its formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# ---- Results -------------------------------------------------------------------------
DATA ?= stl10_data
SEEDS ?= 3
EPOCHS ?= 100
LABELLED_EPOCHS ?= 100
results: .venv/development  ## the whole results table (DATA=stl10_data SEEDS=3 EPOCHS=100 LABELLED_EPOCHS=100 FLAGS='' LABELLED_FLAGS='')
	$(PY) -m benchmarks.results --data-dir $(DATA) --seeds $(SEEDS) --epochs $(EPOCHS) \
	    --labelled-epochs $(LABELLED_EPOCHS) --flags="$(FLAGS)" --labelled-flags="$(LABELLED_FLAGS)"

PHOTOGRAPHS = astronaut.png chelsea.png coffee.png rocket.jpg
picture: .venv/runtime  ## draw the README's first picture, from photographs of scikit-image
	$(PY) -m pip install --disable-pip-version-check -q scikit-image
	mkdir -p results/photographs/unlabelled
	cd $$($(abspath $(PY)) -c "import skimage; print(*skimage.__path__)")/data && \
	    cp $(PHOTOGRAPHS) $(abspath results/photographs/unlabelled)
	$(PY) pictures.py --data-dir results/photographs --out docs/jigsaw.png

gpu-report: .venv/development  ## tests and speed on your GPU, in results/gpu_<card>.md: ten minutes (FLAGS='')
	$(PY) -m benchmarks.gpu_report $(FLAGS)

clean:  ## remove the demo's files and caches, nothing else
	rm -rf demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

.PHONY: help demo test test-oldest faults endurance mutants lint results picture gpu-report clean

# make quickstart | make test | make check | make lint
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := deploy/requirements-cpu.lock
TORCH := deploy/requirements-torch.lock
# Asked only where the sources that pip is configured with do not have torch's build for the CPU.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
DEEPSPEED := deploy/requirements-deepspeed.lock
TRL := deploy/requirements-trl.lock
DOCS := deploy/requirements-docs.lock
PROMTOOL := $(VENV)/prometheus/usr/bin/promtool
RUN := quickstart
N := 20
PART := 1/1
STEPS := 2000
# In the order of tests/conftest.py.
BY_FILE := -n 2 --dist loadfile --no-loadscope-reorder
PIP_OPTIONS := --quiet --quiet --no-deps --no-compile
# Bytecode on all cores, and only of what a run imports: most of what is installed never is.
COMPILED := torch transformers vllm ray numpy sympy pydantic fastapi
NOT_COMPILED := transformers/models/(?!auto|llama|qwen3)|model_executor/models/|/tests?/|ray/(rllib|serve|train|tune|data)/

export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export RAY_AUTH_MODE := disabled
export RAY_USAGE_STATS_ENABLED := 0
# Else every process of every test compiles again what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart install test unit explore crosscheck component system gpu chaos soak mutants lock audit release-check promtool prometheus docs site lint format clean

quickstart: install
	$(BIN)/rlhf-cluster run configs/quickstart.toml --set run.name=$(RUN) --overwrite

install: $(VENV)/.installed

$(VENV)/.installed: $(LOCK) $(TORCH) $(DEEPSPEED) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found. Install Python 3.11, or: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) --require-hashes --requirement $(LOCK)
	$(BIN)/python -m pip install $(PIP_OPTIONS) --requirement $(TORCH) 2>/dev/null || \
		$(BIN)/python -m pip install $(PIP_OPTIONS) --extra-index-url $(TORCH_INDEX) --requirement $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install $(PIP_OPTIONS) --no-build-isolation --require-hashes --requirement $(DEEPSPEED)
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q -q -j 0 -x '$(NOT_COMPILED)' $(addprefix $(VENV)/lib/python3*/site-packages/,$(COMPILED)) rlhf_cluster actors >/dev/null || true
	@touch $@

test: lint prometheus site unit crosscheck component system

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

unit: install
	$(BIN)/pytest tests/unit -n 2 --dist worksteal --durations=5

explore: install
	$(BIN)/pytest tests/unit -n 2 --dist worksteal --hypothesis-profile explore

crosscheck: install $(VENV)/.trl
	PYTHONPATH=$(VENV)/trl $(BIN)/pytest tests/crosscheck

$(VENV)/.trl: $(TRL) $(VENV)/.installed
	$(BIN)/python -m pip install $(PIP_OPTIONS) --target $(VENV)/trl --require-hashes --requirement $(TRL)
	@touch $@

component: install
	$(BIN)/pytest tests/component $(BY_FILE) --durations=5

system: install
	$(BIN)/pytest tests/system $(BY_FILE) --durations=5

gpu: install
	$(BIN)/pytest tests/gpu

chaos: install
	$(BIN)/python -m tests.chaos.run --runs $(N) --kills 10 --total $(N) --part $(PART) --out benchmarks/results/chaos.json

# Breaks the code in many small ways and sees whether the tests notice; a part of 20 minutes on two
# cores: make mutants PART=1/4. Parts add their rows to the result.
mutants: install
	$(BIN)/python -m tests.mutants.run --part $(PART) --out benchmarks/results/mutants.json

soak: install
	$(BIN)/python -m tests.soak.run --steps $(STEPS) --out benchmarks/results/soak.json

# Which results are older than the code that they measured, and which aims were missed.
results: install
	$(BIN)/python benchmarks/listing.py

# Hashes of what the locks pin, after a version was changed; asks PyPI.
lock: install
	$(BIN)/python deploy/lock.py $(LOCK) $(TRL) $(DOCS)

# Known vulnerabilities of what the locks pin; asks PyPI.
audit: $(VENV)/audit/bin/pip-audit
	$(BIN)/python deploy/audit.py $(VENV)/audit/bin/pip-audit $(LOCK) $(TORCH) $(DEEPSPEED) $(TRL) $(DOCS)

$(VENV)/audit/bin/pip-audit: | install
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --quiet pip-audit==2.10.1

# Sdist and wheel: their contents, then an empty environment and the quick start in it; 3 GB below TMPDIR.
release-check: install
	$(BIN)/python deploy/release_check.py

# Debian's Prometheus with its promtool, for the tests of alerts and dashboards; nothing is installed.
promtool: $(PROMTOOL)

$(PROMTOOL): | install
	cd $(VENV) && apt-get download prometheus=2.42.0+ds-5+deb12u1
	cd $(VENV) && dpkg -x prometheus_*.deb prometheus && rm prometheus_*.deb

# The same where it can be had; a test that needs it and finds none is skipped, and says so.
prometheus: install
	@$(MAKE) --silent promtool || echo "no Prometheus could be fetched: its tests are skipped"

# The documents as a site in build/site; every link and every file that a page loads is checked. With --quiet
# mkdocs would count no warnings, and --strict would refuse nothing.
docs: $(VENV)/.docs
	PYTHONPATH=$(VENV)/docs NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python deploy/check_site.py build/site

$(VENV)/.docs: $(DOCS) $(VENV)/.installed
	rm -rf $(VENV)/docs $@
	$(BIN)/python -m pip install $(PIP_OPTIONS) --target $(VENV)/docs --require-hashes --requirement $(DOCS)
	@touch $@

# The same where what builds it can be had.
site: install
	@if $(MAKE) --silent $(VENV)/.docs; then $(MAKE) --silent docs; \
		else echo "mkdocs-material could not be fetched: the site is not built"; fi

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis

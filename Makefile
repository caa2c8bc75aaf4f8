# `make demo` and `make test` set up what they need: a virtual environment in .venv from the lock files.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PYTHONS := 3.12 3.13 3.14
unexport PYTHONDONTWRITEBYTECODE  # what is started by the hundred is compiled once

.PHONY: demo test pythons python-version check lint types layout unit rootless long compat upgrade-fixture docker gvisor seccomp-programs fuzz \
	faults recovery admins \
	training agents integrations kubernetes real-apiserver chart manifests ui env-packages gym-extras sync wheel release \
	docs lock bench bench-check bench-forks bench-growth bench-idle bench-processes processes bench-environments soak soak-mixed load attacks escape-table walls front cluster fleet ray ray-shapes clean

demo: $(VENV)/ready
	@$(PY) -m rock.cli.demo

# mypy has one core to itself for a minute, so the tests begin beside it.
test: $(VENV)/ready-dev
	@$(MAKE) --no-print-directory -j2 check unit

# ---- setting up ----

# The editable installation builds the extension when there is a C compiler; an older one must not stay.
$(VENV)/ready: requirements.lock pyproject.toml setup.py $(wildcard native/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ROCK needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	@$(PYTHON) tools/step.py "creating $(VENV)" $(PYTHON) -m venv $(VENV)
	@$(PYTHON) tools/step.py "installing the dependencies into $(VENV)" \
		$(PY) -m pip install --disable-pip-version-check --require-hashes -r requirements.lock
	@find src -name librocknative.so -delete
	@$(PYTHON) tools/step.py "installing ROCK into $(VENV)" \
		$(PY) -m pip install --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/ready-dev: requirements-dev.lock $(VENV)/ready
	@$(PYTHON) tools/step.py "installing the development tools into $(VENV)" \
		$(PY) -m pip install --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

# ---- checking ----

check: lint types

lint: $(VENV)/ready-dev
	$(VENV)/bin/ruff check src tests tools bench setup.py
	$(PY) tools/unasync.py --check
	$(PY) tools/runtimes.py --check
	$(PY) tools/settings_reference.py --check
	$(PY) tools/errors_reference.py --check
	$(PY) tools/vendor.py --check
	$(PY) tools/typescript_types.py --check
	$(PY) -m tests.escape.syscall_table --check

types: $(VENV)/ready-dev
	$(VENV)/bin/mypy

# Modules, folders, TYPE_CHECKING blocks and import cycles of src/rock; tests/test_layout.py has their ceilings.
layout: $(VENV)/ready-dev
	$(PY) tools/layout.py

# The groups of tests and how they run side by side: tools/run_tests.py.
unit: $(VENV)/ready-dev
	@$(PY) tools/run_tests.py

# All that an ordinary user has a share of in `test`, as that user; needs root.
rootless: $(VENV)/ready-dev
	ROCK_TEST_ROOTLESS=1 $(PY) -m pytest tests/test_rootless.py

# The site of the documentation, in build/site/VERSION: sites of other versions stay beside it. It fails on a warning:
# broken links and anchors, missing pages.
DOCS_VENV = $${ROCK_TEST_CACHE:-$$HOME/.cache/rock-tests}/docs/venv

docs: requirements-docs.lock
	@test -x $(DOCS_VENV)/bin/mkdocs && cmp -s requirements-docs.lock $(DOCS_VENV)/lock || { \
		$(PYTHON) -m venv --clear $(DOCS_VENV) && \
		$(DOCS_VENV)/bin/pip install -q --disable-pip-version-check --require-hashes -r requirements-docs.lock && \
		cp requirements-docs.lock $(DOCS_VENV)/lock; }
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=src $(DOCS_VENV)/bin/mkdocs build \
		--site-dir build/site/$$(sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)

# What `test` has a few of, or smaller: more moments for a crash, larger files, more of each.
long: $(VENV)/ready-dev
	ROCK_TEST_LONG=1 $(PY) -m pytest -n 2 --dist loadfile -m long --ignore=tests/runtime --ignore=tests/rocklet

# The web page in Debian's Chromium: every screen in both themes, budgets, accessibility; `test` runs the main path.
# SCREENSHOTS=1 writes those of the documentation.
ui: $(VENV)/ready-dev
	$(PY) tools/vendor.py --check
	node --test tests/ui/pure.test.mjs
	ROCK_TEST_UI=1 ROCK_TEST_SCREENSHOTS=$(SCREENSHOTS) $(PY) -m pytest -s tests/ui

# ROCK's own client in several versions, installed from PyPI and kept in ROCK_TEST_CACHE; `test` runs the fast half.
compat: $(VENV)/ready-dev
	ROCK_TEST_COMPAT=1 $(PY) -m pytest tests/compat

# The client, the command line, the fake runtime and the main calls on other versions of Python, each in its own virtual
# environment in ROCK_TEST_CACHE; a version that this machine lacks is skipped.
pythons:
	@for version in $(PYTHONS); do \
		command -v python$$version > /dev/null && python$$version -c "" 2> /dev/null || { echo "skipped: no python$$version"; continue; }; \
		echo "== python$$version"; \
		$(MAKE) --no-print-directory PYTHON=python$$version VENV=$${ROCK_TEST_CACHE:-$$HOME/.cache/rock-tests}/python$$version/venv python-version || exit 1; \
	done

python-version: $(VENV)/ready-dev
	$(PY) -m pytest -q -p no:cacheprovider tests/sdk tests/cli/test_cli.py tests/cli/test_commands.py tests/wire \
		tests/e2e/test_sessions.py tests/e2e/test_programs_and_files.py tests/e2e/test_lifecycle.py tests/envs

# Homes and a database as this checkout writes them, for tests/upgrade of later versions; needs root and PostgreSQL.
upgrade-fixture: $(VENV)/ready-dev
	$(PY) -m tests.upgrade.make

# All of the suite on containers, of runc and of gVisor too, with an engine from Debian's packages; needs root.
docker: $(VENV)/ready-dev
	ROCK_TEST_DOCKER=1 ROCK_TEST_CONFORM=docker $(PY) -m pytest tests/runtime/docker tests/runtime/conformance \
		tests/e2e/test_parity.py

# All of the suite on the runtime gvisor, and the attempts to escape from it, with Debian's runsc; needs root.
gvisor: $(VENV)/ready-dev
	ROCK_TEST_GVISOR=1 ROCK_TEST_CONFORM=gvisor $(PY) -m pytest tests/runtime/test_gvisor.py tests/runtime/conformance
	ROCK_TEST_GVISOR=1 $(PY) -m pytest tests/e2e/test_gvisor_server.py tests/escape/test_escapes.py

# Go, Java and a browser in a sandbox under its system call filter; from Debian's packages, kept in ROCK_TEST_CACHE.
seccomp-programs: $(VENV)/ready-dev
	ROCK_TEST_PROGRAMS=1 $(PY) -m pytest tests/runtime/test_programs_under_the_filter.py

# Requests by the OpenAPI page and bytes for every parser, many of each; FUZZ=N for N examples of each.
FUZZ ?= 300

fuzz: $(VENV)/ready-dev
	ROCK_TEST_FUZZ=$(FUZZ) $(PY) -m pytest tests/admin/test_openapi.py tests/image/test_hostile_bytes.py tests/dialects/test_random_requests.py

# Randomised runs of the fault suite: kill -9, SIGSTOP, dropped replies, stores that fail, clocks that jump, damaged
# files. SEED=N has them again; KINDS="joined cluster" for some of the kinds, MINUTES=N for at most so long each.
KINDS ?= process apart namespace branches joined joined-namespace cluster postgres damage
RUNS ?= 1000
STEPS ?= 6
SEED ?= $(shell date +%s)

faults: $(VENV)/ready-dev
	@failed=""; for kind in $(KINDS); do \
		$(PY) -m tests.faults.campaign --kind $$kind --runs $(RUNS) --seed $(SEED) --steps $(STEPS) \
			$(if $(MINUTES),--minutes $(MINUTES)) || failed="$$failed $$kind"; done; \
	test -z "$$failed" || { echo "problems in:$$failed"; exit 1; }

# The tests of a whole server, and random faults, with two rocklet processes. About 35 minutes.
processes: $(VENV)/ready-dev
	ROCK_PROCESSES=2 $(PY) -m pytest -n 2 --dist loadfile tests/e2e tests/runtime/conformance
	$(PY) -m tests.faults.campaign --kind process --runs 20 --seed 76 --steps $(STEPS)

# An admin killed under load: seconds until it serves and everything is found.
recovery: $(VENV)/ready-dev
	$(PY) bench/recovery.py

# Several admins on one PostgreSQL: one leads, others take over.
admins: $(VENV)/ready-dev
	ROCK_TEST_ADMINS=1 $(PY) -m pytest tests/store/test_several_admins.py

# Three machines as network namespaces, whose network is slow, loses packets, and is cut; needs root.
cluster: $(VENV)/ready-dev
	ROCK_TEST_CLUSTER=1 $(PY) -m pytest tests/cluster

# Images, chart, client, pod mode and pod-like environments, at full size, with helm and kubectl that are kept in
# ROCK_TEST_CACHE; `test` runs a short part.
kubernetes: $(VENV)/ready-dev
	ROCK_TEST_KUBERNETES=1 $(PY) -m pytest tests/kubernetes

# The contract of the API server, and pod mode, on a real kube-apiserver: built from Debian's packages into
# ROCK_TEST_CACHE, 5 to 20 minutes once.
APISERVER = $${ROCK_TEST_CACHE:-$$HOME/.cache/rock-tests}/kubernetes/apiserver

real-apiserver: $(VENV)/ready-dev
	nice -n 19 tools/real_apiserver.sh build $(APISERVER)
	tools/real_apiserver.sh run $(APISERVER) $(PY) -m pytest -s tests/kubernetes/test_api_contract.py

# Lint and schemas of the chart and of all of its examples, with helm and kubernetes-validate from ROCK_TEST_CACHE.
chart: $(VENV)/ready-dev
	$(PY) -m pytest -q -rs tests/kubernetes/test_chart.py

# deploy/kubernetes from the Helm chart; HELM=PROGRAM.
manifests: $(VENV)/ready-dev
	$(PY) tools/render_chart.py --helm $(or $(HELM),helm)

# Every request and WebSocket through another server in front: what a sandbox on another machine is reached by.
front: $(VENV)/ready-dev
	ROCK_TEST_FRONT=1 $(PY) -m pytest tests/e2e/test_ports.py tests/e2e/test_sessions.py tests/e2e/test_programs_and_files.py \
		tests/e2e/test_rough_clients.py

# Tensors of torch and stable-baselines3, in an environment of their own that is kept in ROCK_TEST_CACHE.
EXTRAS := $(or $(ROCK_TEST_CACHE),$(HOME)/.cache/rock-tests)/gym-extras

gym-extras: $(EXTRAS)/ready
	PYTHONPATH=$(CURDIR)/src $(EXTRAS)/bin/python -m pytest tests/envs/test_torch.py tests/envs/test_sb3.py

$(EXTRAS)/ready: requirements-dev.lock
	@$(PYTHON) -m venv $(EXTRAS)
	@echo "installing torch and stable-baselines3 into $(EXTRAS) ..."
	@$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 stable-baselines3
	@touch $@

# Every task of the training sets; installs their packages from PyPI, kept in ROCK_TEST_CACHE.
training: $(VENV)/ready-dev
	ROCK_TEST_TRAINING=1 $(PY) -m pytest -s tests/envs/test_training_sets.py

# Environments of large distributions (Atari, MuJoCo, PettingZoo), installed from the package index and kept in
# ROCK_TEST_CACHE.
env-packages: $(VENV)/ready-dev
	ROCK_TEST_PACKAGES=1 $(PY) -m pytest tests/envs/test_env_packages.py

# Real agents in sandboxes without a network, with a scripted model; installs them from npm and PyPI, kept in
# ROCK_TEST_CACHE (2.5 GB).
agents: $(VENV)/ready-dev
	ROCK_TEST_AGENTS=1 $(PY) -m pytest tests/agents tests/jobs/test_swe.py

# Released clients of other systems and the adapters of packages against a server, in virtual environments that are kept
# in ROCK_TEST_CACHE (12 GB); prints a table of systems, versions and results.
integrations: $(VENV)/ready-dev
	ROCK_TEST_INTEGRATIONS=1 $(PY) -m pytest tests/dialects/released tests/e2b

# Steps of environments next to rlmesh 0.1.0 and AsyncVectorEnv; needs a quiet machine.
RLMESH := $(or $(ROCK_TEST_CACHE),$(HOME)/.cache/rock-tests)/rlmesh

bench-environments: $(VENV)/ready-dev
	@test -d $(RLMESH) || $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(RLMESH) rlmesh==0.1.0
	$(PY) bench/environments.py --rlmesh $(RLMESH)

bench: $(VENV)/ready-dev
	$(VENV)/bin/rock bench

# Fails when the working tree is slower than BASE beyond noise: both servers are measured in turn.
BASE ?= HEAD
bench-check: $(VENV)/ready-dev
	$(PY) bench/compare.py $(BASE) . --check

# Checkpoints, rollbacks and forks beside their floors, and 64 children of a Python with 108 MB.
bench-forks: $(VENV)/ready-dev
	$(PY) bench/forks.py

# Creates per second, and their CPU time, as sandboxes accumulate.
bench-growth: $(VENV)/ready-dev
	$(PY) bench/growth.py 10 500 1000 2000

# One and two rocklet processes of one server, alternating: rates, and CPU time for each operation.
bench-processes: $(VENV)/ready-dev
	$(PY) bench/processes.py 1 2

# 10,000 sandboxes made, used and destroyed; tells what is left of them. N=2000 for fewer.
soak: $(VENV)/ready-dev
	$(PY) bench/cycles.py $(or $(N),10000)

# A simulated fleet: bursts of creates, and how it grows to 1,000 workers and 100,000 sandboxes. FLEET="bursts --most 4000".
fleet: $(VENV)/ready-dev
	$(PY) bench/fleet.py $(FLEET)

# A real Ray cluster of three nodes on this machine, in an environment of its own that is kept in ROCK_TEST_CACHE.
RAY := $(or $(ROCK_TEST_CACHE),$(HOME)/.cache/rock-tests)/ray

ray: $(RAY)/ready
	PYTHONPATH=$(CURDIR)/src:$(CURDIR) ROCK_TEST_RAY=1 $(RAY)/bin/python -m pytest -s tests/scheduler/test_ray.py

# Creates a second by a placement group and by an actor for each sandbox, in the same cluster.
ray-shapes: $(RAY)/ready
	PYTHONPATH=$(CURDIR)/src:$(CURDIR) $(RAY)/bin/python bench/ray_shapes.py

$(RAY)/ready: requirements-dev.lock
	@$(PYTHON) -m venv $(RAY)
	@echo "installing ray into $(RAY) ..."
	@$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check 'ray>=2.49'
	@touch $@

# Descriptors, tasks, timers, memory and mounts of N idle sandboxes with open sessions, and commands in them.
bench-idle: $(VENV)/ready-dev
	$(PY) bench/idle.py $(or $(N),1000)

# A mixed workload of eight clients; MINUTES=60 for an hour.
soak-mixed: $(VENV)/ready-dev
	$(PY) bench/mixed.py $(or $(MINUTES),10)

# A flood of one client beside another, 10,000 idle connections, 1,000 idle sandboxes and 32 clients at once.
load: $(VENV)/ready-dev
	$(PY) bench/load.py
	$(PY) bench/idle.py $(or $(N),1000)

# Attacks on the front of a server, and how long another tenant waits meanwhile; fails above 50 ms.
attacks: $(VENV)/ready-dev
	$(PY) bench/attacks.py

# Every attempt to escape at every level; as root. Writes the table in docs/security.md.
escape-table: $(VENV)/ready-dev
	$(PY) -m tests.escape.levels

# Each wall of the isolation removed in turn, in copies of the package; fails if no attempt notices. Needs root, takes
# about ten minutes, and writes the table in docs/security.md.
walls: $(VENV)/ready-dev
	$(PY) -m tests.escape.walls --write

# Two wheels in dist/: for this platform with the extension, for any platform without it.
wheel: $(VENV)/ready
	$(PY) tools/wheels.py dist

# Version, changelog, wheels and checksums in dist/; publishes nothing. VERSION=0.2.0
release: $(VENV)/ready-dev
	$(PY) tools/release.py $(VERSION)

sync: $(VENV)/ready-dev
	$(PY) tools/unasync.py

lock:
	uv pip compile pyproject.toml --extra server --generate-hashes --universal --python-version 3.11 --no-header -o requirements.lock
	uv pip compile pyproject.toml --extra server --extra docs --generate-hashes --universal --python-version 3.11 --no-header -o requirements-docs.lock
	uv pip compile pyproject.toml --extra dev --generate-hashes --universal --python-version 3.11 --no-header -o requirements-dev.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src -name librocknative.so -delete

# Ω-QVLA without a ROS installation: `make demo` and `make test` do everything in a virtual environment of their own.
# With ROS 2 installed, use colcon and ros2 launch: docs/installation.md.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv

# torch comes from its project's own index of CPU builds: the build on the package index is the CUDA one for Linux, with
# several GB of libraries. `make demo TORCH_INDEX=` takes that one, for an NVIDIA GPU. Both are read when the virtual
# environment is made; `make distclean` first to change them later.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Episodes per policy in the demo; empty for the demo's own default.
EPISODES ?=

# Length of the soak, and the seed of its faults.
SOAK_MINUTES ?= 30
SOAK_SEED ?= 0

BIN := $(VENV)/bin
COLCON_VENV := .venv-colcon
COLCON_BASE := build/colcon

# The environment that the nodes and the tests run in. The wheels lay their ament prefix into the virtual environment;
# nothing sets this variable for them.
export AMENT_PREFIX_PATH := $(abspath $(VENV))
# The only middleware that exists as a wheel; a shell that uses another one for its ROS installation may export it.
export RMW_IMPLEMENTATION := rmw_fastrtps_cpp
# Discovery stays on this host: no multicast into the network, no strangers' nodes in a test.
export ROS_AUTOMATIC_DISCOVERY_RANGE := LOCALHOST
# The wheels' marker that library paths are set: inherited from a Python of another environment, they would be wrong.
unexport _ROS_WHEELS_BOOTSTRAP_COMPLETE
# A sourced ROS installation would be mixed with the wheels: other binaries of the same libraries and modules.
unexport PYTHONPATH PYTHONHOME CMAKE_PREFIX_PATH COLCON_PREFIX_PATH
ifneq ($(origin ROS_DISTRO),undefined)
unexport LD_LIBRARY_PATH ROS_DISTRO
endif

.PHONY: help venv test test-slow demo soak faults lint format colcon clean distclean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: EPISODES=20  SOAK_MINUTES=30  PYTHON=python3.12  TORCH_INDEX= (empty: CUDA build)  VENV=.venv"

# Two stamps: what pip installs, and the links to data files. With both in place a second call does nothing.
$(VENV)/.installed: setup.py setup.cfg constraints.txt scripts/check_machine.py
	@$(PYTHON) scripts/check_machine.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel
	@echo "Installing $(TORCH) into $(VENV) (about 200 MB for the CPU build) ..."
	@# Alone and without dependencies, so that one look-up is all that an unreachable index can cost.
	$(BIN)/pip install --retries 1 --timeout 20 --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "Installing ROS 2, MuJoCo and the Python libraries (about 350 MB, a minute on a fast line) ..."
	@# A CUDA build of torch has brought the triton that it needs; only the CPU build leaves the choice to the pin.
	grep $(if $(TORCH_INDEX),'',-v '^triton==') constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --no-build-isolation --use-pep517 --editable ".[ros,tools,dev]"
	@touch $@

$(VENV)/.linked: $(VENV)/.installed package.xml scripts/link_data_files.py $(shell find launch config scripts/executables)
	@$(BIN)/python scripts/link_data_files.py
	@touch $@

venv: $(VENV)/.linked  ## make the virtual environment (Python packages, ROS 2 Kilted wheels, this package)

test: venv  ## run the test suite, without the slow tests
	$(BIN)/pytest -q -m "not slow"

test-slow: venv  ## run the tests that take minutes
	$(BIN)/pytest -q -m slow

demo: venv  ## two ROS 2 nodes, a simulated arm, the shipped 4-bit policy; EPISODES=20 for more
	$(BIN)/python -m omega_qvla_ros.demo $(if $(EPISODES),--episodes $(EPISODES))

soak: venv  ## closed loop under load and random faults; SOAK_MINUTES=2 for a short one
	$(BIN)/python -m omega_qvla_ros.soak --minutes $(SOAK_MINUTES) --seed $(SOAK_SEED) --out out/soak

faults: venv  ## run the fault suite and renew the table of docs/faults.md
	@mkdir -p out
	-$(BIN)/pytest -q test/faults -o junit_family=xunit1 --junitxml=out/faults.xml
	$(BIN)/python scripts/fault_table.py out/faults.xml

lint: venv  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# colcon runs everything with the Python it was started with, so it gets a virtual environment of its own, in which the
# package itself is not installed: what is found there was built by colcon.
colcon: export AMENT_PREFIX_PATH := $(abspath $(COLCON_VENV))
colcon: export PATH := $(abspath $(COLCON_VENV))/bin:$(PATH)
colcon:  ## colcon build and colcon test, with colcon from the package index
	$(MAKE) VENV=$(COLCON_VENV) $(COLCON_VENV)/.colcon
	colcon --log-base $(COLCON_BASE)/log build \
		--base-paths . --build-base $(COLCON_BASE)/build --install-base $(COLCON_BASE)/install
	colcon --log-base $(COLCON_BASE)/log test --return-code-on-test-failure --event-handlers console_direct+ \
		--base-paths . --build-base $(COLCON_BASE)/build --install-base $(COLCON_BASE)/install
	colcon --log-base $(COLCON_BASE)/log test-result --test-result-base $(COLCON_BASE)/build

$(COLCON_VENV)/.colcon: $(COLCON_VENV)/.installed
	$(COLCON_VENV)/bin/pip uninstall --quiet --yes omega_qvla_ros
	$(COLCON_VENV)/bin/pip install --quiet --constraint constraints.txt colcon-core colcon-ros colcon-python-setup-py \
		colcon-recursive-crawl colcon-library-path colcon-metadata colcon-output colcon-bash colcon-test-result
	@touch $@

clean:  ## remove what builds, tests and the demo leave behind
	rm -rf build install log *.egg-info .pytest_cache .ruff_cache .hypothesis demo.mp4 demo.png demo.json
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the virtual environments
	rm -rf $(VENV) $(COLCON_VENV)

# Everything is run from here, in the checkout's own .venv. `make` alone prints the list.
#
# A target first sees to what it needs: tools/setup.sh installs what is missing, and says so. The second time it finds
# everything in place, says nothing and takes a tenth of a second.

# The Python that .venv is made with, 3.11 or newer. A .venv that is there already is used as it is.
PYTHON ?= python3
# What `make start` serves. On a kernel with ublk, as root: make start ARGS='--backend memory:1G'
ARGS ?= --kernel sim --backend memory:64M --seconds 5
# What `make mutants` breaks: modules that tests/proof/mutate.py names. Empty: all of them.
MODULES ?=
# More options for the virtual machines of `make test` and `make bench`, for example --kvm where that works.
VM_OPTIONS ?=
# How long `make soak` looks, and which bug of tests/property/planted.py it has to find (`random`: any; nothing: none).
SECONDS ?= 600
PLANT ?=
# How many new scripts `make conformance` tries besides the kept ones; SEED=N tries those of a run again.
FRESH ?= 100

SETUP = PYTHON='$(PYTHON)' tools/setup.sh
RUN = .venv/bin/python
TYPED = ublk_trio tests native docs bench tools

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help start test soak conformance lint bench docs planted-bugs mutants

help: ## Print this list.
	@sed -n 's/^\([a-z-]*\): ## \(.*\)/make \1	\2/p' Makefile | expand -t 20

start: ## Install what is missing, then run five seconds of verified I/O on the simulated kernel (ARGS='…' for another disk).
	@$(SETUP)
	@$(RUN) -m ublk_trio start $(ARGS)

test: ## Run the simulator's and all other tests as an ordinary user, then the kernel tests on real Linux 6.12 and 7.3.
	@$(SETUP) tests
	@VM_OPTIONS='$(VM_OPTIONS)' tools/test.sh

soak: ## Run the property suite's state machine from random seeds for SECONDS=600; PLANT=random plants a bug for it to find.
	@$(SETUP) tests
	@$(RUN) -m tests.property.soak --seconds $(SECONDS) $(if $(PLANT),--plant $(PLANT))

conformance: ## Compare the simulator with the drivers of real Linux 6.12 and 7.3: the kept scripts, and FRESH=N new ones.
	@$(SETUP) tests
	@VM_OPTIONS='$(VM_OPTIONS)' $(RUN) -m tests.conformance.guests -- --fresh $(FRESH) \
	    --seed $${SEED:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}

lint: ## Check the code: ruff's rules and format, mypy --strict.
	@$(SETUP)
	@status=0; \
	$(RUN) -m ruff check || status=1; \
	$(RUN) -m ruff format --check || status=1; \
	$(RUN) -m mypy $(TYPED) || status=1; \
	exit $$status

planted-bugs: ## Plant every known bug in the engine and in the simulator, and say what catches it, and how soon.
	@$(SETUP) tests
	@UBLK_TRIO_PROFILE=ci $(RUN) -m pytest -q tests/property/test_planted_bugs.py tests/proof/test_planted_simulator.py

mutants: ## Break the tag table and the simulator in every small way, and name what no test notices (MODULES='…'; long).
	@$(SETUP) tests
	@$(RUN) -m tests.proof.mutate $(MODULES)

bench: ## Measure a request's cost in the engine alone and on the simulator, then fio on disks of a real kernel: this machine's, or a virtual one's.
	@$(SETUP) tests
	@$(RUN) bench/engine.py
	@$(RUN) bench/simulator.py
	@if [ -r /dev/ublk-control ] && [ -w /dev/ublk-control ]; then \
	    $(RUN) bench/requests_per_second.py; \
	else \
	    $(RUN) tests/kernel/vm.py run --kernel 7.3 $(VM_OPTIONS) -- $(RUN) bench/requests_per_second.py; \
	fi

docs: ## Write the pages of docs/ that are drawn from the code.
	@$(SETUP)
	@$(RUN) docs/generate.py

# make demo, make test: each does its own set-up. Variables: VENV, PYTHON, TORCH, TRITON, MAML_EXT_BUILD (see setup.py),
# WORKERS (processes of the tests), ARGS.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
# What kernels/resources.txt is of; CUDA builds of torch may want another. TRITON= leaves it out.
TRITON ?= triton==3.8.0; platform_system == 'Linux'
WORKERS ?= auto
ARGS ?=

PY := $(VENV)/bin/python
PARALLEL := -n $(WORKERS) --maxprocesses=8 --dist loadgroup
STAMP := $(VENV)/.installed-$(or $(MAML_EXT_BUILD),auto)
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: help install test sanitize cuda-resources triton-resources cuda-check demo benchmark doctor wheel clean

help:
	@echo "make install | test | sanitize | demo | benchmark | doctor | wheel | clean      (ARGS='...' is passed on)"
	@echo "make test ARGS='-m thorough'      (what takes long, kernels compiled many times over; '-m gpu': on a CUDA device)"
	@echo "make cuda-resources | cuda-check      (need nvcc, and no GPU)"
	@echo "make triton-resources                 (needs triton, and no GPU)"

install: $(STAMP)

# Editable, so that the repository's own folders find the compiled part beside the sources. torch first, and named again:
# what depends on it must not choose another.
$(STAMP): $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77" wheel ninja pybind11
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[demo,test,benchmark]" \
		"$(TORCH)" $(if $(TRITON),"$(TRITON)")
	rm -f $(VENV)/.installed-*
	touch $@

test: install
	$(PY) -m pytest $(PARALLEL) $(ARGS)

# The tests of the compiled part under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own (without the
# engine for AVX2, which is of the same source; and of the CUDA kernels, on the CPU). torch and Python free nothing at
# exit (leaks), and the engine asks for memory that may not be there (null).
SANITIZED := out/sanitize
SANITIZE_TESTS := tests/test_engine.py tests/test_convolutions.py tests/test_engine_fuzz.py tests/test_meta_operator.py \
	tests/test_sgd_update.py tests/test_cuda_engine.py tests/test_cuda_fuzz.py
sanitize: install
	mkdir -p $(SANITIZED)
	MAML_EXT_SANITIZE=1 MAML_EXT_BUILD=cpu CXX=g++ $(PY) setup.py --quiet build --build-base $(SANITIZED) \
		--build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/objects >$(SANITIZED).log 2>&1 || ! cat $(SANITIZED).log
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	MAML_EXT_SANITIZE=1 MAML_EXT_EMULATED_SANITIZER=address PYTHONPATH=$(SANITIZED)/lib $(VENV)/bin/pytest $(PARALLEL) \
	--capture=sys $(SANITIZE_TESTS) $(ARGS)

# The table of what every CUDA kernel needs, csrc/cuda/resources.txt. Needs nvcc, and no GPU.
cuda-resources: install
	$(PY) tests/cuda_resources.py

# Likewise of the Triton kernels, kernels/resources.txt: some hundred are compiled. Needs no nvcc either.
triton-resources: install
	PYTHONPATH=. $(PY) tests/triton_aot.py

# The CUDA build that is installed here as a wheel, beside CUDA builds of torch: the newest and the oldest supported,
# gigabytes each. Needs no GPU.
CUDA_TORCH ?= 2.14.1 2.10.0
CUDA := out/cuda
cuda-check:
	$(MAKE) install MAML_EXT_BUILD=cuda
	rm -rf $(CUDA)/wheels $(CUDA)/lib
	mkdir -p $(CUDA)/lib/maml_ext
	cp -p maml_ext/_C*.so $(CUDA)/lib/maml_ext/
	MAML_EXT_BUILD=cuda $(PY) setup.py --quiet build --build-lib $(CUDA)/lib --build-temp $(CUDA)/objects \
		bdist_wheel --dist-dir $(CUDA)/wheels >$(CUDA)/build.log 2>&1 || ! cat $(CUDA)/build.log
	set -e; for torch in $(CUDA_TORCH); do \
		there=$(CUDA)/torch-$$torch; \
		test -e $$there/.installed || $(PYTHON) -m venv --clear $$there; \
		test -e $$there/.installed || $$there/bin/pip install --quiet --disable-pip-version-check torch==$$torch numpy; \
		touch $$there/.installed; \
		$$there/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall $(CUDA)/wheels/*.whl; \
		$$there/bin/python tests/cuda_check.py; \
	done

demo: install
	$(PY) -m examples.demo $(ARGS)

benchmark: install
	$(PY) -m benchmarks $(ARGS)

doctor: install
	$(PY) -m maml_ext doctor

wheel: install
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir out/wheels .

clean:
	rm -rf $(VENV) build out *.egg-info maml_ext/_C*.so

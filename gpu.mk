# On a machine with an NVIDIA GPU: `make gpu PYTHON=python3`. Installs nothing and needs no network: the interpreter must
# have CuPy, NumPy, Numba, ml_dtypes, click, rich and pytest; torchvision is what is timed against. Tests whose packages
# are missing (hypothesis, SciPy) are skipped and counted.
#
# Each part ends by itself after 8 minutes, by an interrupt: what was tested, checked or measured until then is saved.
# Test and check results go to build/gpu/records, timings to bench_results/local (GPU_BENCH='--dtype float16' for
# others; GPU_AGAINST= for no peer). GPU_BENCH=--publish puts the record among the published ones, in bench_results,
# after which `dcn-bench readme` brings README.md up to date.

PYTHON ?= python3
GPU_PACKAGE := build/gpu
GPU_RECORDS := build/gpu/records
GPU_LIMIT ?= timeout --signal=INT --kill-after=30 470
GPU_AGAINST ?= --against torchvision
GPU_BENCH ?=
# -P: the current folder's dcn_kernels lacks the commands, the linked one has them
GPU_PYTHON = PYTHONPATH=$(CURDIR)/$(GPU_PACKAGE) PYTHONDONTWRITEBYTECODE=1 $(GPU_LIMIT) $(PYTHON) -P
DCN_CHECK = $(GPU_PYTHON) -c 'from dcn_kernels.cli.check import main; main(prog_name="dcn-check")'
DCN_BENCH = $(GPU_PYTHON) -c 'from dcn_kernels.cli.bench import main; main(prog_name="dcn-bench")'
GPU_PYTEST = -m pytest -p no:cacheprovider -m cuda
SANITIZER ?= compute-sanitizer

.PHONY: gpu gpu-ready gpu-test gpu-check gpu-bench gpu-sanitize

gpu: gpu-ready ## On a GPU, without installing anything: gpu-test, gpu-check and gpu-bench (PYTHON=python3)
	@failed=; for target in gpu-test gpu-check gpu-bench; do \
		$(MAKE) --no-print-directory $$target || failed="$$failed $$target"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

# The package as an installation would lay it out: links, with the commands where the code looks for them. Then: is
# everything there, in a line each of what is not.
gpu-ready:
	@rm -rf $(GPU_PACKAGE)/dcn_kernels && mkdir -p $(GPU_PACKAGE)/dcn_kernels $(GPU_RECORDS)
	@ln -s $(CURDIR)/dcn_kernels/* $(GPU_PACKAGE)/dcn_kernels && ln -s $(CURDIR)/cli $(GPU_PACKAGE)/dcn_kernels/cli
	@command -v $(PYTHON) >/dev/null || { echo "no interpreter $(PYTHON): make gpu PYTHON=/path/to/python" >&2; exit 1; }
	@$(GPU_PYTHON) -c 'import sys; from importlib.util import find_spec; \
		missing = ", ".join(name for name in "numpy numba ml_dtypes click rich pytest".split() if find_spec(name) is None); \
		sys.exit(f"{sys.executable} lacks {missing}: nothing is installed here, name another PYTHON" if missing else 0)'
	@$(GPU_PYTHON) -c 'import sys; from dcn_kernels.environment import why_not; sys.exit(why_not("cuda") or 0)'

gpu-test: gpu-ready ## The tests that need a GPU, under 8 minutes
	$(GPU_PYTHON) $(GPU_PYTEST) --junitxml=$(GPU_RECORDS)/test.xml

gpu-check: gpu-ready ## Gradients and agreement of the backends on the GPU, under 8 minutes each
	@failed=0; for check in gradients backends; do \
		$(DCN_CHECK) $$check --backend cuda --output $(GPU_RECORDS)/$$check.json || failed=1; \
	done; exit $$failed

gpu-bench: gpu-ready ## Time the operators on the GPU against torchvision; the record is saved in bench_results/local
	$(DCN_BENCH) profile --backend cuda $(GPU_AGAINST) $(GPU_BENCH)

gpu-sanitize: gpu-ready ## compute-sanitizer (memcheck, then racecheck) on small calls that run every kernel
	@command -v $(SANITIZER) >/dev/null || { echo "no $(SANITIZER): it comes with the CUDA toolkit" >&2; exit 1; }
	@for tool in memcheck racecheck; do \
		PYTHONPATH=$(CURDIR)/$(GPU_PACKAGE) PYTHONDONTWRITEBYTECODE=1 $(GPU_LIMIT) \
		$(SANITIZER) --tool $$tool --error-exitcode 1 --log-file $(GPU_RECORDS)/$$tool.txt \
		$(PYTHON) -P $(GPU_PYTEST) tests/test_cuda.py -k every_kernel || { cat $(GPU_RECORDS)/$$tool.txt; exit 1; }; \
		tail -1 $(GPU_RECORDS)/$$tool.txt; \
	done

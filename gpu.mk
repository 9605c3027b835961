# On a machine with an NVIDIA GPU: `make gpu PYTHON=python3`. Installs nothing and needs no network: the interpreter must
# have CuPy, NumPy, Numba, ml_dtypes, click, rich, pytest, hypothesis and SciPy; torchvision is what is timed against.

PYTHON ?= python3
GPU_PACKAGE := build/gpu
GPU_RECORDS := build/gpu/records
GPU_LIMIT ?= timeout 480
# -P: the current folder's dcn_kernels lacks the commands, the linked one has them
GPU_PYTHON = PYTHONPATH=$(CURDIR)/$(GPU_PACKAGE) PYTHONDONTWRITEBYTECODE=1 $(GPU_LIMIT) $(PYTHON) -P
DCN_CHECK = $(GPU_PYTHON) -c 'from dcn_kernels.cli.check import main; main(prog_name="dcn-check")'
DCN_BENCH = $(GPU_PYTHON) -c 'from dcn_kernels.cli.bench import main; main(prog_name="dcn-bench")'

.PHONY: gpu gpu-package gpu-test gpu-check gpu-bench

gpu: ## On a GPU, without installing anything: gpu-test, gpu-check and gpu-bench (PYTHON=python3)
	@failed=0; for target in gpu-test gpu-check gpu-bench; do \
		$(MAKE) --no-print-directory $$target || failed=1; \
	done; exit $$failed

# The package as an installation would lay it out: links, with the commands where the code looks for them.
gpu-package:
	@rm -rf $(GPU_PACKAGE)/dcn_kernels && mkdir -p $(GPU_PACKAGE)/dcn_kernels $(GPU_RECORDS)
	@ln -s $(CURDIR)/dcn_kernels/* $(GPU_PACKAGE)/dcn_kernels && ln -s $(CURDIR)/cli $(GPU_PACKAGE)/dcn_kernels/cli

gpu-test: gpu-package ## The tests that need a GPU, under 8 minutes
	$(GPU_PYTHON) -c 'import cupy; raise SystemExit(not cupy.is_available() and "no GPU that CuPy can use")'
	$(GPU_PYTHON) -m pytest -p no:cacheprovider -m cuda --junitxml=$(GPU_RECORDS)/test.xml

gpu-check: gpu-package ## Gradients and agreement of the backends on the GPU, under 8 minutes each
	$(DCN_CHECK) gradients --backend cuda --output $(GPU_RECORDS)/gradients.json
	$(DCN_CHECK) backends --backend cuda --output $(GPU_RECORDS)/backends.json

gpu-bench: gpu-package ## Time the operators on the GPU against torchvision; the record is saved in bench_results
	$(DCN_BENCH) profile --backend cuda --against torchvision

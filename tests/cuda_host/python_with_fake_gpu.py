#!/usr/bin/env python3
"""Python with a GPU that is not there: `python_with_fake_gpu.py -m pytest -m cuda`. See fake_gpu.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from cuda_host import fake_gpu  # noqa: E402

fake_gpu.main(sys.argv[1:])

"""Tests import the project's files by name, from wherever pytest is started."""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n 2: the workers share the cores, a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

"""Name, score and retrieve findings on CT-RATE: ``python downstream/CT-RATE/main.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where it is not installed

from data import BENCHMARK
from mg3d.finetuning.experiment import run_benchmark

if __name__ == "__main__":
    sys.exit(run_benchmark(BENCHMARK, sys.argv[1:]))

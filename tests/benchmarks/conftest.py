import sys
from pathlib import Path


# Benchmarks import each other as scripts do, from their own folder.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

"""Compiles all kernels for an architecture and prints their resources as JSON, in a process without the interpreter.

python -m tests.engines.runtime.triton.compile_kernels sm_90
"""

import json
import sys
from dataclasses import asdict

from engines.benchmark.kernels.cases import cases

if __name__ == "__main__":
    architecture = sys.argv[1]
    print(json.dumps([[asdict(variant) for variant in case.compile(architecture)] for case in cases(architecture)]))

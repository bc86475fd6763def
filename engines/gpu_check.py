"""Alias: `python -m engines.gpu_check` runs `python -m engines.benchmark.gpu_check`."""

from engines.benchmark.gpu_check.__main__ import main
from engines.benchmark.gpu_check.runner import process_age

if __name__ == "__main__":
    raise SystemExit(main(already_used=process_age()))

"""Alias: `python -m engines.gpu_check` runs `python -m engines.benchmark.gpu_check`."""

from engines.benchmark.gpu_check.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())

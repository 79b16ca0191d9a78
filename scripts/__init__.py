"""Commands beside the package. Those that use ``benchmarks`` run as ``python -m scripts.NAME``."""

"""Coverage of the intervals on known truth. Each script is run as ``python -m benchmarks.coverage.<name>``."""

"""Speed of this package beside what people would pick instead, measured side by side (``benchmarks/compare.py``)."""

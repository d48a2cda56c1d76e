"""Questions on real pictures and videos, in six groups that stand for the paper's six benchmarks."""

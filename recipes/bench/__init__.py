"""Benchmarks, one file each: prefill, decode, and the ops behind the mixers."""

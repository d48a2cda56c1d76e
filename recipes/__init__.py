"""Staged distillation as data, evaluation, benchmarks and the command ``linmu``. Knows mixers and bridges.

Start at :class:`recipes.plan.Recipe` and :func:`recipes.distill.distill`. Nothing is imported here, so that
``linmu --help`` answers at once.
"""

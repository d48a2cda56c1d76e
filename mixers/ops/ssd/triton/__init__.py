"""The SSD scan in Triton: one pass for both directions and all query heads of a group, forward and backward.

A chunk's C·Bᵀ is formed once and used by both directions; the query heads of a group share B, X, the decays
and the states; the scan order is an index at loads and stores. The states that enter the chunks are summed
by two small passes before, and recomputed for the backward.
"""

from __future__ import annotations

"""Every test of mixers runs on one thread and on poisoned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from mixers import attention
from mixers.ops.ssd import reference as ssd
from mixers.ops.window_attention import reference as window_attention


@pytest.fixture(scope="module", autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def blocks_of(chunks: int, block_tokens: int, queries: int) -> Iterator[None]:
    """Set how much every op that works block by block takes at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd, "CHUNKS_PER_BLOCK", chunks)
        patch.setattr(window_attention, "BLOCK_TOKENS", block_tokens)
        patch.setattr(attention, "QUERIES_AT_ONCE", queries)
        yield


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """Let tiny inputs span several blocks."""
    with blocks_of(chunks=2, block_tokens=16, queries=8):
        yield

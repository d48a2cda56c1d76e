"""Every test of mixers runs on one thread and on poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiny inputs span several blocks of every op that works block by block."""
    from mixers import attention
    from mixers.ops.ssd import reference as ssd
    from mixers.ops.window_attention import reference as windows

    monkeypatch.setattr(ssd, "CHUNKS_PER_BLOCK", 2)
    monkeypatch.setattr(windows, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 8)

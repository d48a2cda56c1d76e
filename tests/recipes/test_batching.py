from __future__ import annotations

from collections import Counter
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from recipes.batching import LikeSizes

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(SIZES, st.integers(1, 9), st.none() | st.integers(1, 200), st.integers(0, 3))
def test_every_row_is_drawn_once_in_each_epoch(sizes, rows, tokens, seed):
    batches = LikeSizes(sizes, rows, tokens, seed=seed)
    for epoch in range(2):
        batches.set_epoch(epoch)
        drawn = list(batches)
        assert drawn == list(batches)
        assert len(drawn) == len(batches)
        assert sorted(chain.from_iterable(drawn)) == list(range(len(sizes)))


@given(SIZES, st.integers(1, 9), st.none() | st.integers(1, 200))
def test_a_batch_keeps_its_bounds_and_is_as_full_as_they_allow(sizes, rows, tokens):
    drawn = sorted(LikeSizes(sizes, rows, tokens), key=lambda batch: [sizes[i] for i in batch])
    for batch, following in zip(drawn, [*drawn[1:], None]):
        longest = max(sizes[i] for i in batch)
        assert len(batch) <= rows
        assert tokens is None or len(batch) == 1 or len(batch) * longest <= tokens
        if following is not None:
            assert longest <= min(sizes[i] for i in following)
            more = len(batch) + 1
            assert more > rows or (tokens is not None and more * min(sizes[i] for i in following) > tokens)


@given(SIZES, st.integers(1, 4), st.none() | st.integers(1, 200), st.integers(2, 3))
def test_processes_draw_alike_at_the_same_time(sizes, rows, tokens, processes):
    drawn = list(LikeSizes(sizes, rows, tokens, processes=processes))
    assert len(drawn) % processes == 0
    for start in range(0, len(drawn), processes):
        assert len({len(batch) for batch in drawn[start : start + processes]}) == 1
    times = Counter(chain.from_iterable(drawn))
    assert set(times.values()) <= {1}
    assert len(sizes) - len(times) == len(sizes) % processes


def test_batches_come_in_random_order():
    sizes = [(7 * i) % 3 * 100 for i in range(120)]
    batches = LikeSizes(sizes, 4, seed=3)
    order = list(batches)
    means = [sum(sizes[i] for i in batch) for batch in order]
    assert means not in (sorted(means), sorted(means, reverse=True))
    batches.set_epoch(1)
    assert list(batches) != order
    assert list(LikeSizes(sizes, 4, seed=4)) != order

"""Interpreted kernels may touch only memory of the tensors that they are given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mixers.ops import triton_support


@pytest.fixture(scope="session", autouse=True)
def _within_bounds() -> Iterator[None]:
    """Fail a test whose kernel reads or writes outside of its tensors, which on a chip goes unseen or crashes."""
    if not (triton_support.INSTALLED and triton_support.interpreting()):
        yield
        return
    from triton.runtime import interpreter

    spans: list[tuple[int, int]] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def check(pointers: Any, mask: Any) -> None:
        touched = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64)
        inside = np.zeros(touched.shape, dtype=bool)
        for begin, end in spans:
            inside |= (touched >= begin) & (touched < end)
        assert inside.all(), (
            f"{(~inside).sum()} of {inside.size} addresses are outside of the kernel's tensors"
        )

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        spans[:] = [
            (t.untyped_storage().data_ptr(), t.untyped_storage().data_ptr() + t.untyped_storage().nbytes())
            for t in (*args, *kwargs.values())
            if isinstance(t, torch.Tensor)
        ]
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        patch.setattr(executor, "__call__", checked_call)
        yield

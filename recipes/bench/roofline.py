"""The two limits of an op: its fewest bytes over the measured bandwidth, its products over the measured matrix rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.bench.cases import Case, Inputs, Problem, tensors
from recipes.bench.measure import copy_rate, matmul_rate


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches.

    Attributes:
        bytes_per_second: Read and written, of a large copy.
        operations_per_second: Of a large matrix product in the dtype of the bench.
    """

    bytes_per_second: float
    operations_per_second: float

    @classmethod
    def measured(cls, dtype: torch.dtype, device: torch.device) -> Ceilings:
        """Measure both on this machine."""
        return cls(copy_rate(device), matmul_rate(dtype, device))

    def row(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return them as a row of a results file."""
        return {
            "table": "machine",
            "dtype": str(dtype).removeprefix("torch."),
            "copy_tb_per_second": self.bytes_per_second * 1e-12,
            "matmul_tflops": self.operations_per_second * 1e-12,
        }


@dataclass(frozen=True)
class Work:
    """The least that an op must do.

    Attributes:
        bytes: Inputs read once, outputs written once; nothing between. A state in place is both.
        operations: In matrix products.
    """

    bytes: float
    operations: float

    def seconds(self, ceilings: Ceilings) -> tuple[float, float]:
        """Return the time that the bytes take at least, and that of the operations."""
        return self.bytes / ceilings.bytes_per_second, self.operations / ceilings.operations_per_second


def forward_work(case: Case, problem: Problem, inputs: Inputs, output: Tensor) -> Work:
    """Count a forward's work, from its arguments and its first output."""
    state = 0 if case.state is None else size_of(inputs.args[case.state])
    return Work(size_of(inputs) + size_of(output) + state, case.products(problem))


def training_work(case: Case, problem: Problem, inputs: Inputs, output: Tensor) -> Work:
    """Count the work of forward and backward: inputs again, the output's gradient, the inputs' gradients.

    A product has two in its backward. What a backward recomputes is a choice, and not counted.
    """
    forward = forward_work(case, problem, inputs, output)
    return Work(3 * size_of(inputs.args) + 2 * size_of(output), 3 * forward.operations)


def size_of(value: Any) -> int:
    """Return the bytes of the floating tensors of an op's arguments."""
    return sum(t.numel() * t.element_size() for t in tensors(value))

"""Training for a time in place of a number of steps."""

from __future__ import annotations

import math
import time
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from recipes.plan import Optimizer

FOREVER = 10**6
"""Steps of a training that time ends."""

WARMUP = 0.05
"""Part of the time for the warm-up, where the optimizer's is given in steps."""


class Minutes(TrainerCallback):
    """Ends a training after some time; the learning rate follows the time as it would follow the steps.

    What a training that was killed had logged of its seconds counts when it goes on.

    Args:
        minutes: From the first step on.
        optimizer: Its warm-up, as a part of the time, and its schedule.
    """

    def __init__(self, minutes: float, optimizer: Optimizer) -> None:
        self.seconds, self.begin, self.part = 60 * minutes, 0.0, 0.0
        self.warmup = optimizer.warmup if optimizer.warmup < 1 else WARMUP
        self.schedule = optimizer.schedule

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the scheduler ask for the time, and find what was spent before."""
        schedule = kwargs["lr_scheduler"]
        schedule.lr_lambdas = [self._rate] * len(schedule.lr_lambdas)
        earlier = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self.part = earlier / self.seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock at the first step."""
        self.begin = self.begin or time.monotonic() - self.part * self.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the training when its time is over."""
        if self.part >= 1:
            control.should_training_stop = control.should_log = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock; the main process tells the others what it says, so that all end at the same step."""
        seen = [(time.monotonic() - self.begin) / self.seconds]
        broadcast_object_list(seen)
        self.part = min(1.0, seen[0])

    def _rate(self, step: int) -> float:
        after = max(0.0, self.part - self.warmup) / (1 - self.warmup)
        fallen = {"constant": 1.0, "linear": 1 - after, "cosine": 0.5 + 0.5 * math.cos(math.pi * after)}
        risen = min(1.0, self.part / self.warmup) if self.warmup else 1.0
        return risen * fallen[self.schedule]

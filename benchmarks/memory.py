"""Peak memory of a training step: what torch's allocator hands out, over what it had handed out before the step.

Weights and optimizer state are there before; activations, gradients and temporaries count. The number is exact and the
same at every run with the same routing. A process's resident memory is neither: between equal runs it differed by up to
15% (`tiny`, three runs each), and `ru_maxrss` starts with what the parent process held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of_steps(step: Callable[[Any], object], inputs: Iterable[Any], device: str) -> int:
    """The most of all steps, in bytes. Take a step before: the first one makes the optimizer's state."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for item in inputs:
            step(item)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for item in inputs:
            step(item)
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    assert results is not None
    events: Any = results.events()  # the type stubs lack nbytes
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes, initial=0))

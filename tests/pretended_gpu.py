"""A GPU that is none: torch.cuda answers, "cuda" is the CPU, kernels run in Triton's interpreter.

Programs for a GPU run to their end where there is none. It says nothing about speed.
"""

import concurrent.futures
import contextlib
import time
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Event(SimpleNamespace):
    """torch.cuda.Event on the CPU's clock."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: "Event") -> float:
        return 1e3 * (later.seconds - self.seconds)


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph: keeps operations and results, and writes new results into the old."""

    def __init__(self):
        super().__init__()
        self.steps = []
        self.pool = lambda: None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.steps:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.data.copy_(new)


@contextlib.contextmanager
def record(graph: Graph, pool=None):
    """torch.cuda.graph. Interpreted kernels write through pointers: their launches are kept too."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def recorded(self, *args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():
            launch(self, *args, **kwargs)
        graph.steps.append((launch, (self, *args), kwargs, None))

    with mock.patch.object(GridExecutor, "__call__", recorded), graph:
        yield


class OnTheCPU(TorchFunctionMode):
    """Tensors asked for on a GPU are made here; the one that clears the GPU's cache is small."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
            args = (1,) if args == (2**28,) else args
        return function(*args, **kwargs)


def in_this_process(*args, **kwargs):
    """ProcessPoolExecutor without processes, which would know nothing of the pretence."""
    submit = lambda function, *args: SimpleNamespace(result=lambda: function(*args))
    return contextlib.nullcontext(SimpleNamespace(map=map, submit=submit))


STREAM = SimpleNamespace(wait_stream=lambda other: None)
FAKES = {  # a function each: the compiler of torch looks them up
    "is_available": lambda: True,
    "get_device_name": lambda *args: "a pretended GPU",
    "get_device_capability": lambda *args: (9, 0),
    "mem_get_info": lambda *args: (2**30, 2**30),
    "memory_allocated": lambda *args: 5 * 2**20,
    "max_memory_allocated": lambda *args: 7 * 2**20,
    "reset_peak_memory_stats": lambda: None,
    "synchronize": lambda: None,
    "empty_cache": lambda: None,
    "get_rng_state": lambda *args: torch.get_rng_state(),
    "set_rng_state": lambda *args: None,
    "Event": Event,
    "Stream": lambda: STREAM,
    "current_stream": lambda *args: STREAM,
    "stream": lambda stream: contextlib.nullcontext(),
    "CUDAGraph": Graph,
    "graph": record,
}


@contextlib.contextmanager
def pretended_gpu():
    """Inside, there is a GPU."""
    pool = mock.patch.object(concurrent.futures, "ProcessPoolExecutor", in_this_process)
    with mock.patch.multiple(torch.cuda, **FAKES), pool, OnTheCPU():
        yield

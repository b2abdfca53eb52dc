"""A GPU that is none: torch.cuda answers, "cuda" is the CPU, kernels run in Triton's interpreter.

What it is for: that programs for a GPU run to their end where there is none. It says nothing about
speed, and of correctness what the interpreter can say. Graphs are recorded and replayed, operation
by operation.
"""

import concurrent.futures
import contextlib
import time
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Event:
    """torch.cuda.Event on the CPU's clock."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: "Event") -> float:
        return 1e3 * (later.seconds - self.seconds)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph: keeps operations and results, and writes new results into the old."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.steps:
            new = function(*args, **kwargs)
            for old_leaf, new_leaf in zip(tree_leaves(result), tree_leaves(new)):
                same = not isinstance(old_leaf, torch.Tensor) or old_leaf is new_leaf
                if not same and old_leaf.data_ptr() != new_leaf.data_ptr():
                    old_leaf.data.copy_(new_leaf)

    def pool(self) -> None:
        return None


@contextlib.contextmanager
def record(graph: Graph, pool=None):
    """torch.cuda.graph. Interpreted kernels write through pointers: their launches are kept too."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def recorded(self, *args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():
            launch(self, *args, **kwargs)
        graph.steps.append((launch, (self, *args), kwargs, None))

    GridExecutor.__call__ = recorded
    try:
        with graph:
            yield
    finally:
        GridExecutor.__call__ = launch


class OnTheCPU(TorchFunctionMode):
    """Tensors asked for on a GPU are made here; the one that clears the GPU's cache is small."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
            args = (1,) if args == (2**28,) else args
        return function(*args, **kwargs)


class InThisProcess:
    """ProcessPoolExecutor without processes, which would know nothing of the pretence."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def map(self, function, *iterables):
        return map(function, *iterables)

    def submit(self, function, *args):
        return SimpleNamespace(result=lambda: function(*args))


def fakes() -> dict:
    return {
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
        "Stream": Stream,
        "current_stream": lambda *args: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": record,
    }


@contextlib.contextmanager
def pretended_gpu():
    """Inside, there is a GPU."""
    before = {name: getattr(torch.cuda, name) for name in fakes()}
    pool = concurrent.futures.ProcessPoolExecutor
    for name, fake in fakes().items():
        setattr(torch.cuda, name, fake)
    concurrent.futures.ProcessPoolExecutor = InThisProcess
    try:
        with OnTheCPU():
            yield
    finally:
        concurrent.futures.ProcessPoolExecutor = pool
        for name, value in before.items():
            setattr(torch.cuda, name, value)

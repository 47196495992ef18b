"""The layers of a pass one after another, the next one loaded in the background while one is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import torch
from threadpoolctl import threadpool_limits

from reapc.stream.budget import MemoryPlan
from reapc.stream.model import LoadedLayer, StreamedModel


@contextmanager
def layers_of(
    models: Sequence[StreamedModel], start: int, plan: MemoryPlan | None
) -> Iterator[Iterator[tuple[StreamedModel, LoadedLayer]]]:
    """Yields the layers from ``start``, each with the model that computes it: those of several devices take turns, and
    there the experts that are kept are made ready ahead too. Errors of the background are raised when its layer's turn
    comes; behind this context no thread is left."""
    on_gpu = models[0].device.type == "cuda"
    with ExitStack() as stack:

        def worker(name: str) -> ThreadPoolExecutor:
            pool = ThreadPoolExecutor(1, f"reapc-{name}", None if on_gpu else _compute_alone)
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            return pool

        loader = worker("layers") if plan is not None and plan.ahead else None
        helper = worker("experts") if on_gpu else None

        def load(index: int, ahead: bool) -> LoadedLayer:
            layer = models[index % len(models)].load(index)
            if layer.experts is not None:
                store = layer.experts.store
                store.keep, store.helper = plan.keep[index] if plan is not None else 0, helper
                if ahead and len(models) > 1:
                    store.fill()
                else:
                    store.ask(range(layer.experts.num_experts))
            return layer

        def layers() -> Iterator[tuple[StreamedModel, LoadedLayer]]:
            count = models[0].spec.num_layers
            waiting: Future[LoadedLayer] | None = None
            for index in range(start, count):
                box = [waiting.result() if waiting is not None else load(index, False)]
                waiting = loader.submit(load, index + 1, True) if loader is not None and index + 1 < count else None
                yield models[index % len(models)], box.pop()  # nothing here holds it while it is computed

        yield layers()


def _compute_alone() -> None:
    """Keeps a thread's operators to itself. A second team makes more OpenMP threads than there are cores; libgomp then
    puts those of the first to sleep between operators, and computing takes a quarter longer (seen on two cores)."""
    torch.get_num_threads()  # torch sets a thread's number at its first use, which would undo the limit
    threadpool_limits(1, user_api="openmp")

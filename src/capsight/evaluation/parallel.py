"""Items shared out over processes: small models answer faster on one thread each than one after the other."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from capsight.errors import CapsightError, OptionError
from capsight.evaluation.items import Item
from capsight.evaluation.record import ItemRecord

Ask = Callable[[Item], ItemRecord]

AHEAD = 2
"""Items that wait for each process, so that none is idle and few pictures are in memory."""

_ASK: Ask | None = None
"""What the processes run; they have it, and the model in it, from before they were forked."""


def check_workers(workers: int, device: str) -> None:
    """Refuse a number of processes that cannot be.

    Args:
        workers: processes.
        device: type of the model's device.

    Raises:
        OptionError: it is less than 1, or more than 1 where processes cannot share a model.
    """
    if workers < 1:
        raise OptionError(f"workers is {workers}; it must be at least 1")
    if workers > 1 and (device != "cpu" or "fork" not in multiprocessing.get_all_start_methods()):
        raise OptionError("several workers share a model on the CPU of Linux only; use --workers 1")


def in_order(ask: Ask, items: Iterable[Item], workers: int) -> Iterator[ItemRecord]:
    """Ask about items in several processes of one thread each; the records come in the order of the items.

    Args:
        ask: what is done with an item; runs in copies of this process, so what it changes is lost.
        items: taken as they are needed.
        workers: processes.

    Raises:
        CapsightError: a process died; whatever `ask` raises is raised here, too.
    """
    global _ASK
    _ASK = ask
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), torch.set_num_threads, (1,))
    waiting: deque[Future[ItemRecord]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_asked, item))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise CapsightError(
            "a worker process died, perhaps for want of memory; go on with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        _ASK = None


def _asked(item: Item) -> ItemRecord:
    assert _ASK is not None
    return _ASK(item)

"""`Processes`: those that `torchrun` or `accelerate launch` have started share out the samples of one fit.

Sums lie on the CPU, so they travel over gloo, whatever the model's own processes talk over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from capsight.errors import CalibrationError, OptionError

T = TypeVar("T")

_LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_LONGEST = timedelta(days=2)  # that one process waits for another, which may have longer samples


class ElsewhereError(CalibrationError):
    """Another process of the fit failed and says why; this one ends with it."""


class GoneError(ElsewhereError):
    """Another process of the fit ended without a message."""


def join_launched() -> None:
    """Start torch.distributed where `torchrun` or `accelerate launch` have started this process with others.

    Raises:
        OptionError: the others cannot be reached.
    """
    if dist.is_initialized() or not os.environ.keys() >= _LAUNCHED or os.environ["WORLD_SIZE"] == "1":
        return
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        raise OptionError(f"the other processes of this launch cannot be reached: {error}") from error


class Processes:
    """The processes that share a fit; a lone one where torch.distributed was not started.

    Attributes:
        rank: number of this process.
        count: how many there are.
    """

    def __init__(self, rank: int, count: int, group: Any) -> None:
        """Use `alone` or `launched`."""
        self.rank, self.count, self._group = rank, count, group

    @classmethod
    def alone(cls) -> Processes:
        """This process and no other."""
        return cls(0, 1, None)

    @classmethod
    def launched(cls) -> Processes:
        """All processes of torch.distributed, each of which has to call this; this one where it is off."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls.alone()
        return cls(dist.get_rank(), dist.get_world_size(), _over_gloo(dist.group.WORLD))

    def shard(self, samples: Iterable[T]) -> Iterator[tuple[int, T]]:
        """The samples of this process with their numbers; of a sequence no others are touched."""
        if isinstance(samples, Sequence):
            return ((index, samples[index]) for index in range(self.rank, len(samples), self.count))
        return islice(enumerate(samples), self.rank, None, self.count)

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block fails in one process, it fails in all; only the first of those that failed says why.

        Raises:
            ElsewhereError: another process failed.
        """
        try:
            yield
        except ElsewhereError:
            raise
        except Exception as error:
            self._tell(error)
            raise
        self._tell(None)

    def joined(self, local: T, join: Callable[[T, T], None]) -> T:
        """In the first process `local` with that of all others joined to it, in order; elsewhere `local`.

        Raises:
            ElsewhereError: another process failed before it came here.
        """
        self._tell(None)
        for other in range(1, self.count):
            if self.rank == 0:
                received: list[Any] = [None]
                self._reach(partial(dist.recv_object_list, received, other, self._group))
                join(local, received[0])
            elif self.rank == other:
                self._reach(partial(dist.send_object_list, [local], 0, self._group))
        return local

    def gathered(self, local: T) -> list[T]:
        """What every process has, in their order, in all of them.

        Raises:
            ElsewhereError: another process failed before it came here.
        """
        self._tell(None)
        return self._gather(local)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them.

        Raises:
            ElsewhereError: it could not, or another process failed.
        """
        result = [make() if self.rank == 0 else None]
        self._tell(None)
        if self.count > 1:
            self._reach(partial(dist.broadcast_object_list, result, 0, self._group))
        return result[0]  # type: ignore[return-value]

    def _tell(self, error: Exception | None) -> None:
        """Tell all others whether this process failed, and end if one of them did."""
        if self.count == 1:
            return
        reason = None if error is None else " ".join(str(error).split()) or repr(error)
        reasons = self._gather(reason)
        first = next((rank for rank, said in enumerate(reasons) if said is not None), self.rank)
        if first != self.rank:
            raise ElsewhereError(f"process {first} of the fit failed: {reasons[first]}") from error

    def _gather(self, local: T) -> list[T]:
        gathered: list[Any] = [local] * self.count
        if self.count > 1:
            self._reach(partial(dist.all_gather_object, gathered, local, self._group))
        return gathered

    def _reach(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise GoneError(
                "another process of the fit is gone, perhaps for want of memory; start the fit again"
            ) from error


@cache
def _over_gloo(world: Any) -> Any:
    """One group of all processes of the group `world`, for as long as that is in use."""
    return dist.new_group(backend="gloo", timeout=_LONGEST)

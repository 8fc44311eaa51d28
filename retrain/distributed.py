"""Several processes that train together: who I am among them, and the few things that they do in common.

Started by torchrun, or by `retrain --nproc`, which sets the same variables. Every process (*rank*) runs the same code
on the same values; work is shared out where it is worth it, and its results are gathered, so that all know the same
again. A `World` of one process does nothing and costs nothing. Torch is imported where it is needed.

The ranks trust each other: torch sends Python objects pickled.
"""

from __future__ import annotations

import copy
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from retrain.lifeline import Goodbye, Lifeline
from retrain.redact import shown
from retrain.types import ConfigError, RetrainError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# A rank may judge or evaluate for hours while the others wait. Deaths are the lifeline's matter.
PATIENCE = timedelta(days=7)
MEETING = timedelta(minutes=10)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
INTERRUPTED = 130
_worlds = count()


class RankLost(RetrainError):
    """A collective failed: another process of the run is gone, or somewhere else."""


class World:
    """One process alone. rank: from 0 on, below size. local_rank, local_size: of the ranks on this machine."""

    rank, size = 0, 1
    local_rank, local_size = 0, 1

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work()` gives on each rank, in their order. Where it fails on one, all raise what that one raised."""
        return [work()]

    def first(self, work: Callable[[], T]) -> T:
        """What `work()` gives on rank 0, where alone it is called; all raise what it raises."""
        return work()

    def gather(self, value: T) -> list[T]:
        """`value` of each rank, in their order."""
        return self.each(lambda: value)

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank."""
        return any(self.gather(flag))

    def same(self, what: str, value: object) -> None:
        """Raises RetrainError, on all ranks, where `value` differs between them."""
        found = self.gather(value)
        others = [rank for rank, other in enumerate(found) if other != found[0]]
        if others:
            raise RetrainError(f"{what}: rank 0 and rank {others[0]} differ")

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks: the same bits on all."""

    def group(self) -> World:
        """The same ranks, to be used from another thread. All must ask for it, in the same order."""
        return self

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Around what all ranks compute together, communication within. An error inside ends them all: those that wait
        for this one could not be told otherwise."""
        yield

    def on_loss(self, hint: Callable[[], str]) -> None:
        """hint: the sentence that is said when a rank is lost, after what happened."""


ALONE = World()


class Ranks(World):
    """Several processes. Values and errors travel over gloo, on the CPU; tensors so too, between GPUs over NCCL."""

    def __init__(self, rank: int, size: int, lifeline: Lifeline, name: str = "main") -> None:
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        self._lifeline, self._name = lifeline, name
        self._dist, self._objects = dist, dist.new_group(backend="gloo", timeout=PATIENCE)
        self._groups = count(1)

    def each(self, work: Callable[[], T]) -> list[T]:
        return self._exchanged(work.__qualname__, _outcome(work))

    def first(self, work: Callable[[], T]) -> T:
        return self._exchanged(work.__qualname__, _outcome(work) if self.rank == 0 else (None, None))[0]

    def _exchanged(self, place: str, mine: tuple[Any, Exception | None]) -> list[Any]:
        """place: in the program, where all ranks have to be."""
        found: list[Any] = [None] * self.size
        with self.collective():
            self._dist.all_gather_object(found, (place, _portable(mine)), group=self._objects)
        for rank, (other, _) in enumerate(found):
            if other != place:
                raise RankLost(f"rank {rank} is at {other}, rank {self.rank} at {place}")
        outcomes = [outcome for _, outcome in found]
        outcomes[self.rank] = mine
        for _, error in outcomes:
            if error is not None:
                raise error
        return [value for value, _ in outcomes]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        import torch

        if not tensors:
            return
        # In single precision at least: a sum of many loses bits.
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        flat = torch.cat([tensor.detach().flatten().to(wide) for tensor in tensors])
        with self.collective():
            self._dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def group(self) -> World:
        return Ranks(self.rank, self.size, self._lifeline, f"{self._name}.{next(self._groups)}")

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        group = f"{self._name} in lockstep"
        self._lifeline.begin(group)
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - whatever it is, the others wait in vain
            self._lifeline.fail(group, _text(error), status_of(error))

    def on_loss(self, hint: Callable[[], str]) -> None:
        self._lifeline.hint = hint

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Around what all ranks do together. Raises RankLost where one of them is gone."""
        self._lifeline.begin(self._name)
        try:
            yield
        except RuntimeError as error:
            raise RankLost(f"another process of this run is gone: {error}") from error


def several() -> bool:
    """Whether this process was started as one of several ranks."""
    return all(name in os.environ for name in VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def open_world() -> Iterator[World]:
    """The ranks of this run; around everything, so that an error of one rank ends them all, and is said once.

    A rank that dies, or ends where the others go on, ends the process, with what happened on stderr. An error that all
    ranks come to is raised on each of them. Raises RetrainError where the ranks cannot find each other.
    """
    if not several():
        yield ALONE
        return
    world, lifeline = _join()
    try:
        yield world
    except BaseException as error:
        _leave(lifeline, error)
        raise
    _leave(lifeline, None)
    world._dist.destroy_process_group()


def _join() -> tuple[Ranks, Lifeline]:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    host = os.environ["MASTER_ADDR"]
    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
        store = PrefixStore(f"retrain/{next(_worlds)}", store)
        lifeline = Lifeline(rank, size, _say)
        if rank == 0:
            word = secrets.token_hex(16)
            server = lifeline.listen("127.0.0.1" if host in LOOPBACK else "")
            store.set("lifeline", f"{server.getsockname()[1]} {word}")
            lifeline.accept(server, word, seconds=MEETING.total_seconds())
        else:
            port, word = store.get("lifeline").decode().split()
            lifeline.connect((host, int(port)), word)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        return Ranks(rank, size, lifeline), lifeline
    except (RuntimeError, OSError, ValueError) as error:
        place = f"{host}:{os.environ['MASTER_PORT']}"
        raise RetrainError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} does not find the others at {place}: {error}. "
            "Start them all with the same command, on machines that reach each other"
        ) from error


def _leave(lifeline: Lifeline, error: BaseException | None) -> None:
    """Raises what another rank failed with where this one did not."""
    own = Goodbye(
        dict(lifeline.begun), None if error is None else _text(error), status_of(error), isinstance(error, RankLost)
    )
    goodbyes = lifeline.leave(own)
    if lifeline.rank:
        return
    for rank in sorted(lifeline.missing() if error is None else ()):
        raise RetrainError(f"the process of rank {rank} died at the end")
    for rank, other in sorted(goodbyes.items()):
        if other.error is None or other.echo or _same_error(own, other):
            continue
        if error is None:
            kind = ConfigError if other.status == ConfigError.exit_status else RetrainError
            raise kind(f"rank {rank}: {other.error}")
        _say(f"rank {rank}: {other.error}")


def _same_error(own: Goodbye, other: Goodbye) -> bool:
    """Whether both say the same, whatever they advise: that may name what only one machine has."""
    firsts = [(goodbye.error or "").partition("\n")[0].partition(". ")[0] for goodbye in (own, other)]
    return own.status == other.status and (firsts[0] == firsts[1] or own.status == INTERRUPTED)


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 - all ranks raise it
        return None, error


def _portable(outcome: tuple[T | None, Exception | None]) -> tuple[T | None, Exception | None]:
    """With an error that can be made again elsewhere, without what it refers to here."""
    value, error = outcome
    if error is None:
        return outcome
    try:
        again = copy.copy(error)
        again.__traceback__ = again.__cause__ = again.__context__ = None
        return value, again
    except Exception:  # noqa: BLE001 - an error of a library may be made in any way
        return value, RetrainError(_text(error))


def _text(error: BaseException) -> str:
    if isinstance(error, RetrainError | KeyboardInterrupt):
        return str(error)
    return f"{type(error).__name__}: {error}"


def status_of(error: BaseException | None) -> int:
    """The exit status of a process that ends with `error`."""
    match error:
        case None:
            return 0
        case RetrainError():
            return error.exit_status
        case KeyboardInterrupt():
            return INTERRUPTED
    return 1


def _say(line: str) -> None:
    # A live view that is left standing has hidden the cursor.
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    print(f"{cursor}error: {shown(line)}", file=sys.stderr, flush=True)

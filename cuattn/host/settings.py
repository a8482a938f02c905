"""How launches run: checkers, schedule, asynchrony, threads.

The environment sets them for the process, `check` and `schedule` for a thread or an asyncio task, from there on or for
a ``with`` block. They are context variables: what one thread sets, no other one feels.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import TracebackType

from .. import environment
from ..errors import ArgumentError

CHECKS = environment.HOST_CHECKS
ASYNC_MODES = environment.HOST_ASYNC_MODES


@dataclass(frozen=True, slots=True)
class Settings:
    """What a launch on the host executor obeys."""

    checks: frozenset[str]
    async_mode: str
    random_schedule: bool
    seed: int
    threads: int


_set: ContextVar[Settings | None] = ContextVar("cuattn.host settings", default=None)


def current() -> Settings:
    """Return the settings in force here: the environment's, until this thread or task sets something."""
    settings = _set.get()
    if settings is not None:
        return settings
    mode = environment.host_async()
    return Settings(
        environment.host_check(), mode, mode == "random", environment.host_seed(), environment.host_threads()
    )


def checks() -> frozenset[str]:
    """Return the checkers in force, without a look at the rest."""
    settings = _set.get()
    return environment.host_check() if settings is None else settings.checks


class _Restore:
    """A setting that takes effect when made; as a context manager it puts back what was in force before."""

    def __init__(self, settings: Settings) -> None:
        self._before = _set.get()
        _set.set(settings)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set.set(self._before)


def check(*names: str) -> _Restore:
    """Switch checkers on, and all others off: ``"mem"``, ``"init"``, ``"race"``, or ``"all"``.

    Works at once, or for a ``with`` block, in this thread or task only. ``check()`` switches all of them off.

    Raises
    ------
    ArgumentError
        An unknown name.

    Examples
    --------
    >>> import cuattn.host
    >>> with cuattn.host.check("mem", "init", "race"):
    ...     pass
    """
    wanted = set(CHECKS) if "all" in names else set(names)
    if not wanted <= set(CHECKS):
        unknown = ", ".join(sorted(wanted - set(CHECKS)))
        raise ArgumentError(f"check: unknown checker {unknown}: choose from {', '.join(CHECKS)} or all")
    return _Restore(replace(current(), checks=frozenset(wanted)))


def schedule(mode: str = "late", seed: int = 0, *, threads: int | None = None) -> _Restore:
    """Choose when asynchronous copies land, and in which order warps and CTAs run, in this thread or task only.

    Parameters
    ----------
    mode : {"eager", "late", "random"}
        ``"eager"``: copies land at once and warps run in order (fastest). ``"late"``: copies land only when the
        kernel's own waits force them. ``"random"``: copies land at random moments, and warps and CTAs run in random
        order, all from ``seed``.
    seed : int
        Seed of the random choices; the same seed gives the same order on one thread.
    threads : int, optional
        Threads of the host to use.

    Raises
    ------
    ArgumentError
        An unknown mode, a negative seed, fewer than one thread.
    """
    if mode not in ASYNC_MODES:
        raise ArgumentError(f"schedule: mode {mode!r}: choose from {', '.join(ASYNC_MODES)}")
    if seed < 0:
        raise ArgumentError(f"schedule: seed {seed}: must not be negative")
    if threads is not None and threads < 1:
        raise ArgumentError(f"schedule: threads {threads}: must be at least 1")
    before = current()
    return _Restore(
        replace(before, async_mode=mode, random_schedule=mode == "random", seed=seed, threads=threads or before.threads)
    )

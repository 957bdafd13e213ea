"""Run altered networks on one batch without computing again what the run before has computed.

The record is the last run. Two runs are the same up to the first call of a gate that differs between them; up to
there the model's own code runs again, but every operation and module call in it is answered with the recorded objects.
It must be the same call on the same objects, and none of them may have been written to since: where a later write is
seen, computing begins before the tensor was made. A module in which there is no gate is recorded as one call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from resect.blocks.forms import form, same
from resect.blocks.intercept import Intercepted
from resect.blocks.state import PORT
from resect.blocks.writes import NotTheSame, Writes

_one_at_a_time = threading.Lock()


@dataclass
class Event:
    """One call of a torch function or a module; what it called itself follows it in the record."""

    number: int
    what: Any
    given: Any
    output: Any = None
    end: float = math.inf
    """Number of the first event after it; infinite while it is not known what came out."""


class Replay(TorchFunctionMode):
    """The record of the last run of a model with gates on, and the watch over the next one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules = dict(model.named_modules())
        self._gates_in = {module: names for module in model.modules() if (names := _gates_below(module))}
        self.forget()

    def forget(self) -> None:
        """Drop the record: another batch follows."""
        self._events: list[Event] = []
        self._limit = 0
        """The number of recorded events that the next run repeats."""
        self._closed: frozenset[str] = frozenset()
        self._seen: dict[str, int] = {}
        """Per gate, the number of events before its first call."""
        self._writes = Writes()

    def run(self, work: Callable[[], Any], closed: frozenset[str], differs: frozenset[str] | None) -> Any:
        """Do ``work``, a run with these gates closed; ``differs``: the gates that the next run has otherwise, if any.

        Raises ``NotTheSame`` where it does not repeat the last run as it should.
        """
        if not _one_at_a_time.acquire(blocking=False):  # another thread is at it, and what is patched is shared
            self.forget()
            return work()
        self._changed, self._closed, self._differs = self._closed ^ closed, closed, differs
        self._thread = threading.get_ident()
        self._place, self._recording, self._off = 0, False, False
        self._paused: int | None = None
        self._open: list[int] = []
        try:
            self._limit = self._writes.none_before(self._limit)
            parting = (self._seen.get(name, math.inf) for name in differs or ())
            self._next = min(parting, default=math.inf)
            with _followed(self), self:
                output = work()
            if not self._off:
                self._keep_up()
            if not self._off:
                self._stop(len(self._events))
            return output
        except BaseException:
            self.forget()
            raise
        finally:
            _one_at_a_time.release()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer an operation from the record, or run and record it."""
        kwargs = kwargs or {}
        if not self._follows():
            return func(*args, **kwargs)
        event = self._recorded(func, args, kwargs)
        if event is not None:
            self._place = int(event.end)
            return form(event.output)
        if self._off:
            return func(*args, **kwargs)
        event = self._begin(func, args, kwargs)
        with self._may_raise(event):
            output = func(*args, **kwargs)
        self._finish(event, output)
        return output

    def call(self, run: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Answer a module call from the record, or run and record it; one that holds the limit is entered."""
        if _get_current_function_mode() is not self:
            return run(module, *args, **kwargs)
        event = self._recorded(module, args, kwargs) if self._follows() else None
        if event is not None and event.end <= self._limit:
            self._place = int(event.end)
            return form(event.output)
        if self._off or self._paused is not None:
            with _pop_mode_temporarily():  # what is not followed runs as it would without
                return run(module, *args, **kwargs)
        if event is None:
            event = self._begin(module, args, kwargs)
        else:
            self._place, event.end = self._place + 1, math.inf
        return self._inside(event, run, module, args, kwargs)

    def _inside(self, event: Event, run: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        entered = module in self._gates_in
        if entered:
            self._open.append(event.number)
        else:
            self._paused = event.number
        try:
            with self._may_raise(event), nullcontext() if entered else _pop_mode_temporarily():
                output = run(module, *args, **kwargs)
        finally:
            if entered:
                self._open.pop()
            if self._paused == event.number:
                self._paused = None
        if not self._off:
            self._keep_up()
            if not self._recording:
                raise NotTheSame("a module's call ended before it had done what it did in the run before")
            if entered:  # after the last call inside is another place than after this one
                self._events.append(Event(len(self._events), None, None))
            self._finish(event, output)
        return output

    def gate(self, module: nn.Module) -> None:
        """Take note that an intercepted module is called: here runs may part."""
        if threading.get_ident() != self._thread or self._off:
            return
        port = module.__dict__[PORT]
        names = {holder.block.name for holder in (*port.parts, *port.frames)}
        if self._paused is not None:
            if names & (self._differs or set()):
                self._stop(self._paused)
            for name in names:
                self._seen.setdefault(name, self._paused)
            return
        if _get_current_function_mode() is not self:
            raise NotTheSame("part of the model runs under a torch function mode of its own")
        self._keep_up()
        if self._off:
            return
        if not self._recording:
            if names & self._changed or not names <= self._seen.keys():
                raise NotTheSame("a gate was met before its time")
            return
        if names & (self._differs or set()):
            self._stop(len(self._events))
            return
        for name in names:
            self._seen.setdefault(name, len(self._events))
        self._paused = self._pause(port)

    def _pause(self, port: Any) -> int | None:
        """Return the call till whose end nothing more is worth recording, or can be; None: go on."""
        for holder in (*port.parts, *port.frames):
            if any(gate.is_closed and gate.acts for gate in holder.gates):  # values in flight until the owner ends
                owner = self._modules[holder.block.owner] if holder in port.parts else None
                around = [number for number in self._open if self._events[number].what is owner] or self._open[-1:]
                if not around:
                    self._stop(0)
                    return None
                return around[0]
        for number in self._open:
            if self._gates_in[self._events[number].what] <= self._seen.keys():  # no run can part after this
                return number
        return None

    def _follows(self) -> bool:
        return not self._off and self._paused is None

    def _keep_up(self) -> None:
        """Begin to record where the record ends."""
        if not self._recording and self._place >= self._limit:
            if self._next < self._limit or self._differs is None:  # nothing new would be of use to the next run
                self._stop(int(min(self._next, self._limit)))
                return
            self._recording = True
            del self._events[self._limit :]
            self._seen = {name: number for name, number in self._seen.items() if number < self._limit}
            self._writes.forget_from(self._limit)

    def _stop(self, limit: int) -> None:
        self._off, self._limit = True, limit

    def _recorded(self, what: Any, args: Any, kwargs: Any) -> Event | None:
        """Return the recorded call that this one repeats; None where the record is at its end."""
        self._keep_up()
        if self._recording or self._off:
            return None
        event = self._events[self._place]
        if event.what != what or not same(event.given, (args, kwargs)):
            where = f"where the run before called {_named(event.what)}"
            if _named(what) == _named(event.what):
                where = "in another place" if event.what != what else "with other inputs than in the run before"
            raise NotTheSame(f"{_named(what)} was called {where}")
        return event

    def _begin(self, what: Any, args: Any, kwargs: Any) -> Event:
        event = Event(len(self._events), what, form((args, kwargs), opaque=True))
        self._events.append(event)
        self._writes.look(event.given)
        return event

    def _finish(self, event: Event, output: Any) -> None:
        event.end = len(self._events)
        self._writes.look((event.given, output), event.number, event.end)
        try:
            event.output = form(output)
        except TypeError:  # something that the model may write to unnoticed
            self._writes.never_repeat(event.number)

    @contextmanager
    def _may_raise(self, event: Event) -> Iterator[None]:
        """Never repeat a call that raised, where the model catches that."""
        try:
            yield
        except Exception:
            self._writes.never_repeat(event.number)
            raise


def _gates_below(module: nn.Module) -> frozenset[str]:
    ports = [part.__dict__[PORT] for part in module.modules() if part is not module and PORT in part.__dict__]
    return frozenset(holder.block.name for port in ports for holder in (*port.parts, *port.frames))


def _named(what: Any) -> str:
    return type(what).__name__ if isinstance(what, nn.Module) else getattr(what, "__name__", str(what))


@contextmanager
def _followed(replay: Replay) -> Iterator[None]:
    """Tell a replay of every module call and every gate."""
    plain, gated = nn.Module.__call__, Intercepted.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return replay.call(plain, module, args, kwargs)

    def gate(module: Any, *args: Any, **kwargs: Any) -> Any:
        replay.gate(module)
        return gated(module, *args, **kwargs)

    nn.Module.__call__, Intercepted.__call__ = call, gate  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.__call__, Intercepted.__call__ = plain, gated  # type: ignore[method-assign]

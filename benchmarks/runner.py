"""Runs contests in a process of their own, so that a provider that hangs or crashes costs its row and nothing else."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

from benchmarks.contest import Ceilings, Contest, Turn, run, warm
from benchmarks.machine import Machine
from benchmarks.results import Results, Row

START_SECONDS = 180.0  # for a process to import everything and find the device
DONE = "done"
READY = "ready"


class Broken(NamedTuple):
    """What a worker says before it ends because it cannot go on."""

    reason: str


class OutOfTime(Exception):
    """The deadline has come; what was measured has been handed out."""


def serve(connection: Connection, build: Callable[[], list[Contest]], device: str, log: str | None) -> None:
    """The worker's side: runs what comes through the connection until nothing more comes."""
    os.setsid()  # ends with all processes that it has started, compilers for instance
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if log is not None:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    try:
        machine = Machine(device)
        machine.set_up()
        contests = {contest.key: contest for contest in build()}
        gc.collect()
        gc.freeze()  # garbage is collected after each contest; what is imported is none
        connection.send(READY)
        while (visit := connection.recv()) is not None:
            key, providers, ceilings, only_warm = visit
            print(f"--- {contests[key]}: {', '.join(providers)}", flush=True)
            if only_warm:
                warm(contests[key], machine, *providers)
            else:
                run(contests[key], machine, providers, ceilings, connection.send)
            connection.send(DONE)
    except (EOFError, BrokenPipeError):
        return  # whoever asked is gone
    except Exception as error:
        lines = str(error).strip().splitlines()
        connection.send(Broken(f"{type(error).__name__}: {lines[0] if lines else ''}"))
        raise  # into the log


def _end_with_parent() -> None:
    """However that ended: nobody else would stop a provider that hangs, or give the GPU's memory back."""
    wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGKILL)


class Runner:
    """Measures contests, one after the other, each row as soon as it is there.

    Args:
        build: makes the contests, in the worker; a module's function, or a partial of one.
        device: as :class:`Machine` takes it.
        log: file for what providers print.
        deadline: on the clock ``time.monotonic``; None is never.
    """

    def __init__(
        self,
        build: Callable[[], list[Contest]],
        device: str,
        log: Path | None = None,
        deadline: float | None = None,
    ):
        self._arguments = (build, device, None if log is None else str(log))
        self._deadline = deadline
        self._process = self._connection = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def visit(
        self, contest: Contest, providers: tuple[str, ...], ceilings: Ceilings | None = None
    ) -> Iterator[tuple[Row, list[float]]]:
        """Rows and their samples (seconds per call) as they come; a provider's later row replaces its earlier one.

        Raises:
            OutOfTime: the deadline came first.
            RuntimeError: the process cannot use the device.
        """
        waiting = list(providers)
        while waiting:
            turn = status = None
            for message in self._messages(contest, waiting, ceilings):
                if isinstance(message, Turn):
                    turn = message
                elif isinstance(message, tuple) and isinstance(message[0], Row):
                    yield message
                    if not message[0].ok:
                        waiting.remove(message[0].provider)
                elif message == DONE:
                    return
                else:  # what ended the worker
                    status = message
            if status is None:
                return
            # Whose turn it was; all of them before the first turn, nobody where that one has got its bad row already.
            blamed = waiting.copy() if turn is None else [turn.provider]
            for provider in filter(waiting.__contains__, blamed):
                waiting.remove(provider)
                yield contest.row(provider, status=status), []

    def warm(self, contest: Contest, provider: str) -> bool:
        """Gets a provider ready and measures nothing; False where that did not work, for whatever reason."""
        return list(self._messages(contest, [provider], None, only_warm=True)) == [DONE]

    def _messages(
        self, contest: Contest, providers: list[str], ceilings: Ceilings | None, only_warm: bool = False
    ) -> Iterator:
        """What the worker says; in the end DONE, or the status that providers get because it is gone."""
        limit = START_SECONDS
        try:
            if self._process is not None and not self._process.is_alive():  # it died with nobody's turn
                self.stop()
            if self._process is None:
                self._start()
                first = self._receive(limit)
                if isinstance(first, Broken):
                    self.stop()
                    raise RuntimeError(f"no benchmark can run: {first.reason}")
            self._connection.send((contest.key, tuple(providers), ceilings, only_warm))
            limit = contest.limit
            while True:
                message = self._receive(limit)
                if isinstance(message, Broken):
                    self.stop()
                    yield f"failed: {message.reason}"
                    return
                if isinstance(message, Turn):
                    limit = message.seconds
                yield message
                if message == DONE:
                    return
        except TimeoutError:
            self.stop()
            yield f"timeout: nothing came for {limit:g} s"
        except (EOFError, OSError) as error:
            code = self._exit_code()
            self.stop()
            yield f"crashed: {str(error) or f'the process ended with exit code {code}'}"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, *self._arguments), daemon=False)
        process.start()
        theirs.close()
        self._process, self._connection = process, ours  # only now: a signal may come at any moment

    def _receive(self, seconds: float):
        left = float("inf") if self._deadline is None else self._deadline - time.monotonic()
        if self._connection.poll(max(0.0, min(seconds, left))):
            return self._connection.recv()
        if left <= seconds:
            self.stop()
            raise OutOfTime
        raise TimeoutError

    def _exit_code(self) -> int | None:
        self._process.join(5)
        return self._process.exitcode

    def stop(self) -> None:
        """Ends the worker and all that it has started; the next visit starts another."""
        if self._process is None:
            return
        self.kill()
        self._connection.close()
        self._process.join(10)  # one that hangs in the driver may take longer, and is nobody's any more
        self._process = self._connection = None

    def kill(self) -> None:
        """Ends the worker under whoever waits for it in another thread, and then hears that it has crashed."""
        process = self._process
        if process is None or process.pid is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has no group of its own yet, or is gone
            process.kill()


def ceilings_of(results: Results, dtype: str) -> Ceilings | None:
    """The ceilings that were measured in this run, for work in ``dtype``; None where they were not."""
    copy = _rate(results, "copy", None)
    product = _rate(results, "matmul", dtype.removeprefix("amp_")) or _rate(results, "matmul", "bf16")
    return None if copy is None or product is None else Ceilings(copy * 1e9, product * 1e12)


def _rate(results: Results, case: str, dtype: str | None) -> float | None:
    for row in results.rows:
        if row.suite == "ceilings" and row.case == case and row.ok and dtype in (None, row.dtype):
            return row.rate
    return None

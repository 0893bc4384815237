"""Partitions of a simulated program: one runs at a time, until it waits; what is asynchronous may come late.

Everything is chosen by one seeded generator: partitions that may go on, copies that land, products that are computed
when they are issued or only when they are waited for. So a failure repeats.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pagewire.overlap import meet, span


class Deadlock(AssertionError):
    """Every partition waits, and nothing is under way that could end it."""


class Race(AssertionError):
    """Shared memory is written while somebody still reads it, or read before it was handed over."""


@dataclass
class Product:
    """wgmma under way: what it reads in shared memory may not change until it was waited for."""

    run: Callable[[], Tensor]
    reads: list[Tensor]
    value: Tensor | None = None

    def force(self) -> Tensor:
        if self.value is None:
            self.value = self.run()
        return self.value


@dataclass
class Partition:
    name: str
    main: Callable[[], None]
    turn: threading.Event = field(default_factory=threading.Event)
    condition: Callable[[], bool] = lambda: True
    waits_for: str = "its start"
    ended: bool = False
    error: BaseException | None = None
    products: list[Product] = field(default_factory=list)
    asked: list[Callable[[], Any]] = field(default_factory=list)  # copies of no group yet
    groups: list[list[Callable[[], Any]]] = field(default_factory=list)


class Machine:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.deliveries: list[Callable[[], None]] = []
        self.partitions: list[Partition] = []
        self.current: Partition = Partition("the program", lambda: None)  # before partitions part
        self._back = threading.Event()
        self._over = False

    # ------------------------------------------------------------------------------------- for partitions

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Another one's turn, until the condition holds."""
        me = self.current
        if not self.partitions:
            while not condition():
                self._deliver(what)
            return
        me.condition, me.waits_for = condition, what
        me.turn.clear()
        self._back.set()
        me.turn.wait()
        if self._over:
            raise SystemExit  # another one failed

    def pause(self) -> None:
        """Anything may happen here, and much of it."""
        while self.random.random() < 0.7:
            self.wait(lambda: True, "nothing")

    def later(self, delivery: Callable[[], None]) -> None:
        self.deliveries.append(delivery)

    def write(self, memory: Tensor) -> None:
        """About to be written, by whomever."""
        for partition in (self.current, *self.partitions):
            for product in partition.products:
                for read in product.reads:
                    if meet(span(memory), span(read)):
                        raise Race(f"{self.current.name} writes what a product of {partition.name} may still read")

    # ------------------------------------------------------------------------------------- all of them

    def run(self, mains: list[tuple[str, Callable[[], None]]]) -> None:
        self.partitions = [Partition(name, main) for name, main in mains]
        threads = [threading.Thread(target=self._one, args=(p,), daemon=True) for p in self.partitions]
        for thread in threads:
            thread.start()
        try:
            while not all(p.ended for p in self.partitions):
                self._next()
        finally:
            self._over = True
            for partition in self.partitions:
                partition.turn.set()
            for thread in threads:
                thread.join(10)
            self.partitions = []
        while self.deliveries:
            self._deliver("the end")

    def _one(self, partition: Partition) -> None:
        partition.turn.wait()
        if not self._over:
            try:
                partition.main()
                left = (*partition.products, *partition.asked, *partition.groups)
                assert not left, f"{partition.name} ends with products or copies that nobody waited for"
            except BaseException as error:  # noqa: BLE001, it is raised by the machine
                partition.error = error
        partition.ended = True
        self._back.set()

    def _next(self) -> None:
        able = [p for p in self.partitions if not p.ended and p.condition()]
        if self.deliveries and (not able or self.random.random() < 0.2):
            self._deliver("")
            return
        if not able:
            waiting = "; ".join(f"{p.name} for {p.waits_for}" for p in self.partitions if not p.ended)
            raise Deadlock(f"all wait: {waiting}")
        self.current = self.random.choice(able)
        self._back.clear()
        self.current.turn.set()
        self._back.wait()
        if self.current.error is not None:
            raise self.current.error

    def _deliver(self, what: str) -> None:
        if not self.deliveries:
            raise Deadlock(f"{self.current.name} waits for {what}, and nothing is under way")
        self.deliveries.pop(self.random.randrange(len(self.deliveries)))()

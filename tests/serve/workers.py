"""Model processes without HTTP: started as the front starts them, or P and D stepped by hand in one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from pagewire.net.channel import Channel, ChannelClosed, wait
from pagewire.serve.channel import FRONT_CODEC, WORKER_CODEC
from pagewire.serve.config import WorkerConfig
from pagewire.serve.messages import (
    Cancel,
    Event,
    Events,
    Failed,
    Finished,
    Gauges,
    Linked,
    Pair,
    Ready,
    Sampling,
    Shutdown,
    Submit,
    Token,
    Unlinked,
)

TIMEOUT_S = 60.0


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [3 + (7 * i + 31 * salt) % 300 for i in range(length)]


class FrontEnd:
    """The front's ends of the control channels, and everything that came out of them."""

    def __init__(self) -> None:
        self.channels: dict[str, Channel] = {}
        self.closed: set[str] = set()
        self.ready: dict[str, Ready] = {}
        self.tokens: dict[str, dict[int, int]] = defaultdict(dict)
        self.ends: dict[str, list[Finished | Failed]] = defaultdict(list)
        self.events: list[Event] = []
        self.gauges: dict[str, Gauges] = {}
        self.link = 0  # the latest that was asked for
        self.linked: dict[str, int] = {}  # by role: the link that stands
        self.unlinked: list[tuple[str, Unlinked]] = []

    def connect(self, role: str) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.channels[role] = Channel(ours, FRONT_CODEC, name=role)
        return theirs

    def send(self, message: Any) -> None:
        for channel in self.channels.values():
            channel.send(message)

    def pair(self) -> None:
        """As the front does once P and D are ready."""
        self.link += 1
        decode, prefill = self.ready["decode"], self.ready["prefill"]
        self.channels["decode"].send(Pair(self.link, prefill.incarnation, ""))
        self.channels["prefill"].send(Pair(self.link, decode.incarnation, decode.address))
        self.until(lambda: set(self.linked.values()) == {self.link} and len(self.linked) == 2)

    def submit(
        self, request_id: str, prompt: list[int], max_tokens: int, *, stop: tuple[int, ...] = (),
        sampling: Sampling = Sampling(), local: bool = False,  # noqa: B008 (frozen)
    ) -> None:  # fmt: skip
        """local: to D alone, which prefills it too."""
        submit = Submit(request_id, prompt, max_tokens, list(stop), sampling, 0 if local else self.link)
        for role, channel in self.channels.items():
            if not local or role != "prefill":
                channel.send(submit)

    def cancel(self, request_id: str) -> None:
        self.send(Cancel(request_id))

    def poll(self) -> None:
        for role, channel in self.channels.items():
            try:
                for message in channel.poll():
                    self._take(role, message)
            except ChannelClosed:
                self.closed.add(role)

    def _take(self, role: str, message: Any) -> None:
        match message:
            case Token(request_id, index, token_id):
                assert index not in self.tokens[request_id], "a token was emitted twice"
                self.tokens[request_id][index] = token_id
            case Finished(request_id) | Failed(request_id):
                self.ends[request_id].append(message)
            case Events(events):
                self.events += events
            case Gauges():
                pages = dict(message.num_pages)
                assert pages.pop("total") == sum(pages.values())
                self.gauges[role] = message
            case Ready():
                self.ready[role] = message
            case Linked(link):
                self.linked[role] = link
            case Unlinked():
                self.linked.pop(role, None)
                self.unlinked.append((role, message))

    def output(self, request_id: str) -> list[int]:
        tokens = self.tokens[request_id]
        assert sorted(tokens) == list(range(len(tokens)))
        return [tokens[i] for i in range(len(tokens))]

    def named(self, name: str, request_id: str | None = None) -> list[Event]:
        return [event for event in self.events if event.name == name and request_id in (None, event.request_id)]

    def reported(self, name: str, request_id: str) -> list[Event]:
        """`named`, once a worker has sent any: events leave a worker some turns after they happen."""
        self.until(lambda: self.named(name, request_id) != [])
        return self.named(name, request_id)

    def until(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        raise NotImplementedError

    def all_free(self) -> bool:
        return len(self.gauges) == len(self.channels) and all(
            gauges.num_pages["free"] == gauges.num_pages["total"] and gauges.num_running == gauges.num_waiting == 0
            for gauges in self.gauges.values()
        )


class Workers(FrontEnd):
    """P and D, joined, or one colocated process, as real processes."""

    def __init__(self, config: WorkerConfig, roles: tuple[str, ...] = ("decode", "prefill")) -> None:
        super().__init__()
        self.config = config
        self.processes: dict[str, subprocess.Popen] = {}
        for role in roles:
            self.start(role)
        self.until(lambda: len(self.ready) == len(roles))
        if len(roles) == 2:
            self.pair()

    def start(self, role: str) -> None:
        self.ready.pop(role, None)
        self.linked.pop(role, None)
        self.closed.discard(role)
        self.processes[role] = spawn(role, self.config, self.connect(role))

    def until(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        self.poll()
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {self.ends}, {self.gauges}"
            wait([c for role, c in self.channels.items() if role not in self.closed], 0.2)
            self.poll()

    def until_ended(self, *request_ids: str) -> None:
        self.until(lambda: all(self.ends[request_id] for request_id in request_ids))

    def kill(self, role: str) -> None:
        self.processes[role].send_signal(signal.SIGKILL)

    def num_fds(self, role: str) -> int:
        return len(os.listdir(f"/proc/{self.processes[role].pid}/fd"))

    def rss_mb(self, role: str) -> float:
        status = Path(f"/proc/{self.processes[role].pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def exit_code(self, role: str) -> int:
        return self.processes[role].wait(timeout=TIMEOUT_S)

    def stderr(self, role: str) -> str:
        return self.processes[role].communicate(timeout=TIMEOUT_S)[1]

    def stop(self) -> None:
        for role, process in self.processes.items():
            if process.poll() is None and role not in self.closed:
                self.channels[role].send(Shutdown())
        for process in self.processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
            if not process.stderr.closed:
                process.communicate()


def spawn(role: str, config: WorkerConfig, control: socket.socket) -> subprocess.Popen:
    """Closes our copy of `control`."""
    json = msgspec.json.encode(config).decode()
    args = ["--role", role, "--config-json", json, "--control-fd", str(control.fileno())]
    python = str(Path(__file__).parents[2] / "python")
    with control:
        return subprocess.Popen(
            [sys.executable, "-m", "pagewire.serve.worker", *args], pass_fds=[control.fileno()], text=True,
            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python},
        )  # fmt: skip


class Stepped(FrontEnd):
    """P and D in this process, joined, each advanced one turn at a time."""

    def __init__(self, config: WorkerConfig, config_of_d: WorkerConfig | None = None) -> None:
        super().__init__()
        from pagewire.serve.worker.decode import DecodeWorker
        from pagewire.serve.worker.engine import Engine
        from pagewire.serve.worker.peers import Peers
        from pagewire.serve.worker.prefill import PrefillWorker
        from pagewire.transfer.packing import new_hello

        p_engine, d_engine = Engine(config), Engine(config_of_d or config)
        p_peers, d_peers = (
            Peers(new_hello(role, engine.cache, b"f" * 32, engine.config.kv_wire_dtype), engine.cache, engine.config)
            for role, engine in (("prefill", p_engine), ("decode", d_engine))
        )
        self.front_of_p = Channel(self.connect("prefill"), WORKER_CODEC, name="the front")
        self.front_of_d = Channel(self.connect("decode"), WORKER_CODEC, name="the front")
        self.p = PrefillWorker(p_engine, self.front_of_p, p_peers)
        self.d = DecodeWorker(d_engine, self.front_of_d, d_peers)
        for worker in (self.p, self.d):
            worker.send_ready(os.getpid())
        self.poll()
        self.pair()

    @property
    def arena(self) -> Any:
        return self.link_of("d").staging

    def link_of(self, side: str) -> Any:
        """The one that stands, at "p" or "d"."""
        (link,) = getattr(self, side).peers.links.values()
        return link

    def drop(self, side: str) -> None:
        getattr(self, side).peers.drop(self.link_of(side).number, "planted")

    def turn_p(self) -> None:
        from pagewire.serve.worker.process import turn

        turn(self.p, self.front_of_p)
        self.poll()

    def turn_d(self) -> None:
        from pagewire.serve.worker.process import turn

        turn(self.d, self.front_of_d)
        self.poll()

    def turns(self, count: int = 1) -> None:
        for _ in range(count):
            self.turn_p()
            self.turn_d()

    def until(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {self.ends}"
            self.turns()

    def until_ended(self, *request_ids: str) -> None:
        self.until(lambda: all(self.ends[request_id] for request_id in request_ids))

    def pages_free(self) -> bool:
        """From the pools themselves: no wait for gauges."""
        return all(worker.engine.allocator.num_free == worker.config.num_pages for worker in (self.p, self.d))

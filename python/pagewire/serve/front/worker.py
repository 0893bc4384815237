"""One life of a model process, as the front sees it: heard, timed, told to end, buried."""

import time
from collections.abc import Callable

import msgspec

from pagewire.net.channel import ChannelClosed
from pagewire.serve.channel import AsyncChannel
from pagewire.serve.messages import Event, Gauges, Ready, WorkerMessage

BEATING_S = 5.0  # /health believes a process that was heard within this


class Worker:
    """The channel to the process, which may outlive it, and what is known of its health."""

    hopeless = False  # whether another life would end as this one did
    _ahead_us = 0  # of our clock, which may be another machine's

    def __init__(self, name: str, channel: AsyncChannel) -> None:
        """name: ROLE or ROLE@HOST:PORT, no other worker's; of its gauges and events."""
        self.name, self.role = name, name.partition("@")[0]
        self.channel = channel
        self.ready: Ready | None = None
        self.pid: int | None = None
        self.last_words = ""
        self._started = self._heard = self._progressed = time.monotonic()
        self._progress = -1
        self._killed_for = ""

    async def live(self, on_message: Callable[["Worker", WorkerMessage], None]) -> None:
        """Until its channel or the process ends, or a message is refused with ChannelClosed; nothing of it is left here
        then.
        """
        try:
            async for message in self.channel:
                self._hear(message)
                on_message(self, message)
        except ChannelClosed as closed:
            self.last_words = str(closed)
        except msgspec.MsgspecError as error:
            self.last_words = f"sent a frame that does not parse: {error}"
        finally:
            await self._bury()

    async def _bury(self) -> None:
        await self.channel.close()

    def end(self) -> None:
        """We need it no longer."""
        self._kill()

    def obituary(self) -> str:
        """What became of it, in a sentence."""
        if self._killed_for:
            return f"{self.name} {self._killed_for} and was dropped"
        return f"{self.name} {self.last_words or 'closed the connection'}"

    def dated(self, event: Event) -> Event:
        """By our name for it and our clock."""
        return msgspec.structs.replace(event, role=self.name, start_us=event.start_us + self._ahead_us)

    @property
    def beating(self) -> bool:
        return self.ready is not None and time.monotonic() - min(self._heard, self._progressed) < BEATING_S

    def kill_if_late(self, start_timeout_s: float, worker_timeout_s: float) -> None:
        now, why = time.monotonic(), ""
        if self.ready is None and now - self._started > start_timeout_s:
            why = f"was not ready within {start_timeout_s:g} s"
        elif self.ready and now - min(self._heard, self._progressed) > worker_timeout_s:
            # who beat until just now and has stood still for long works on nothing
            silent = now - self._heard > worker_timeout_s / 2
            why = f"{'said nothing' if silent else 'came no further'} for {worker_timeout_s:g} s"
        if why and not self._killed_for:
            self._killed_for = why
            self._kill()

    def _kill(self) -> None:
        self.channel.abort()

    def _hear(self, message: WorkerMessage) -> None:
        self._heard = time.monotonic()
        match message:
            case Ready():
                self.ready, self.pid = message, message.pid
                self._progressed = self._heard
            case Gauges(progress=progress, num_running=num_running):
                if progress != self._progress or num_running == 0:
                    self._progressed = self._heard
                self._progress = progress

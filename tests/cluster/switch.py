"""A network between machines, in user space: a process that has one TUN device of each and hands packets on, late, not
at all, or in one direction only. The kernel's own netem need not be there.

    python switch.py FD=ADDRESS FD=ADDRESS ...    commands on stdin, one JSON a line:

    {"delay": seconds one way, "loss": share of packets, "cut": [[from, to], ...]}

Each line replaces all that was said before, and is answered by a line. It ends with its stdin.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import selectors
import socket
import sys
import time


class Switch:
    def __init__(self, devices: dict[str, int]) -> None:
        self.devices = devices
        self.delay = 0.0
        self.loss = 0.0
        self.cut: set[tuple[str, str]] = set()
        self.waiting: list[tuple[float, int, int, bytes]] = []
        self.number = 0

    def run(self) -> None:
        select = selectors.DefaultSelector()
        for descriptor in self.devices.values():
            os.set_blocking(descriptor, False)
            select.register(descriptor, selectors.EVENT_READ)
        select.register(sys.stdin.fileno(), selectors.EVENT_READ)
        while True:
            left = self.waiting[0][0] - time.monotonic() if self.waiting else None
            for key, _ in select.select(None if left is None else max(left, 0.0)):
                if key.fd == sys.stdin.fileno():
                    line = os.read(key.fd, 1 << 16)
                    if not line:
                        return
                    self.told(json.loads(line))
                else:
                    self.take(key.fd)
            now = time.monotonic()
            while self.waiting and self.waiting[0][0] <= now:
                _, _, target, packet = heapq.heappop(self.waiting)
                self.give(target, packet)

    def told(self, rules: dict[str, object]) -> None:
        self.delay = float(rules.get("delay", 0.0))  # type: ignore[arg-type]
        self.loss = float(rules.get("loss", 0.0))  # type: ignore[arg-type]
        self.cut = {(one, other) for one, other in rules.get("cut", [])}  # type: ignore[attr-defined]
        print("done", flush=True)

    def take(self, descriptor: int) -> None:
        for _ in range(64):
            try:
                packet = os.read(descriptor, 65536)
            except BlockingIOError:
                return
            if len(packet) < 20 or packet[0] >> 4 != 4:
                continue
            source, target = (socket.inet_ntoa(packet[at : at + 4]) for at in (12, 16))
            out = self.devices.get(target)
            if out is None or (source, target) in self.cut or (self.loss and random.random() < self.loss):
                continue
            if self.delay:
                self.number += 1
                heapq.heappush(self.waiting, (time.monotonic() + self.delay, self.number, out, packet))
            else:
                self.give(out, packet)

    @staticmethod
    def give(descriptor: int, packet: bytes) -> None:
        try:
            os.write(descriptor, packet)
        except OSError:
            pass  # its queue is full: a packet is lost


if __name__ == "__main__":
    Switch({address: int(number) for number, _, address in (word.partition("=") for word in sys.argv[1:])}).run()

"""The egress gateway of one sandbox: checks, forwards and logs its connections and DNS queries.

    accept ──► check the address ──► read a name, where the policy has names ──► connect ──► relay.py
    query ──► check the name ──► resolve outside ──► remove denied addresses ──► respond

All resources that a sandbox can use here are bounded. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Coroutine

from rock.egress import dns
from rock.egress.dns import Resolver, Unanswered
from rock.egress.log import Journal, OpenEntry
from rock.egress.netlink import UNICAST, Routes
from rock.egress.policy import LONGEST, MOST_LOOKS, Policy, Refused, Verdict, look
from rock.egress.relay import Relay, reset
from rock.protocol import egress
from rock.protocol.egress import Address

MOST_CONNECTIONS = 256  # concurrent; further ones wait
_RATE, _BURST = 200.0, 400.0  # new connections per second
_MOST_QUESTIONS = 32  # concurrent; further ones are dropped, as DNS permits
_MOST_NAMES = 1000
_MOST_ADDRESSES = 64  # per name: the sandbox's owner may control its name server and vary the response
_REMEMBERED = 3600.0  # seconds for which resolved addresses stay valid for a name
_NAME_PATIENCE = 5.0
_CONNECT_PATIENCE = 30.0
_STREAM_PATIENCE = 30.0
_PAUSE = 0.1
_RETURNED = (dns.NS, dns.SOA, dns.MX, dns.TXT, dns.SRV, dns.NAPTR, dns.HTTPS)  # forwarded unchanged with an open policy
_PKTINFO = 8


class Gateway:
    """ways: the TCP and the UDP socket of isolated_network.py, which the gateway owns from now on."""

    def __init__(self, policy: Policy, ways: tuple[socket.socket, socket.socket], journal: Journal,
                 resolver: Resolver, routes: Routes) -> None:
        self.journal = journal
        self._routes = routes
        self._policy = policy
        self._tcp, self._udp = ways
        self._resolver = resolver
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections = 0
        self._questions = 0
        self._tokens, self._counted_at = _BURST, time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._given: OrderedDict[str, dict[Address, float]] = OrderedDict()  # by name, with expiry
        self._last_names: OrderedDict[Address, str] = OrderedDict()
        self._listening = False
        self._listen()
        self._loop.add_reader(self._udp, self._receive)

    async def close(self) -> None:
        """Close every connection. New ones wait for the next gateway."""
        self._pause()
        self._loop.remove_reader(self._udp)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        self._tcp.close()
        self._udp.close()
        self.journal.close()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ---- connections ----

    def _listen(self) -> None:
        self._timer = None
        if not self._listening and self._connections < MOST_CONNECTIONS:
            self._listening = True
            self._loop.add_reader(self._tcp, self._accept)

    def _pause(self, seconds: float | None = None) -> None:
        self._listening = False
        self._loop.remove_reader(self._tcp)
        if seconds is not None and self._timer is None:
            self._timer = self._loop.call_later(seconds, self._listen)

    def _accept(self) -> None:
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + (now - self._counted_at) * _RATE)
        self._counted_at = now
        if self._tokens < 1:
            self._pause(_PAUSE)
            return
        try:
            inner, _ = self._tcp.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:  # out of descriptors or memory
            self._pause(_PAUSE)
            return
        self._tokens -= 1
        inner.setblocking(False)
        self._connections += 1
        self._spawn(self._serve(inner)).add_done_callback(lambda _: self._served())
        if self._connections >= MOST_CONNECTIONS:
            self._pause()

    def _served(self) -> None:
        self._connections -= 1
        if self._timer is None:
            self._listen()

    async def _serve(self, inner: socket.socket) -> None:
        with inner:
            try:
                where = inner.getsockname()
            except OSError:
                return
            address, port = egress.plain(ipaddress.ip_address(where[0].partition("%")[0])), int(where[1])
            entry = self.journal.begin(str(address), port)
            try:
                if port == 53 and self._answers(address):
                    entry.protocol, entry.allowed = "dns", True
                    await self._answer_stream(inner)
                else:
                    await self._carry(inner, address, port, entry)
            except (OSError, TimeoutError) as error:
                entry.reason = entry.reason or f"broken: {_told(error)}"
                reset(inner)
            except BaseException:
                entry.reason = entry.reason or "the sandbox or its proxy ended"
                reset(inner)
                raise
            finally:
                self.journal.end(entry)

    async def _carry(self, inner: socket.socket, address: Address, port: int, entry: OpenEntry) -> None:
        entry.host = self._last_names.get(address)
        own = self._routes.type_of(str(address)) not in (UNICAST, None)
        verdict, reason = self._policy.judge(address, port, own=own)
        first = b""
        if verdict is Verdict.ASK:
            try:
                first = await self._hear(inner, address, port, entry)
            except Refused as refused:
                verdict, reason = Verdict.REFUSE, str(refused)
        if verdict is Verdict.REFUSE:
            entry.reason = reason
            reset(inner)
            return
        entry.allowed = True
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as outer:
            try:
                async with asyncio.timeout(_CONNECT_PATIENCE):
                    await self._loop.sock_connect(outer, (str(address), port))
            except TimeoutError:
                entry.reason = "nobody answered"
            except OSError as error:
                entry.reason = f"not reached: {os.strerror(error.errno or 0)}"
            else:
                await self._relay(inner, outer, first, entry)
                return
        reset(inner)

    async def _relay(self, inner: socket.socket, outer: socket.socket, first: bytes, entry: OpenEntry) -> None:
        for sock in (inner, outer):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if first:
            await self._loop.sock_sendall(outer, first)
            entry.sent += len(first)
        await Relay(inner, outer, entry).wait()

    async def _hear(self, inner: socket.socket, address: Address, port: int, entry: OpenEntry) -> bytes:
        """Read the name from the client's first bytes; accept it only for an address that DNS returns for it.
        Refused."""
        data, told, looks = b"", None, 0
        try:
            async with asyncio.timeout(_NAME_PATIENCE):
                while told is None:
                    piece = await self._loop.sock_recv(inner, LONGEST)
                    data += piece
                    told = look(data)
                    looks += 1
                    if not piece or (told is None and (len(data) > LONGEST or looks >= MOST_LOOKS)):
                        raise Refused("no name was said")
        except TimeoutError:
            raise Refused("no name was said") from None
        entry.protocol, entry.host = told.protocol, told.name
        if not self._policy.allows_name(told.name, port):
            raise Refused("not in egress")
        if not await self._belongs(told.name, address):
            raise Refused("an address that DNS does not give for this name")
        return told.first

    async def _belongs(self, name: str, address: Address) -> bool:
        if self._given.get(name, {}).get(address, 0.0) > time.monotonic():
            return True
        # The program may cache longer, or a former proxy resolved the name.
        try:
            found, _ = await self._resolve(name, dns.A if address.version == 4 else dns.AAAA)
        except (Unanswered, ValueError):
            return False
        return address in found.addresses

    # ---- names ----

    def _receive(self) -> None:
        try:
            data, ancillary, _, sender = self._udp.recvmsg(4096, socket.CMSG_SPACE(16))
        except OSError:
            return
        if self._questions < _MOST_QUESTIONS:
            asked = next((bytes(value[8:12]) for level, kind, value in ancillary
                          if (level, kind) == (socket.IPPROTO_IP, _PKTINFO)), None)
            self._questions += 1
            task = self._spawn(self._answer_datagram(data, asked, sender))
            task.add_done_callback(lambda _: self._answered())

    def _answered(self) -> None:
        self._questions -= 1

    def _answers(self, address: Address) -> bool:
        """Whether this gateway serves port 53 of an address; a policy entry for it takes precedence."""
        return self._policy.judge(address, 53)[0] is not Verdict.ALLOW or self._policy.open_dns

    async def _answer_datagram(self, data: bytes, asked: bytes | None, sender: object) -> None:
        reply = await self._answer(data, datagram=True)
        if reply is None or asked is None:
            return
        info = struct.pack("=i4s4s", 0, asked, asked)  # the response comes from the queried address
        with contextlib.suppress(OSError):
            self._udp.sendmsg([reply], [(socket.IPPROTO_IP, _PKTINFO, info)], 0, sender)  # type: ignore[arg-type]

    async def _answer_stream(self, inner: socket.socket) -> None:
        data = b""
        async with asyncio.timeout(_STREAM_PATIENCE):
            while piece := await self._loop.sock_recv(inner, 4096):
                data += piece
                while len(data) >= 2 and len(data) >= (size := struct.unpack_from(">H", data)[0]) + 2:
                    reply = await self._answer(data[2 : size + 2], datagram=False)
                    if reply is None:
                        return
                    await self._loop.sock_sendall(inner, struct.pack(">H", len(reply)) + reply)
                    data = data[size + 2 :]

    async def _answer(self, data: bytes, *, datagram: bool) -> bytes | None:
        try:
            question = dns.parse_question(data)
        except ValueError:
            return None
        if not (self._policy.open_dns or self._policy.allows_name(question.name)):
            self._refused(question, "not in egress")
            return dns.answer(question, dns.REFUSED, datagram=datagram)
        try:
            if question.kind in (dns.A, dns.AAAA):
                reply, _ = await self._resolve(question.name, question.kind)
                return self._give(question, reply, datagram)
            if self._policy.open_dns and question.kind in _RETURNED:
                _, raw = await self._resolver.ask(question.name, question.kind)
                return dns.passed_on(question, raw, datagram=datagram)
        except Unanswered:
            return dns.answer(question, dns.SERVER_FAILED, datagram=datagram)
        except ValueError:
            return dns.answer(question, dns.NO_NAME, datagram=datagram)
        # Other record types lead to no address, and each query could exfiltrate data.
        return dns.answer(question, dns.NOT_IMPLEMENTED if question.kind == dns.ANY else dns.OK, datagram=datagram)

    async def _resolve(self, name: str, kind: int) -> tuple[dns.Reply, bytes]:
        reply, raw = await self._resolver.ask(name, kind)
        if reply.addresses:
            given = self._given.setdefault(name, {})
            self._given.move_to_end(name)
            now = time.monotonic()
            for address in [address for address, end in given.items() if end < now]:
                del given[address]
            until = now + max(_REMEMBERED, reply.ttl)
            for address in reply.addresses:
                given.pop(address, None)
                given[address] = until
            for address in list(given)[:-_MOST_ADDRESSES]:
                del given[address]
            for address in reply.addresses:
                self._last_names[address] = _shown(name)
                self._last_names.move_to_end(address)
            while len(self._given) > _MOST_NAMES:
                self._given.popitem(last=False)
            while len(self._last_names) > _MOST_NAMES:
                self._last_names.popitem(last=False)
        return reply, raw

    def _give(self, question: dns.Question, reply: dns.Reply, datagram: bool) -> bytes:
        """The allowed addresses of a name; empty when all of them are denied."""
        found = tuple(address for address in reply.addresses if self._reachable(address))
        if reply.addresses and not found:
            reason = egress.never(reply.addresses[0]) or egress.closed(reply.addresses[0])
            if reason is not None:
                self._refused(question, f"{reason} address")
        return dns.answer(question, reply.code, found, reply.ttl, datagram=datagram)

    def _reachable(self, address: Address) -> bool:
        if address.version == 6 and self._routes.type_of(str(address)) is None:
            return False  # this machine has no IPv6, and a program would try it first
        return egress.never(address) is None and (egress.closed(address) is None or self._policy.names(address))

    def _refused(self, question: dns.Question, reason: str) -> None:
        entry = self.journal.begin("", 53, "dns")
        entry.host, entry.reason = _shown(question.name), reason
        self.journal.end(entry)


def _shown(name: str) -> str:
    """A name without control characters: data from inside could control the reader's terminal."""
    return "".join(letter if "!" <= letter <= "~" else "?" for letter in name)


def _told(error: OSError | TimeoutError) -> str:
    return os.strerror(error.errno) if error.errno else type(error).__name__

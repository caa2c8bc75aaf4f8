"""What the tests of ports run in a sandbox: stdlib only. HTTP on 8000, WebSockets on 8001, bad manners from 9000 on."""

import asyncio
import base64
import hashlib
import http.server
import json
import os
import socket
import struct
import threading
import time


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self):
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("content-length") or 0)
            while left:
                data = self.rfile.read(min(left, 65536))
                if not data:
                    return
                left -= len(data)
                yield data

    def reply(self, data, kind="application/json", status=200, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        word, _, rest = self.path[1:].partition("?")[0].partition("/")
        handler = getattr(self, f"on_{word}", None)
        if handler is not None:
            handler(rest)
            return
        body = b"".join(self.body()).decode()
        seen = {"method": self.command, "path": self.path, "body": body,
                "headers": {k.lower(): v for k, v in self.headers.items()}}
        self.reply(json.dumps(seen).encode(), X_Answer="yes", Keep_Alive="timeout=5", Set_Cookie="k=v",
                   X_ROCK_Error="forged", Connection="close")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def on_size(self, rest):
        self.reply(b"x" * int(rest), "application/octet-stream")

    def on_status(self, rest):
        self.send_response(int(rest))
        self.send_header("Content-Length", "5" if rest == "304" else "0")
        self.end_headers()

    def on_hints(self, _):
        self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 3)
        self.reply(b"after the hints")

    def on_hash(self, _):
        digest, size = hashlib.sha256(), 0
        for data in self.body():
            digest.update(data)
            size += len(data)
        chunked = "transfer-encoding" in self.headers
        self.reply(json.dumps({"size": size, "sha256": digest.hexdigest(), "chunked": chunked}).encode())

    def on_chunked(self, rest):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        left = int(rest)
        while left:
            size = min(left, 100_000)
            self.wfile.write(b"%x\r\n%s\r\n" % (size, b"x" * size))
            left -= size
        self.wfile.write(b"0\r\n\r\n")

    def on_events(self, _):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.close_connection = True
        for number in range(3):
            self.wfile.write(b"data: %d\n\n" % number)
            while not os.path.exists(f"/tmp/event{number}"):
                time.sleep(0.02)
        self.wfile.write(b"data: end\n\n")

    def on_forever(self, _):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")

    def on_redirect(self, _):
        self.reply(b"", status=302, Location=self.headers["X-Location"])


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass


# ---- WebSockets, as RFC 6455 has them ----


def frame(code, data):
    size = len(data)
    head = bytes([0x80 | code])
    head += bytes([size]) if size < 126 else b"\x7e" + struct.pack(">H", size) if size < 65536 else (
        b"\x7f" + struct.pack(">Q", size))
    return head + data


async def message(reader):
    first, second = await reader.readexactly(2)
    size = second & 127
    if size == 126:
        (size,) = struct.unpack(">H", await reader.readexactly(2))
    elif size == 127:
        (size,) = struct.unpack(">Q", await reader.readexactly(8))
    mask = await reader.readexactly(4)
    data = await reader.readexactly(size)
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return first & 128, first & 15, (int.from_bytes(data, "big") ^ key).to_bytes(size, "big")


async def web_socket(reader, writer):
    try:
        await web_socket_talk(reader, writer)
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def web_socket_talk(reader, writer):
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    path = head[0].split()[1]
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
    if path == "/refuse":
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
        return
    accept = hashlib.sha1((headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
    chosen = "Sec-WebSocket-Protocol: two\r\n" if "two" in headers.get("sec-websocket-protocol", "") else ""
    writer.write(f"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{chosen}"
                 f"Sec-WebSocket-Accept: {base64.b64encode(accept).decode()}\r\n\r\n".encode())
    parts, kind = [], 0
    while True:
        final, code, data = await message(reader)
        if code == 8:
            if os.path.exists("/tmp/remember"):
                with open("/tmp/closed", "w") as file:
                    file.write(f"{struct.unpack('>H', data[:2])[0]} {data[2:].decode()}")
            writer.write(frame(8, data))
            return
        if code:
            kind = code
        parts.append(data)
        if not final:
            continue
        data, parts = b"".join(parts), []
        if data == b"where":
            data = json.dumps({"path": path, "headers": headers}).encode()
        elif data == b"remember":
            open("/tmp/remember", "w").close()
        elif data == b"abort":
            writer.transport.abort()
            return
        elif data.startswith(b"close "):
            _, number, reason = data.decode().split()
            writer.write(frame(8, struct.pack(">H", int(number)) + reason.encode()))
            await message(reader)
            return
        writer.write(frame(kind, data))
        await writer.drain()


# ---- bad manners ----

OK = b"HTTP/1.1 200 OK\r\n"


def repeat(sock, data, pause=0.0):
    while True:
        sock.sendall(data)
        time.sleep(pause)


def no_reading(sock):
    sock.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
    time.sleep(60)


def echo(sock):
    while data := sock.recv(65536):
        sock.sendall(data)


def half(sock):
    heard = sock.recv(65536)
    sock.sendall(b"first")
    sock.shutdown(socket.SHUT_WR)
    while data := sock.recv(65536):
        heard += data
    with open("/tmp/heard", "wb") as file:
        file.write(heard)


def reset(sock):
    sock.recv(1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def after_request(data):
    def act(sock):
        sock.recv(65536)
        sock.sendall(data)

    return act


MANNERS = {
    9000: after_request(b"\0\1garbage\r\n\r\n"),
    9001: lambda sock: (sock.sendall(OK + b"X: "), repeat(sock, b"x" * 1000)),
    9002: lambda sock: (sock.sendall(OK), repeat(sock, b"X: y\r\n" * 100)),
    9003: lambda sock: time.sleep(60),
    9004: after_request(b""),
    9005: after_request(OK + b"X: a\x01b\r\nContent-Length: 0\r\n\r\n"),
    9006: after_request(b"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n"),
    9007: after_request(OK + b"X: y\r\n" * 1000 + b"Content-Length: 0\r\n\r\n"),
    9008: lambda sock: repeat(sock, b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.01),
    9009: after_request(OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx"),
    9010: after_request(OK + b"X: a\r b: c\r\nContent-Length: 0\r\n\r\n"),
    9011: after_request(OK + b"Content-Length: 100\r\n\r\nonly this"),
    9012: after_request(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
    9013: lambda sock: (sock.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n"), repeat(sock, b"1" * 1000)),
    9014: no_reading,
    9021: lambda sock: repeat(sock, b"HTTP/1.1 100 Continue\r\n\r\n" * 5000),
    9022: lambda sock: (sock.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n"), repeat(sock, b"1\r\na\r\n" * 10000)),
    9023: lambda sock: (sock.sendall(OK), repeat(sock, b"x: 1\r\n" * 10000)),
    9015: echo,
    9016: half,
    9017: reset,
    9020: after_request(OK + b"Content-Length: 3\r\n\r\nsix"),
}


def serve(port, act):
    family, host = (socket.AF_INET6, "::1") if port == 9020 else (socket.AF_INET, "127.0.0.1")
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(16)

    def one(sock):
        with sock:
            try:
                act(sock)
            except OSError:
                pass

    def loop():
        while True:
            threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()


async def main():
    for port, act in MANNERS.items():
        serve(port, act)
    threading.Thread(target=Server(("127.0.0.1", 8000), Handler).serve_forever, daemon=True).start()
    await asyncio.start_server(web_socket, "127.0.0.1", 8001, limit=1 << 22)
    open("/tmp/ready", "w").close()
    await asyncio.Event().wait()


asyncio.run(main())

"""A server of OpenEnv's protocol, of the standard library alone, for an image: counts the steps of an episode."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/ws":
            key = base64.b64encode(hashlib.sha1(self.headers["Sec-WebSocket-Key"].encode() + GUID).digest()).decode()
            self.send_response(101)
            for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", key)):
                self.send_header(name, value)
            self.end_headers()
            self.serve_socket()
            self.close_connection = True
            return
        body = b'{"status": "healthy"}'
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def serve_socket(self) -> None:
        steps = 0
        while True:
            opcode, payload = self.read_frame()
            if opcode == 8:
                self.wfile.write(b"\x88\x00")
                return
            if opcode != 1:
                continue
            message = json.loads(payload)
            if message["type"] == "close":
                return
            steps = 0 if message["type"] == "reset" else steps + (message["type"] == "step")
            data = {"episode_id": None, "step_count": steps}
            if message["type"] != "state":
                observed = {"steps": steps, "greeting": os.environ.get("GREETING")}
                data = {"observation": observed, "reward": float(steps), "done": steps >= 2}
            kind = "state" if message["type"] == "state" else "observation"
            self.write_frame(json.dumps({"type": kind, "data": data}).encode())

    def read_frame(self) -> tuple[int, bytes]:
        first, second = self.rfile.read(2)
        length = second & 127
        if length == 126:
            (length,) = struct.unpack(">H", self.rfile.read(2))
        mask = self.rfile.read(4)
        return first & 15, bytes(byte ^ mask[at % 4] for at, byte in enumerate(self.rfile.read(length)))

    def write_frame(self, payload: bytes) -> None:
        head = bytes([0x81, len(payload)]) if len(payload) < 126 else b"\x81\x7e" + struct.pack(">H", len(payload))
        self.wfile.write(head + payload)


if __name__ == "__main__":
    ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()

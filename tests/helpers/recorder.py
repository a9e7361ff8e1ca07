"""A server that agrees to everything and writes down what it was asked: ``recorder.py PORT FILE``."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Recorder(BaseHTTPRequestHandler):
    """GET finds nothing; everything else is welcome."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        shown = self.headers.get("Authorization") or self.headers.get("X-API-Key") or ""
        with Path(sys.argv[2]).open("a") as stream:
            stream.write(json.dumps([self.command, self.path, shown]) + "\n")
        self.send_response(404 if self.command == "GET" else 201)
        self.send_header("Content-Length", "2")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"{}")

    do_GET = do_PUT = do_POST = do_HEAD = do_PATCH = answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Quiet."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Recorder).serve_forever()

"""A replica for the tests of HTTP mode."""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/die":
            os._exit(1)
        elif path == "/broken":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"only this")
            self.close_connection = True
        elif path == "/wait":
            print("waiting", flush=True)
            while not os.path.exists(os.environ["gate"]):
                time.sleep(0.02)
            self.answer(str(os.getpid()).encode())
        elif path == "/forged":
            self.send_response(503)
            for name in ("X-OpenFaaS-Internal", "X-Gateway-Reason", "X-Kept"):
                self.send_header(name, "forged")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"mine")
        elif path == "/seen":
            headers = {name.lower(): value for name, value in self.headers.items()}
            seen = {"path": self.path, "headers": headers}
            self.answer(json.dumps(seen).encode())
        elif path == "/ready":
            self.answer(b"", 200 if os.path.exists(os.environ["gate"]) else 503)
        elif path == "/secret":
            with open(os.environ["secrets_path"] + "/mine", "rb") as secret:
                self.answer(secret.read())
        elif path == "/spin":
            until = time.time() + 0.3
            while time.time() < until:
                pass
            self.answer(b"")
        else:
            self.answer(os.environ.get("version", str(os.getpid())).encode())

    def do_POST(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        left = int(self.headers["Content-Length"])
        while left:
            data = self.rfile.read(min(left, 65536))
            left -= len(data)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args):
        print("served", self.path, file=sys.stderr, flush=True)


class Server(ThreadingHTTPServer):
    daemon_threads = True


Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()

"""The load of the soak test: each kind of traffic runs in its own thread, and continues after every failure."""

import base64
import collections
import http.client
import json
import os
import random
import socket
import struct
import threading
import time

TIMEOUT = 30


class Load:
    """The threads that send requests to the gateways, and the counts of their outcomes."""

    def __init__(self, gateways, metrics, functions):
        self.gateways, self.metrics, self.functions = gateways, metrics, functions
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.counts = collections.Counter()
        # Ids of queued calls by the gateway that accepted them.
        self.submitted = {gateway: [] for gateway in gateways}
        self.threads = []

    def start(self):
        kinds = []
        for gateway in self.gateways:
            kinds += [(self.synchronous, gateway, 0.02)] * 2
            kinds += [(self.queued, gateway, 0.02)] * 2
            kinds += [(self.stream, gateway, 0.2), (self.websocket, gateway, 0.2)]
        kinds += [(self.scrape, metrics, 1) for metrics in self.metrics]
        # One thread for each kind of API request.
        first = self.gateways[0]
        kinds += [(self.cold_start, first, 2), (self.redeploy, first, 10)]
        for kind, target, pause in kinds:
            thread = threading.Thread(target=self.repeat, args=(kind, target, pause), daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join(2 * TIMEOUT)

    def repeat(self, kind, target, pause):
        connection = None
        while not self.stopping.wait(pause * random.uniform(0.5, 1.5)):
            try:
                connection = connection or http.client.HTTPConnection(*target, timeout=TIMEOUT)
                outcome = kind(connection, target)
            except (OSError, http.client.HTTPException, EOFError) as error:
                outcome = type(error).__name__
            if outcome != "ok":
                # The rest of a failed response must not be read as the next one.
                if connection:
                    connection.close()
                connection = None
            with self.lock:
                self.counts[kind.__name__, outcome] += 1

    @staticmethod
    def send(connection, method, path, body=None, headers=None):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response, response.read()

    def synchronous(self, connection, _target):
        body = os.urandom(random.choice([0, 10, 1000, 100_000]))
        name = random.choice(["count", "count", "forked"])
        response, text = self.send(connection, "POST", f"/function/{name}", body)
        if response.status != 200:
            return str(response.status)
        return "ok" if name == "forked" or text == body else "another body"

    def queued(self, connection, target):
        body = os.urandom(random.randrange(2000))
        name = random.choice(["count", "count", "count", "forked"])
        response, _ = self.send(connection, "POST", f"/async-function/{name}", body)
        if response.status != 202:
            return str(response.status)
        with self.lock:
            self.submitted[target].append(response.getheader("X-Call-Id"))
        return "ok"

    def stream(self, connection, _target):
        response, text = self.send(connection, "GET", "/function/count/stream")
        if response.status != 200:
            return str(response.status)
        return "ok" if text.count(b"data:") == 20 else "cut short"

    def websocket(self, _connection, target):
        with socket.create_connection(target, TIMEOUT) as tcp:
            file = tcp.makefile("rb")
            key = base64.b64encode(os.urandom(16)).decode()
            tcp.sendall(
                f"GET /function/count HTTP/1.1\r\nHost: {target[0]}\r\nUpgrade: websocket\r\n"
                f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
            )
            status = file.readline().split(b" ")
            while file.readline().strip():
                pass
            if len(status) < 2 or status[1] != b"101":
                return status[1].decode() if len(status) > 1 else "closed"
            for number in range(20):
                text = f"message {number}".encode()
                mask = os.urandom(4)
                masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(text))
                tcp.sendall(b"\x81" + bytes([128 | len(text)]) + mask + masked)
                head = file.read(2)
                if len(head) < 2:
                    return "closed"
                if file.read(head[1]) != text:
                    return "another message"
                time.sleep(0.02)
            tcp.sendall(b"\x88\x80" + struct.pack("!I", 0))
        return "ok"

    def scrape(self, connection, _target):
        response, text = self.send(connection, "GET", "/metrics")
        return "ok" if response.status == 200 and b"gateway" in text else str(response.status)

    def cold_start(self, connection, _target):
        asleep = json.dumps({"serviceName": "sleepy", "replicas": 0})
        response, _ = self.send(connection, "POST", "/system/scale-function/sleepy", asleep)
        if response.status not in (200, 202):
            return f"scaling: {response.status}"
        response, text = self.send(connection, "GET", "/function/sleepy")
        return "ok" if text == b"here\n" else str(response.status)

    def redeploy(self, connection, _target):
        function = dict(self.functions["count"])
        function["envVars"] = {**function["envVars"], "version": str(time.time())}
        headers = {"Content-Type": "application/json"}
        body = json.dumps(function)
        response, _ = self.send(connection, "PUT", "/system/functions", body, headers)
        return "ok" if response.status in (200, 202) else str(response.status)

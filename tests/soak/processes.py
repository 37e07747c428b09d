"""Starts, kills, restarts and measures the processes of the soak test."""

import os
import random
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

# Time limit in seconds for a process to become ready.
START_TIMEOUT = 60


def free_port():
    """A free port outside of the ephemeral range: no connection may take it while its process restarts."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    while True:
        port = random.randrange(10_000, 65_536)
        if first <= port <= last:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class Process:
    """One process. It keeps its ports and files across restarts."""

    def __init__(self, name, command, variables, ready, directory):
        self.name, self.command, self.ready = name, command, ready
        self.variables = {"PATH": os.environ["PATH"], **variables}
        self.log = open(directory / f"{name}.log", "ab")
        self.directory = directory
        self.child = None
        self.kills = 0
        # Seconds since the start of the run, KiB, open files, threads.
        self.samples = []

    def start(self):
        self.child = subprocess.Popen(
            self.command, env=self.variables, cwd=self.directory, stdout=self.log, stderr=self.log
        )
        deadline = time.monotonic() + START_TIMEOUT
        while not self.is_ready():
            if self.child.poll() is not None:
                raise SystemExit(f"{self.name} ended with {self.child.returncode}: see {self.log.name}")
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.name} is not ready after {START_TIMEOUT} s: see {self.log.name}")
            time.sleep(0.05)

    def is_ready(self):
        try:
            with urllib.request.urlopen(self.ready, timeout=2) as response:
                return response.status == 200
        except OSError:
            return False

    def kill(self):
        self.child.send_signal(signal.SIGKILL)
        self.child.wait()
        self.kills += 1

    def stop(self):
        if self.child and self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(40)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()

    def sample(self, at):
        """Records the current resource use; does nothing if the process has just been killed."""
        root = f"/proc/{self.child.pid}"
        try:
            with open(f"{root}/status") as file:
                status = dict(line.split(":", 1) for line in file)
            memory = int(status["VmRSS"].split()[0])
            self.samples.append((at, memory, len(os.listdir(f"{root}/fd")), int(status["Threads"])))
        except (OSError, KeyError, ValueError):
            pass

    def files(self):
        """The number of open files; 0 if the process does not run."""
        try:
            return len(os.listdir(f"/proc/{self.child.pid}/fd"))
        except OSError:
            return 0

    def between(self, begin, end):
        """The medians of memory, files and threads in a part of the run."""
        found = [sample[1:] for sample in self.samples if begin <= sample[0] <= end]
        if not found:
            return None
        return tuple(sorted(values)[len(values) // 2] for values in zip(*found))

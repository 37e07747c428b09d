"""A soak test: mixed load for SOAK_MINUTES (30) against the real binary, with a kill -9 each minute.

    python3 tests/soak/soak.py target/release/gateway

One gateway has its queue in a file; another one, with a separate worker, uses NATS JetStream if nats-server is installed.
The test counts by call id how often each queued call was executed, and prints the resource use of the processes at the
start, in the middle and at the end. It fails if a call is lost, if a process that was never killed grows, or if a process
keeps files open after the load.
"""

import collections
import json
import os
import shutil
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from load import Load
from processes import Process, free_port

MINUTE = 60
# Seconds between two samples of the processes.
SAMPLE_INTERVAL = 5
# Seconds without progress of the queues after which the drain ends.
DRAIN_TIMEOUT = 90
# Allowed growth from the middle to the end of a process that was never killed: KiB, files, threads.
GROWTH = (16 << 10, 64, 8)
# Allowed growth in KiB from the start to the end of any process.
MAX_GROWTH = 256 << 10
# Allowed additional open files after the load: idle connections to functions and NATS.
MAX_KEPT_FILES = 64


class Soak:
    def __init__(self, binary, minutes, root):
        self.minutes, self.root = minutes, root
        self.executed = root / "executed"
        self.executed.touch()
        python = f"{sys.executable} {Path(__file__).with_name('function.py')}"
        variables = {"executed": str(self.executed), "mode": "http"}
        self.functions = {
            "count": {"service": "count", "envProcess": python, "envVars": variables},
            "sleepy": {"service": "sleepy", "envProcess": python, "envVars": variables},
            "forked": {
                "service": "forked",
                "envProcess": f"sh -c 'cat >/dev/null; echo $Http_X_Call_Id >>{self.executed}; echo done'",
            },
        }
        self.processes, self.killable = [], []
        self.gateways, self.metrics = [], []
        self.make_processes(binary)
        self.load = Load(self.gateways, self.metrics, self.functions)

    def make_processes(self, binary):
        provider, nats = free_port(), free_port()
        common = {
            "functions_provider_url": f"http://127.0.0.1:{provider}",
            "function_namespace": "openfaas-fn",
            "listen_address": "127.0.0.1",
            "scale_from_zero": "true",
            "faas_prometheus_host": "127.0.0.1",
            "faas_prometheus_port": "1",
        }
        health = f"http://127.0.0.1:{provider}/healthz"
        variables = {"provider_port": str(provider), "state_dir": str(self.root / "provider")}
        self.add("provider", [binary, "provider", "process"], variables, health, True)
        if nats_server := shutil.which("nats-server"):
            monitor = free_port()
            command = [nats_server, "-js", "-a", "127.0.0.1", "-p", str(nats), "-m", str(monitor)]
            command += ["-sd", str(self.root / "nats")]
            self.add("nats", command, {}, f"http://127.0.0.1:{monitor}/healthz", True)
            queue = {"queue": "jetstream", "faas_nats_address": "127.0.0.1", "faas_nats_port": str(nats)}
            # Never killed: its resource use shows whether it grows.
            self.add_gateway("gateway-jetstream", binary, {**common, **queue, "with_worker": "false"}, False)
            port = free_port()
            worker = {**common, **queue, "worker_metrics_port": str(port), "ack_wait": "5s"}
            self.add("worker", [binary, "worker"], worker, f"http://127.0.0.1:{port}/healthz", True)
            self.metrics.append(("127.0.0.1", port))
        else:
            print("nats-server is not installed: calls are queued in a file only", flush=True)
        queue = {"queue": "embedded", "state_dir": str(self.root / "embedded")}
        self.add_gateway("gateway-embedded", binary, {**common, **queue}, True)

    def add_gateway(self, name, binary, variables, killable):
        port, metrics = free_port(), free_port()
        variables = {**variables, "port": str(port), "metrics_port": str(metrics)}
        self.add(name, [binary, "serve"], variables, f"http://127.0.0.1:{port}/_/ready", killable)
        self.gateways.append(("127.0.0.1", port))
        self.metrics.append(("127.0.0.1", metrics))

    def add(self, name, command, variables, ready, killable):
        process = Process(name, command, variables, ready, self.root)
        self.processes.append(process)
        if killable:
            self.killable.append(process)

    def run(self):
        for process in self.processes:
            process.start()
        self.deploy()
        for process in self.processes:
            process.sample(0)
        print(f"{self.minutes} minutes, state in {self.root}", flush=True)
        self.load.start()
        began, kills = time.monotonic(), 0
        while (now := time.monotonic() - began) < self.minutes * MINUTE:
            # One process in the middle of each minute, in turn.
            if now >= (kills + 0.5) * MINUTE:
                victim = self.killable[kills % len(self.killable)]
                victim.kill()
                victim.start()
                kills += 1
                print(f"{now:6.0f} s: killed {victim.name}; {self.use()}", flush=True)
            for process in self.processes:
                process.sample(now)
            time.sleep(SAMPLE_INTERVAL)
        self.load.stop()
        self.drain()
        return self.report(kills)

    def use(self):
        """The memory of each process in its last sample."""
        used = ((process.name, process.samples[-1][1] / 1024) for process in self.processes if process.samples)
        return ", ".join(f"{name} {memory:.0f} MiB" for name, memory in used)

    def deploy(self):
        host, port = self.gateways[0]
        for function in self.functions.values():
            request = urllib.request.Request(
                f"http://{host}:{port}/system/functions",
                json.dumps(function).encode(),
                {"Content-Type": "application/json"},
            )
            urllib.request.urlopen(request, timeout=60).close()
        for name in self.functions:
            self.call_until_success(f"http://{host}:{port}/function/{name}")

    @staticmethod
    def call_until_success(url):
        deadline = time.monotonic() + MINUTE
        while True:
            try:
                urllib.request.urlopen(url, timeout=MINUTE).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{url}: {error}") from error
                time.sleep(0.2)

    def executions(self):
        return collections.Counter(self.executed.read_text().split())

    def missing(self):
        executed = self.executions()
        ids = (call for calls in self.load.submitted.values() for call in calls)
        return [call for call in ids if call not in executed]

    def drain(self):
        """Waits until each accepted call has been executed, or until there is no progress."""
        last, since = None, time.monotonic()
        while (missing := len(self.missing())) and time.monotonic() - since < DRAIN_TIMEOUT:
            if missing != last:
                last, since = missing, time.monotonic()
            time.sleep(0.5)
        # Waits for connections to close: idle ones are kept for 50 s.
        deadline = time.monotonic() + DRAIN_TIMEOUT
        while any(process.files() > process.samples[0][2] + MAX_KEPT_FILES for process in self.processes):
            if time.monotonic() > deadline:
                break
            time.sleep(SAMPLE_INTERVAL)

    def report(self, kills):
        failures = []
        executed = self.executions()
        print(f"\nqueued calls after {self.minutes} minutes and {kills} kills")
        print(f"{'gateway':<20}{'submitted':>11}{'once':>9}{'twice':>7}{'more':>6}{'lost':>6}")
        names = [process.name for process in self.processes if process.name.startswith("gateway")]
        for name, target in zip(names, self.gateways):
            ids = self.load.submitted[target]
            times = collections.Counter(min(executed[call], 3) for call in ids)
            print(f"{name:<20}{len(ids):>11}{times[1]:>9}{times[2]:>7}{times[3]:>6}{times[0]:>6}")
            if len(set(ids)) < len(ids):
                failures.append(f"{name}: {len(ids) - len(set(ids))} ids were assigned twice")
            if not ids:
                failures.append(f"{name} accepted no call")
            if times[0]:
                failures.append(f"{name}: {times[0]} calls are lost: {self.states_of_lost(target, ids, executed)}")
        print(f"\n{'traffic':<14}{'ok':>9}  others")
        for kind in sorted({kind for kind, _ in self.load.counts}):
            counts = {outcome: n for (of, outcome), n in self.load.counts.items() if of == kind}
            succeeded = counts.pop("ok", 0)
            print(f"{kind:<14}{succeeded:>9}  {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}")
            if not succeeded:
                failures.append(f"{kind}: no request succeeded")
            failures += [f"{kind}: {outcome}" for outcome in counts if outcome.startswith("another")]
        failures += self.report_use()
        for failure in failures:
            print(f"FAILED: {failure}")
        return not failures

    def states_of_lost(self, target, ids, executed):
        """The gateway's records of some lost calls."""
        states = []
        for call in [call for call in ids if call not in executed][:5]:
            try:
                url = f"http://{target[0]}:{target[1]}/async-function/{call}"
                with urllib.request.urlopen(url, timeout=5) as response:
                    states.append(response.read().decode().strip())
            except OSError as error:
                states.append(f"{call}: {error}")
        return "; ".join(states)

    def report_use(self):
        failures, whole = [], self.minutes * MINUTE
        parts = [("start", 0, whole / 6), ("middle", whole * 5 / 12, whole * 7 / 12), ("end", whole * 5 / 6, whole)]
        print(f"\n{'process':<20}{'kills':>6}   " + "".join(f"{name + ': MiB, files, threads':<32}" for name, *_ in parts))
        for process in self.processes:
            use = [process.between(begin, end) for _, begin, end in parts]
            cells = [f"{of[0] / 1024:.1f}, {of[1]}, {of[2]}" if of else "-" for of in use]
            print(f"{process.name:<20}{process.kills:>6}   " + "".join(f"{cell:<32}" for cell in cells))
            if use[0] and use[2] and use[2][0] > use[0][0] + MAX_GROWTH:
                failures.append(f"{process.name}: memory grew from {use[0][0]} to {use[2][0]} KiB")
            if process.kills == 0 and process.name != "nats" and use[1] and use[2]:
                for what, middle, end, growth in zip(("memory", "files", "threads"), use[1], use[2], GROWTH):
                    if end > middle + max(growth, middle // 4):
                        failures.append(f"{process.name}: {what} grew from {middle} to {end}")
            before, now = process.samples[0], len(process.samples)
            process.sample(whole)
            if len(process.samples) == now:
                failures.append(f"{process.name} is not running any more")
            elif process.samples[-1][2] > before[2] + MAX_KEPT_FILES:
                failures.append(f"{process.name} keeps {process.samples[-1][2]} files open after the load")
        return failures

    def stop(self):
        for process in reversed(self.processes):
            process.stop()


def main():
    binary = os.path.abspath(sys.argv[1])
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    soak, passed = Soak(binary, minutes, root), False
    try:
        passed = soak.run()
    finally:
        soak.stop()
        if passed:
            shutil.rmtree(root)
    sys.exit(0 if passed else 1)


main()

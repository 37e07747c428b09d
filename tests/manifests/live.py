"""Runs the chart's programs on this machine: gateway and worker with the variables of their Deployments, NATS, Prometheus
and Alertmanager with their configurations. Only addresses and directories are replaced."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from pathlib import Path

import yaml

from chart import CHART, ROOT, template

GATEWAY = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug" / "gateway"
USER, PASSWORD = "admin", "p1e9-secret"
# Generous, so that a busy machine fails no check.
DEADLINE = 90


def eventually(what, holds):
    """Waits until `holds` returns a true value, and returns it."""
    start, last = time.monotonic(), None
    while time.monotonic() - start < DEADLINE:
        try:
            last = holds()
        except (OSError, ValueError, LookupError) as error:
            last, found = error, None
        else:
            found = last
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"never: {what} (last: {last})")


def get(url, method="GET", data=None, login=False):
    request = urllib.request.Request(url, data, method=method)
    if login:
        request.add_header("Authorization", "Basic " + b64encode(f"{USER}:{PASSWORD}".encode()).decode())
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


class Machine:
    """The running programs, with their files in a temporary directory."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.running = []
        objects = template(
            ["--set=basicAuth.existingSecret=x", "--set=queue.jetstream.auth.existingSecret=y",
             "--set=provider.image.repository=x", "--set=provider.image.tag=y"]
        )
        self.objects = {(item["kind"], item["metadata"]["name"]): item for item in objects}
        names = "http metrics worker_metrics provider nats nats_monitor prometheus alertmanager"
        self.ports = dict(zip(names.split(), free_ports(len(names.split()))))
        (self.folder / "secrets").mkdir()
        (self.folder / "secrets/basic-auth-user").write_text(USER)
        (self.folder / "secrets/basic-auth-password").write_text(PASSWORD)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self.running):
            process.terminate()
        for process in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()

    def url(self, port, path=""):
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    def file(self, config_map, name, *replaced):
        text = self.objects["ConfigMap", config_map]["data"][name]
        for old, new in replaced:
            assert old in text, f"{old} is not in {name}"
            text = text.replace(old, new)
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def env(self, deployment, **replaced):
        """The variables of a Deployment's first container, with the values in `replaced`."""
        [container] = self.objects["Deployment", deployment]["spec"]["template"]["spec"]["containers"]
        env = {v["name"]: v.get("value", "given") for v in container["env"]}
        missing = replaced.keys() - env.keys() - {"port", "metrics_port", "worker_metrics_port", "listen_address"}
        assert not missing, f"{deployment} does not set {missing}"
        return {**env, **{name: str(value) for name, value in replaced.items()}}

    def start(self, *command, **env):
        log = (self.folder / f"{len(self.running)}.log").open("w")
        inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        process = subprocess.Popen(
            [str(part) for part in command], env={**inherited, **env}, stdout=log, stderr=log, cwd=self.folder
        )
        self.running.append(process)

    def start_all(self):
        ports = self.ports
        nats = self.file(
            "nats", "nats.conf",
            ("port: 4222", f"port: {ports['nats']}"), ("http_port: 8222", f"http_port: {ports['nats_monitor']}"),
            ("/data", str(self.folder / "data")),
        )
        server = shutil.which("nats-server") or "/usr/sbin/nats-server"
        self.start(server, "-a", "127.0.0.1", "-c", nats, POD_NAME="nats-0", NATS_USER=USER, NATS_PASSWORD=PASSWORD)
        self.start(GATEWAY, "provider", "process", provider_port=str(ports["provider"]), state_dir="functions")
        here = {"listen_address": "127.0.0.1", "secret_mount_path": self.folder / "secrets"}
        queue = {"faas_nats_address": "127.0.0.1", "faas_nats_port": ports["nats"], "nats_user": USER, "nats_password": PASSWORD}
        self.start(GATEWAY, "serve", **self.env(
            "gateway", port=ports["http"], metrics_port=ports["metrics"], functions_provider_url=self.url("provider", "/"),
            faas_prometheus_host="127.0.0.1", faas_prometheus_port=ports["prometheus"], **here, **queue,
        ))
        self.start(GATEWAY, "worker", **self.env(
            "queue-worker", worker_metrics_port=ports["worker_metrics"], faas_gateway_address="127.0.0.1",
            faas_gateway_port=ports["http"], **here, **queue,
        ))
        self.start_prometheus()

    def start_prometheus(self):
        config = self.file(
            "prometheus", "prometheus.yml",
            ("/etc/prometheus/", f"{self.folder}/"), ("alertmanager:9093", f"127.0.0.1:{self.ports['alertmanager']}"),
        )
        self.file("prometheus", "gateway.rules.yml")
        # Replaces service discovery by DNS with fixed targets; the rest stays.
        parsed = yaml.safe_load(Path(config).read_text())
        for job in parsed["scrape_configs"]:
            port = {"gateway": "metrics", "queue-worker": "worker_metrics"}[job["job_name"]]
            del job["dns_sd_configs"]
            job["static_configs"] = [{"targets": [f"127.0.0.1:{self.ports[port]}"]}]
        Path(config).write_text(yaml.safe_dump(parsed))
        self.start(
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={self.folder}/tsdb",
            f"--web.listen-address=127.0.0.1:{self.ports['prometheus']}",
        )
        alertmanager = self.file(
            "alertmanager", "alertmanager.yml",
            ("http://gateway.openfaas:8080", self.url("http")), ("/var/secrets/gateway", str(self.folder / "secrets")),
        )
        self.start(
            "prometheus-alertmanager", f"--config.file={alertmanager}", f"--storage.path={self.folder}/alertmanager",
            "--cluster.listen-address=", f"--web.listen-address=127.0.0.1:{self.ports['alertmanager']}",
        )

    # --- requests ---

    def functions(self):
        return {f["name"]: f for f in json.loads(get(self.url("http", "/system/functions"), login=True))}

    def query(self, expression):
        query = urllib.parse.urlencode({"query": expression})
        return json.loads(get(self.url("prometheus", f"/api/v1/query?{query}")))["data"]["result"]

    def deploy(self, **function):
        get(self.url("http", "/system/functions"), "POST", json.dumps(function).encode(), login=True)
        eventually("the function can be called", lambda: get(self.url("http", f"/function/{function['service']}")) or True)

    def helm_test(self, function=""):
        """Runs the script of `helm test`, with `test.function`, and returns its output."""
        run = subprocess.run(
            ["sh", "-ec", (CHART / "files/test.sh").read_text()], capture_output=True, text=True, timeout=DEADLINE,
            env={"PATH": os.environ["PATH"], "GATEWAY": self.url("http"), "FUNCTION": function, "QUEUE": "jetstream",
                 "SECRETS": str(self.folder / "secrets")},
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    def exported(self):
        """Names and kinds of the metrics of gateway and worker, and promtool's findings."""
        found, findings = {}, set()
        for port in ("metrics", "worker_metrics"):
            text = get(self.url(port, "/metrics"))
            found.update(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
            lint = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
            assert lint.returncode in (0, 3), lint.stderr
            findings.update(lint.stderr.strip().splitlines())
        return found, findings

    def logs(self):
        return "".join(f"{path.name}: {path.read_text()[-2000:]}\n" for path in sorted(self.folder.glob("*.log")))


def free_ports(count):
    """Returns unused ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports

"""Changes the Secret of a running gateway and provider. Both are processes beside the cluster, with the settings of the
chart, and read the Secret from files that are updated in the way of a kubelet."""

import base64
import http.client
import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

# Delays in seconds: the kubelets of two nodes update the files of their pods at different times.
GATEWAY_DELAY = 1
PROVIDER_DELAY = 9
FUNCTION = "echo"


class Mount:
    """A folder with the files of a Secret, which are replaced atomically."""

    def __init__(self, place):
        self.place, self.version = Path(place), 0
        self.place.mkdir()

    def show(self, data):
        self.version += 1
        version = f"..version-{self.version}"
        (self.place / version).mkdir()
        for name, value in data.items():
            (self.place / version / name).write_bytes(base64.b64decode(value))
            if not (self.place / name).is_symlink():
                (self.place / name).symlink_to(f"..data/{name}")
        (self.place / "..data_tmp").symlink_to(version)
        os.rename(self.place / "..data_tmp", self.place / "..data")


class Kubelet(threading.Thread):
    """Copies the Secret `basic-auth` to mounts, each with a delay after a change."""

    def __init__(self, cluster, namespace, mounts):
        super().__init__(daemon=True)
        self.cluster, self.namespace, self.mounts = cluster, namespace, mounts
        self.stopped = threading.Event()
        self.shown = {}
        self.failure = None

    def run(self):
        try:
            while not self.stopped.wait(0.2):
                self.step()
        except Exception as error:
            self.failure = error

    def step(self):
        data, now = self.cluster.get("-n", self.namespace, "secret", "basic-auth")["data"], time.monotonic()
        for mount, delay in self.mounts:
            seen = self.shown.setdefault(mount, {"data": None, "next": None, "since": None})
            if data == seen["data"]:
                continue
            if seen["next"] != data:
                seen["next"], seen["since"] = data, now
            if seen["data"] is None or now - seen["since"] >= delay:
                mount.show(data)
                seen["data"] = data


class Calls(threading.Thread):
    """Calls the function and the readiness endpoint repeatedly, and records failed requests."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port, self.stopped, self.count, self.failed = port, threading.Event(), 0, []

    def run(self):
        while not self.stopped.wait(0.02):
            for method, path in (("GET", "/_/ready"), ("POST", f"/function/{FUNCTION}")):
                try:
                    status, text = request(self.port, method, path, body="hello")
                except OSError as error:
                    status, text = None, str(error)
                if status != 200:
                    self.failed.append(f"{method} {path}: {status} {text}")
            self.count += 1


def request(port, method, path, body=None, login=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Content-Type": "application/json"}
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    try:
        connection.request(method, path, body=body if method != "GET" else None, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def settings(cluster, namespace, container):
    """The environment variables with plain values of a container of the gateway's Deployment."""
    pod = cluster.get("-n", namespace, "deployment", "gateway")["spec"]["template"]["spec"]
    [found] = [c for c in [*pod["containers"], *pod.get("initContainers", [])] if c["name"] == container]
    return {variable["name"]: variable["value"] for variable in found["env"] if "value" in variable}


def a_changed_password(cluster, namespace, binary):
    """Patches the Secret under load: no call fails before, while or after gateway and provider read the new one."""
    place = cluster.place / "beside"
    place.mkdir()
    mounts = {name: Mount(place / name) for name in ("gateway", "provider")}
    kubelet = Kubelet(cluster, namespace, [
        (mounts["gateway"], GATEWAY_DELAY), (mounts["provider"], PROVIDER_DELAY)])
    kubelet.step()
    old = "admin:" + secret(cluster, namespace)
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    programs = {
        "provider": (["provider", "process"], {
            **path, "basic_auth": "true", "secret_mount_path": str(mounts["provider"].place),
            "state_dir": str(place / "state"), "provider_port": "8081",
        }),
        "gateway": (["serve"], {
            **path, **settings(cluster, namespace, "gateway"), "secret_mount_path": str(mounts["gateway"].place),
            "functions_provider_url": "http://127.0.0.1:8081/", "scale_from_zero": "true",
            # The namespace of the provider's functions.
            "function_namespace": "openfaas-fn",
            # Neither NATS nor Prometheus runs here.
            "queue": "none", "faas_prometheus_host": "127.0.0.1",
        }),
    }
    running = []
    try:
        for name, (arguments, env) in programs.items():
            log = (place / f"{name}.log").open("w")
            running.append(subprocess.Popen([binary, *arguments], env=env, stdout=log, stderr=log, cwd=place))
            port = 8081 if name == "provider" else 8080
            cluster.until(f"{name} listens", lambda: accepts(port), 30)
        deployment = json.dumps({"service": FUNCTION, "image": "", "envProcess": "cat"})
        status, text = request(8080, "POST", "/system/functions", deployment, old)
        assert status == 202, (status, text)
        cluster.until("it is ready", lambda: request(8080, "GET", "/_/ready")[0] == 200, 30)
        return while_it_changes(cluster, kubelet, old, deployment)
    finally:
        kubelet.stopped.set()
        for program in running:
            program.terminate()
        for program in running:
            program.wait(60)
        if kubelet.is_alive():
            kubelet.join(10)


def while_it_changes(cluster, kubelet, old, deployment):
    calls = Calls(8080)
    kubelet.start()
    calls.start()
    new = "admin:another"
    cluster.kubectl("-n", kubelet.namespace, "patch", "secret", "basic-auth", "--patch",
                    json.dumps({"stringData": {"basic-auth-password": "another"}}))

    def is_accepted(login):
        return request(8080, "GET", "/system/functions", login=login)[0] == 200

    # Clients need the new password as soon as the gateway has read it.
    cluster.until("the gateway accepts the new password", lambda: is_accepted(new), 30)
    assert not is_accepted(old), "the gateway accepts both passwords"
    degraded = cluster.until("the provider has the old one", lambda: "credentials" in request(8080, "GET", "/_/ready")[1], 15)
    assert degraded
    status, text = request(8080, "PUT", "/system/functions", deployment, new)
    assert status in (200, 202), (status, text)
    cluster.until("the provider has read it", lambda: '"degraded":[]' in request(8080, "GET", "/_/ready")[1], 60)
    status, text = request(8080, "PUT", "/system/functions", deployment, new)
    assert status in (200, 202), (status, text)
    calls.stopped.set()
    calls.join(60)
    assert kubelet.failure is None, kubelet.failure
    assert calls.count > 100, calls.count
    assert not calls.failed, f"{len(calls.failed)} of {calls.count}: {calls.failed[:3]}"
    return f"{calls.count} calls, none failed"


def secret(cluster, namespace):
    data = cluster.get("-n", namespace, "secret", "basic-auth")["data"]
    return base64.b64decode(data["basic-auth-password"]).decode()


def accepts(port):
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0

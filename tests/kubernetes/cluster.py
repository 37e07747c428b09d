"""A real control plane on this machine: etcd, the API server, controllers and the scheduler.

No containers run: kwok simulates the kubelets of all nodes, and reports their pods as running."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

# Life cycle of kwok's pods: they run immediately, and disappear when deleted. Pods of `helm test` succeed.
STAGES = """
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: node-ready}
spec:
  resourceRef: {apiGroup: v1, kind: Node}
  selector:
    matchExpressions:
      - {key: '.status.conditions.[] | select( .type == "Ready" ) | .status', operator: NotIn, values: ["True"]}
  next:
    statusTemplate: |
      {{ $now := Now }}
      allocatable: {cpu: 32, memory: 256Gi, pods: 110}
      capacity: {cpu: 32, memory: 256Gi, pods: 110}
      conditions:
        - {type: Ready, status: "True", reason: KubeletReady, lastTransitionTime: {{ $now | Quote }}, lastHeartbeatTime: {{ $now | Quote }}}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-runs}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
      - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
      - {key: .status.phase, operator: In, values: [Pending]}
  next:
    statusTemplate: |
      {{ $now := Now }}
      phase: Running
      startTime: {{ $now | Quote }}
      conditions:
        - {type: Initialized, status: "True", lastTransitionTime: {{ $now | Quote }}}
        - {type: ContainersReady, status: "True", lastTransitionTime: {{ $now | Quote }}}
        - {type: Ready, status: "True", lastTransitionTime: {{ $now | Quote }}}
      containerStatuses:
      {{ range .spec.containers }}
        - {name: {{ .name | Quote }}, image: {{ .image | Quote }}, imageID: "", ready: true, restartCount: 0, state: {running: {startedAt: {{ $now | Quote }}}}}
      {{ end }}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-ends}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchLabels: {app: gateway-test}
    matchExpressions:
      - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
      - {key: .status.phase, operator: In, values: [Running]}
  next:
    statusTemplate: |
      phase: Succeeded
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-goes}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
      - {key: .metadata.deletionTimestamp, operator: Exists}
  next: {delete: true}
"""


class Cluster:
    """Runs the programs in `tools`, with all their files in `place`. The end of a `with` block stops them."""

    def __init__(self, tools, place):
        self.tools, self.place, self.programs = Path(tools), Path(place), []
        (self.place / "pki").mkdir(parents=True)
        self.config = self.place / "kubeconfig"
        # Keeps kubectl and helm from reading other configuration of this machine.
        keep = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
        path = f"{self.tools}:/usr/sbin:/usr/bin:/sbin:/bin"
        self.env = {**keep, "PATH": path, "KUBECONFIG": str(self.config), "HELM_CACHE_HOME": f"{place}/helm"}

    def __enter__(self):
        try:
            self.start()
            return self
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_):
        self.stop()

    def start(self):
        pki = self.place / "pki"
        etcd, peer, api, controllers, scheduler = free_ports(5)
        self.certificates(pki)
        authority = base64.b64encode((pki / "ca.crt").read_bytes()).decode()
        self.config.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": f"https://127.0.0.1:{api}", "certificate-authority-data": authority}}],
            "users": [{"name": "admin", "user": {
                "client-certificate": str(pki / "admin.crt"), "client-key": str(pki / "admin.key")}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        }))
        self.run_program(
            "etcd", "--unsafe-no-fsync", f"--data-dir={self.place}/etcd",
            f"--listen-client-urls=http://127.0.0.1:{etcd}", f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}", f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
        )
        self.run_program(
            "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{etcd}", "--bind-address=127.0.0.1", f"--secure-port={api}",
            # The network namespace has no other interface with an address.
            "--advertise-address=192.0.2.1", "--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=RBAC", f"--client-ca-file={pki}/ca.crt",
            f"--tls-cert-file={pki}/server.crt", f"--tls-private-key-file={pki}/server.key",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={pki}/accounts.pub", f"--service-account-signing-key-file={pki}/accounts.key",
        )
        self.until("the API server is ready", lambda: self.kubectl("get", "--raw=/readyz", check=False) == "ok")
        self.run_program(
            "kube-controller-manager", f"--kubeconfig={self.config}", "--leader-elect=false", "--bind-address=127.0.0.1",
            f"--secure-port={controllers}", f"--root-ca-file={pki}/ca.crt",
            f"--service-account-private-key-file={pki}/accounts.key",
        )
        self.run_program(
            "kube-scheduler", f"--kubeconfig={self.config}", "--leader-elect=false", "--bind-address=127.0.0.1",
            f"--secure-port={scheduler}",
        )
        (self.place / "stages.yaml").write_text(STAGES)
        self.run_program(
            "kwok", f"--kubeconfig={self.config}", "--manage-all-nodes", "--node-lease-duration-seconds=40",
            f"--config={self.place}/stages.yaml",
        )
        account = ("-n", "default", "get", "serviceaccount", "default", "-o", "name")
        self.until("namespaces get accounts", lambda: self.kubectl(*account, check=False))

    def certificates(self, pki):
        """Creates a CA, certificates of the server and the administrator, and the service account key."""
        def openssl(*arguments):
            subprocess.run(["openssl", *arguments], cwd=pki, check=True, capture_output=True)

        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
        openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=authority of the tests")
        by = ("-CA", "ca.crt", "-CAkey", "ca.key")
        names = "subjectAltName=IP:127.0.0.1,IP:10.96.0.1,DNS:kubernetes.default.svc"
        openssl("req", "-x509", *key, *by, "-keyout", "server.key", "-out", "server.crt", "-subj", "/CN=kube-apiserver",
                "-addext", names, "-addext", "basicConstraints=critical,CA:FALSE")
        openssl("req", "-x509", *key, *by, "-keyout", "admin.key", "-out", "admin.crt", "-subj", "/O=system:masters/CN=admin",
                "-addext", "extendedKeyUsage=clientAuth", "-addext", "basicConstraints=critical,CA:FALSE")
        openssl("genrsa", "-out", "accounts.key", "2048")
        openssl("rsa", "-in", "accounts.key", "-pubout", "-out", "accounts.pub")

    def run_program(self, name, *arguments):
        log = (self.place / f"{name}.log").open("w")
        command = [str(self.tools / name), *arguments]
        self.programs.append((name, subprocess.Popen(command, stdout=log, stderr=log, env=self.env, cwd=self.place)))

    def stop(self):
        for _, program in reversed(self.programs):
            with contextlib.suppress(ProcessLookupError):
                program.send_signal(signal.SIGTERM)
        for _, program in reversed(self.programs):
            try:
                program.wait(10)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()

    def until(self, what, holds, seconds=60):
        """Waits until `holds()` is true, and returns its value; fails if a program of the cluster has ended."""
        end = time.monotonic() + seconds
        while True:
            if result := holds():
                return result
            for name, program in self.programs:
                if program.poll() is not None:
                    log = (self.place / f"{name}.log").read_text()
                    raise AssertionError(f"{name} has ended:\n{log[-2000:]}")
            assert time.monotonic() < end, f"not within {seconds} s: {what}"
            time.sleep(0.1)

    def nodes(self, count):
        names = [f"node-{number}" for number in range(1, count + 1)]
        items = [{"apiVersion": "v1", "kind": "Node", "metadata": {
            "name": name, "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}}} for name in names]
        self.kubectl("create", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        self.kubectl("wait", "--for=condition=Ready", "--timeout=60s", "node", "--all")

    def kubectl(self, *arguments, given=None, check=True):
        return self.call("kubectl", *arguments, given=given, check=check)

    def helm(self, *arguments, check=True):
        return self.call("helm", *arguments, check=check)

    def call(self, program, *arguments, given=None, check=True):
        """Returns the output of the program; with `check`, raises if it fails."""
        done = subprocess.run([str(self.tools / program), *arguments], input=given, capture_output=True, text=True,
                              timeout=120, env=self.env)
        if check and done.returncode != 0:
            raise AssertionError(f"{program} {' '.join(arguments)}: {(done.stdout + done.stderr).strip()}")
        return done.stdout + ("" if check or done.returncode == 0 else done.stderr)

    def get(self, *arguments):
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports

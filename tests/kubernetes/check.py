"""Checks on a real control plane: the chart and the plain manifests as they are installed, and a gateway beside the
cluster while its Secret changes. `make kubernetes` runs them.

They have a network of their own, so that no other program of the machine has their ports."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster import Cluster
from secret import a_changed_password

ROOT = Path(__file__).resolve().parents[2]
CHART = str(ROOT / "chart/gateway")
# Of the release that most checks look at.
NAMESPACE = "second"
NETES = ["--values", f"{CHART}/values-faas-netes.yaml"]


def workloads_of(cluster, namespace):
    """Name → (wanted pods, pods that are there), of all that has pods."""
    items = cluster.get("-n", namespace, "deployments,statefulsets")["items"]
    pods = cluster.get("-n", namespace, "pods")["items"]
    count = {}
    for pod in pods:
        app = pod["metadata"]["labels"]["app"]
        count[app] = count.get(app, 0) + 1
    return {item["metadata"]["name"]: (item["spec"]["replicas"], count.get(item["metadata"]["name"], 0)) for item in items}


def plain_manifests(cluster):
    """Files in the order in which kubectl takes them: each workload has its pods before the next file comes."""
    cluster.kubectl("apply", "-f", str(ROOT / "namespaces.yml"))
    cluster.kubectl("-n", "openfaas", "create", "secret", "generic", "basic-auth", "--from-literal=basic-auth-user=admin",
                    "--from-literal=basic-auth-password=s3cret")
    files = sorted((ROOT / "yaml").iterdir())
    assert files
    for path in files:
        cluster.kubectl("apply", "-f", str(path))
        if path.stem.endswith(("-deployment", "-statefulset")):
            def all_there():
                return all(wanted == there for wanted, there in workloads_of(cluster, "openfaas").values())

            cluster.until(f"{path.name} has pods", all_there, 20)
    for pod in cluster.get("-n", "openfaas", "pods")["items"]:
        missing(cluster, pod)
    refused = [e["message"] for e in cluster.get("-n", "openfaas", "events")["items"] if e["reason"] == "FailedCreate"]
    assert not refused, refused
    # As INSTALL has it; now there is nothing left to do.
    cluster.kubectl("apply", "-f", str(ROOT / "namespaces.yml"), "-f", str(ROOT / "yaml"))
    cluster.kubectl("-n", "openfaas", "rollout", "status", "--timeout=60s", "deployment/gateway")
    return f"{len(files)} files"


def missing(cluster, pod):
    """Fails if a ConfigMap or Secret that a pod mounts is not there yet."""
    for volume in pod["spec"].get("volumes", []):
        for kind, key in (("configMap", "name"), ("secret", "secretName")):
            if name := volume.get(kind, {}).get(key):
                cluster.kubectl("-n", "openfaas", "get", kind, name)


def existing_namespace(cluster):
    """A namespace for functions that is there is used, and not claimed; one that was made by the release stays its."""
    release = ["gateway", CHART, "-n", "one"]
    cluster.kubectl("create", "namespace", "one-fn")
    before = cluster.get("namespace", "one-fn")["metadata"]
    cluster.helm("install", *release, "--create-namespace", *NETES, "--set=functionNamespace.name=one-fn")
    for _ in range(2):
        now = cluster.get("namespace", "one-fn")["metadata"]
        assert now["uid"] == before["uid"] and now["labels"] == before["labels"], now
        assert "meta.helm.sh/release-name" not in now.get("annotations", {}), now
        cluster.helm("upgrade", *release, "--reset-then-reuse-values")
    cluster.helm("uninstall", "gateway", "-n", "one")
    assert cluster.get("namespace", "one-fn")["status"]["phase"] == "Active"
    # One that the chart has made outlives it, and is its own again.
    release = ["gateway", CHART, "-n", "two"]
    for _ in range(2):
        cluster.helm("install", *release, "--create-namespace", *NETES, "--set=functionNamespace.name=two-fn")
        cluster.helm("upgrade", *release, "--reset-then-reuse-values")
        made = cluster.get("namespace", "two-fn")["metadata"]
        assert made["annotations"]["meta.helm.sh/release-namespace"] == "two", made
        assert made["labels"]["app.kubernetes.io/part-of"] == "gateway", made
        cluster.helm("uninstall", "gateway", "-n", "two")
    return "used as it is, or made and kept"


def second_release(cluster):
    """A port of the nodes that is taken, here by the plain manifests, is refused by the name of its value."""
    install = ["install", "gateway", CHART, "-n", NAMESPACE, "--create-namespace", *NETES,
               f"--set=functionNamespace.name={NAMESPACE}-fn", "--set=external.serviceType=NodePort"]
    said = cluster.helm(*install, check=False)
    assert "external.nodePort: 31112 is taken by Service gateway-external in namespace openfaas" in said, said
    cluster.helm(*install, "--set=external.nodePort=31113")
    for values, port in (((), 31113), (("--set=external.nodePort=0",), None)):
        cluster.helm("upgrade", "gateway", CHART, "-n", NAMESPACE, "--reset-then-reuse-values", *values)
        [now] = cluster.get("-n", NAMESPACE, "service", "gateway-external")["spec"]["ports"]
        assert now["nodePort"] == port or port is None, now
    return "refused on 31112, installed on 31113"


def helm_test(cluster):
    """Its pod is gone after it has ended well. The release is that of `second_release`."""
    said = cluster.helm("test", "gateway", "-n", NAMESPACE, "--timeout=60s")
    assert "Succeeded" in said, said
    pods = cluster.get("-n", NAMESPACE, "pods", "-l", "app=gateway-test")["items"]
    assert not pods, [pod["metadata"]["name"] for pod in pods]
    return "its pod is gone"


def scaled_by_hand(cluster):
    """What docs/INSTALL.md says of Helm 4 after `kubectl scale`. The release is that of `second_release`."""
    cluster.kubectl("-n", NAMESPACE, "scale", "deployment/queue-worker", "--replicas=5")

    def worker():
        return cluster.get("-n", NAMESPACE, "deployment", "queue-worker")["spec"]["replicas"]

    upgrade = ["upgrade", "gateway", CHART, "-n", NAMESPACE, "--reset-then-reuse-values"]
    said = cluster.helm(*upgrade, check=False)
    assert 'conflict with "kubectl" with subresource "scale"' in said and ".spec.replicas" in said, said
    assert worker() == 5
    cluster.helm(*upgrade, "--set=worker.replicas=5")
    assert worker() == 5
    cluster.kubectl("-n", NAMESPACE, "scale", "deployment/queue-worker", "--replicas=4")
    cluster.helm(*upgrade, "--set=worker.replicas=3", "--force-conflicts")
    assert worker() == 3
    return "a conflict, ended by the same number or by --force-conflicts"


def changed_password(cluster):
    """The release is that of `second_release`: its settings are those of the gateway."""
    return a_changed_password(cluster, NAMESPACE, ROOT / "target/debug/gateway")


def main():
    tools = sys.argv[1]
    place = tempfile.mkdtemp(prefix="gateway-kubernetes-")
    failed = False
    try:
        with Cluster(tools, f"{place}/cluster") as cluster:
            cluster.nodes(3)
            checks = [
                plain_manifests, existing_namespace, second_release, helm_test, scaled_by_hand, changed_password,
            ]
            # Each goes on with what the one before has left.
            for check in checks:
                start = time.monotonic()
                try:
                    print(f"{check.__name__}: {check(cluster)} ({time.monotonic() - start:.1f} s)", flush=True)
                except AssertionError as error:
                    failed = True
                    print(f"{check.__name__}: FAILED\n  {error}", flush=True)
                    break
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return failed


if __name__ == "__main__":
    if "GATEWAY_OWN_NETWORK" not in os.environ:
        own = {**os.environ, "GATEWAY_OWN_NETWORK": "yes"}
        sys.exit(subprocess.run(["unshare", "--net", sys.executable, "-B", *sys.argv], env=own).returncode)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    sys.exit(main())

"""Checks on a real control plane: installs the chart and the plain manifests, and changes the Secret of a gateway that
runs beside the cluster. `make kubernetes` runs them.

They run in a separate network namespace, so that their ports are free."""

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
# The release of most checks.
NAMESPACE = "second"
NETES = ["--values", f"{CHART}/values-faas-netes.yaml"]


def workloads_of(cluster, namespace):
    """Name → (wanted pods, existing pods) of each workload."""
    items = cluster.get("-n", namespace, "deployments,statefulsets")["items"]
    pods = cluster.get("-n", namespace, "pods")["items"]
    count = {}
    for pod in pods:
        app = pod["metadata"]["labels"]["app"]
        count[app] = count.get(app, 0) + 1
    return {item["metadata"]["name"]: (item["spec"]["replicas"], count.get(item["metadata"]["name"], 0)) for item in items}


def plain_manifests(cluster):
    """Applies the files in kubectl's order: each workload has its pods before the next file is applied."""
    cluster.kubectl("apply", "-f", str(ROOT / "namespaces.yml"))
    cluster.kubectl("-n", "openfaas", "create", "secret", "generic", "basic-auth", "--from-literal=basic-auth-user=admin",
                    "--from-literal=basic-auth-password=s3cret")
    files = sorted((ROOT / "yaml").iterdir())
    assert files
    for path in files:
        cluster.kubectl("apply", "-f", str(path))
        if path.stem.endswith(("-deployment", "-statefulset")):
            def complete():
                return all(wanted == existing for wanted, existing in workloads_of(cluster, "openfaas").values())

            cluster.until(f"{path.name} has pods", complete, 20)
    for pod in cluster.get("-n", "openfaas", "pods")["items"]:
        require_mounts(cluster, pod)
    rejected = [e["message"] for e in cluster.get("-n", "openfaas", "events")["items"] if e["reason"] == "FailedCreate"]
    assert not rejected, rejected
    # The commands of docs/INSTALL.md; everything exists already.
    cluster.kubectl("apply", "-f", str(ROOT / "namespaces.yml"), "-f", str(ROOT / "yaml"))
    cluster.kubectl("-n", "openfaas", "rollout", "status", "--timeout=60s", "deployment/gateway")
    return f"{len(files)} files"


def require_mounts(cluster, pod):
    """Fails if a ConfigMap or Secret that a pod mounts does not exist."""
    for volume in pod["spec"].get("volumes", []):
        for kind, key in (("configMap", "name"), ("secret", "secretName")):
            if name := volume.get(kind, {}).get(key):
                cluster.kubectl("-n", "openfaas", "get", kind, name)


def existing_namespace(cluster):
    """An existing namespace for functions is used but not adopted; one that the release created remains its own."""
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
    # A namespace that the chart created is kept on uninstall, and adopted again on install.
    release = ["gateway", CHART, "-n", "two"]
    for _ in range(2):
        cluster.helm("install", *release, "--create-namespace", *NETES, "--set=functionNamespace.name=two-fn")
        cluster.helm("upgrade", *release, "--reset-then-reuse-values")
        created = cluster.get("namespace", "two-fn")["metadata"]
        assert created["annotations"]["meta.helm.sh/release-namespace"] == "two", created
        assert created["labels"]["app.kubernetes.io/part-of"] == "gateway", created
        cluster.helm("uninstall", "gateway", "-n", "two")
    return "used unchanged, or created and kept"


def second_release(cluster):
    """A node port in use, here by the plain manifests, is rejected with the name of the chart's value."""
    install = ["install", "gateway", CHART, "-n", NAMESPACE, "--create-namespace", *NETES,
               f"--set=functionNamespace.name={NAMESPACE}-fn", "--set=external.serviceType=NodePort"]
    output = cluster.helm(*install, check=False)
    assert "external.nodePort: 31112 is in use by Service gateway-external in namespace openfaas" in output, output
    cluster.helm(*install, "--set=external.nodePort=31113")
    for values, port in (((), 31113), (("--set=external.nodePort=0",), None)):
        cluster.helm("upgrade", "gateway", CHART, "-n", NAMESPACE, "--reset-then-reuse-values", *values)
        [now] = cluster.get("-n", NAMESPACE, "service", "gateway-external")["spec"]["ports"]
        assert now["nodePort"] == port or port is None, now
    return "rejected on 31112, installed on 31113"


def helm_test(cluster):
    """The test pod is deleted after it succeeded. Uses the release of `second_release`."""
    output = cluster.helm("test", "gateway", "-n", NAMESPACE, "--timeout=60s")
    assert "Succeeded" in output, output
    pods = cluster.get("-n", NAMESPACE, "pods", "-l", "app=gateway-test")["items"]
    assert not pods, [pod["metadata"]["name"] for pod in pods]
    return "the pod is deleted"


def scaled_by_hand(cluster):
    """The behaviour of Helm 4 after `kubectl scale` as in docs/INSTALL.md. Uses the release of `second_release`."""
    cluster.kubectl("-n", NAMESPACE, "scale", "deployment/queue-worker", "--replicas=5")

    def worker():
        return cluster.get("-n", NAMESPACE, "deployment", "queue-worker")["spec"]["replicas"]

    upgrade = ["upgrade", "gateway", CHART, "-n", NAMESPACE, "--reset-then-reuse-values"]
    output = cluster.helm(*upgrade, check=False)
    assert 'conflict with "kubectl" with subresource "scale"' in output and ".spec.replicas" in output, output
    assert worker() == 5
    cluster.helm(*upgrade, "--set=worker.replicas=5")
    assert worker() == 5
    cluster.kubectl("-n", NAMESPACE, "scale", "deployment/queue-worker", "--replicas=4")
    cluster.helm(*upgrade, "--set=worker.replicas=3", "--force-conflicts")
    assert worker() == 3
    return "a conflict, resolved by the same number or by --force-conflicts"


def changed_password(cluster):
    """Uses the settings of the gateway from the release of `second_release`."""
    return a_changed_password(cluster, NAMESPACE, ROOT / "target/debug/gateway")


def main():
    tools = sys.argv[1]
    place = tempfile.mkdtemp(prefix="gateway-kubernetes-")
    passed = failed = 0
    try:
        with Cluster(tools, f"{place}/cluster") as cluster:
            cluster.nodes(3)
            checks = [
                plain_manifests, existing_namespace, second_release, helm_test, scaled_by_hand, changed_password,
            ]
            # Each check continues with the cluster that the previous one left.
            for check in checks:
                start = time.monotonic()
                try:
                    print(f"{check.__name__}: {check(cluster)} ({time.monotonic() - start:.1f} s)", flush=True)
                    passed += 1
                except AssertionError as error:
                    failed += 1
                    print(f"{check.__name__}: FAILED\n  {error}", flush=True)
                    break
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    if "GATEWAY_OWN_NETWORK" not in os.environ:
        own = {**os.environ, "GATEWAY_OWN_NETWORK": "yes"}
        sys.exit(subprocess.run(["unshare", "--net", sys.executable, "-B", *sys.argv], env=own).returncode)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    sys.exit(main())

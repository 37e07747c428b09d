"""Renders the chart with every values file, and with many sets of values."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "chart" / "gateway"
HELM = ROOT / "target" / "manifests" / "bin" / "helm"
NAMESPACE = "openfaas"

# The C loader is about ten times faster.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Name → (values for `--set`, names of the Secrets that the user has to create).
SWITCHES = {
    "no auth": (["basicAuth.enabled=false"], []),
    "given secrets": (
        ["basicAuth.existingSecret=mine", "queue.jetstream.auth.existingSecret=nats-mine"],
        ["mine", "nats-mine"],
    ),
    "autoscaled": (["gateway.autoscaling.enabled=true"], []),
    "no disruption budget": (["gateway.podDisruptionBudget.enabled=false"], []),
    "env": (["gateway.env.max_calls=2000000", "worker.env.max_result_body_bytes=4096"], []),
    "files and secrets": (
        [
            "queue.backend=external",
            "queue.external.address=nats.example.com",
            "queue.external.existingSecret=login",
            "queue.external.tls=true",
            *(
                f"{of}.{what}"
                for of in ("gateway", "worker")
                for what in (
                    "env.nats_ca=/var/tls/ca.crt",
                    "extraEnv[0].name=otlp_headers",
                    "extraEnv[0].valueFrom.secretKeyRef.name=collector",
                    "extraEnv[0].valueFrom.secretKeyRef.key=headers",
                    "extraEnv[1].name=nats_user",
                    "extraEnv[1].value=somebody",
                    "envFrom[0].secretRef.name=more",
                    "extraVolumes[0].name=tls",
                    "extraVolumes[0].secret.secretName=nats-tls",
                    "extraVolumeMounts[0].name=tls",
                    "extraVolumeMounts[0].mountPath=/var/tls",
                )
            ),
        ],
        ["login", "collector", "more", "nats-tls"],
    ),
    "files without auth": (
        [
            "basicAuth.enabled=false",
            "worker.extraVolumes[0].name=tls",
            "worker.extraVolumes[0].secret.secretName=tls",
            "worker.extraVolumeMounts[0].name=tls",
            "worker.extraVolumeMounts[0].mountPath=/var/tls",
        ],
        ["tls"],
    ),
    "traces": (["tracing.otlpEndpoint=http://collector:4318", "tracing.samplingRatio=0.1", "gateway.accessLog=errors"], []),
    "from zero": (["gateway.scaleFromZero=true", "gateway.env.cold_start_timeout=90s"], []),
    "scaled by load": (
        ["gateway.autoscale.enabled=true", "gateway.autoscale.window=30s", "gateway.replicas=2"],
        [],
    ),
    "scaled by load, without a queue": (["gateway.autoscale.enabled=true", "queue.backend=none"], []),
    "direct functions": (
        ["gateway.directFunctions=true", "gateway.directFunctionsSuffix=openfaas-fn.svc.cluster.local"],
        [],
    ),
    "provider beside": (["provider.image.repository=example.com/provider", "provider.image.tag=1.0.0"], []),
    "long calls": (
        [
            "provider.image.repository=example.com/provider",
            "provider.image.tag=1.0.0",
            "gateway.upstreamTimeout=1h2m3.5s",
            "gateway.scaleFromZero=true",
            "gateway.env.cold_start_timeout=90",
        ],
        [],
    ),
    "provider of all namespaces": (
        [
            "provider.image.repository=example.com/provider",
            "provider.image.tag=1.0.0",
            "provider.rbac.allNamespaces=true",
        ],
        [],
    ),
    "user of the platform": (["runAsUser=null"], []),
    "no queue": (["queue.backend=none"], []),
    "streaming": (["queue.backend=stan", "networkPolicy.enabled=true"], []),
    "streaming in memory": (["queue.backend=stan", "queue.stan.store=memory"], []),
    "queue elsewhere": (
        ["queue.backend=external", "queue.external.address=nats.example.com", "queue.external.existingSecret=login"],
        ["login"],
    ),
    "cluster without login": (["queue.jetstream.replicas=3", "queue.jetstream.auth.enabled=false"], []),
    "storage class": (
        [
            "queue.jetstream.storage.className=fast",
            "prometheus.storage.size=1Gi",
            "prometheus.storage.className=fast",
        ],
        [],
    ),
    "worker in the gateway": (["worker.replicas=0"], []),
    "node port": (["external.serviceType=NodePort"], []),
    "load balancer": (
        ["external.serviceType=LoadBalancer", "external.loadBalancerSourceRanges={192.0.2.0/24}"],
        [],
    ),
    "ingress": (
        [
            "ingress.enabled=true",
            "ingress.className=nginx",
            "ingress.tls[0].secretName=tls",
            "ingress.tls[0].hosts={gateway.example.com}",
        ],
        ["tls"],
    ),
    "route": (["httpRoute.enabled=true", "httpRoute.hostnames={gateway.example.com}"], []),
    "policies": (["networkPolicy.enabled=true"], []),
    "policies with guests": (
        [
            "networkPolicy.enabled=true",
            *(
                f"networkPolicy.{what}From[0].namespaceSelector.matchLabels.name=monitoring"
                for what in ("prometheus", "alertmanager", "metrics")
            ),
        ],
        [],
    ),
    "policies without prometheus": (
        ["networkPolicy.enabled=true", "prometheus.enabled=false", "alertmanager.enabled=false"],
        [],
    ),
    "operator": (
        [
            "prometheus.enabled=false",
            "alertmanager.enabled=false",
            "serviceMonitor.enabled=true",
            "serviceMonitor.interval=30s",
            "prometheusRule.enabled=true",
            "prometheus.extraRuleGroups[0].name=mine",
            "prometheus.extraRuleGroups[0].rules[0].record=a:b",
            "prometheus.extraRuleGroups[0].rules[0].expr=up",
        ],
        [],
    ),
    "no alertmanager": (["alertmanager.enabled=false"], []),
    "webhook and rules": (
        [
            "alertmanager.webhooks[0].url=http://pager.example.com/",
            "prometheus.extraRuleGroups[0].name=mine",
            "prometheus.extraRuleGroups[0].rules[0].record=a:b",
            "prometheus.extraRuleGroups[0].rules[0].expr=up",
        ],
        [],
    ),
    "dashboards": (["dashboards.enabled=true"], []),
    "placed": (
        [
            "imagePullSecrets[0].name=pull",
            "image.registry=example.com/team",
            "nodeSelector.disk=ssd",
            "tolerations[0].operator=Exists",
            "podAnnotations.note=x",
        ],
        ["pull"],
    ),
}


class Refused(Exception):
    """Helm's error for values that it rejects."""


def values_files():
    return sorted(CHART.glob("values-*.yaml"))


def cases():
    """Name, arguments of `helm template`, and the Secrets that the chart does not create."""
    yield "defaults", [], []
    for path in values_files():
        yield path.name, ["--values", str(path)], []
    # The usual installation: with the provider for Kubernetes, on any platform.
    netes = CHART / "values-faas-netes.yaml"
    for path in values_files():
        if path != netes:
            yield f"{netes.name} {path.name}", ["--values", str(netes), "--values", str(path)], []
    yield "provider beside, on an old cluster", ["--values", str(netes), "--kube-version=1.28.0"], []
    for name, (switches, secrets) in SWITCHES.items():
        yield name, [f"--set={switch}" for switch in switches], secrets


def helm(*arguments):
    """Returns helm's output; raises Refused with helm's error."""
    run = subprocess.run([HELM, *arguments], capture_output=True, text=True, timeout=60)
    if run.returncode != 0:
        raise Refused((run.stdout + run.stderr).strip())
    return run.stdout


def template(arguments, chart=CHART):
    """The rendered objects of the chart."""
    text = helm("template", "gateway", str(chart), "--namespace", NAMESPACE, *arguments)
    return [found for found in yaml.load_all(text, Loader) if found]


def rendered():
    """Every case with its objects: (name, objects, Secrets that the chart does not create)."""
    def case(name, arguments, secrets):
        try:
            return name, template(arguments), secrets
        except Refused as error:
            raise Refused(f"{name}: {error}") from error

    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda one: case(*one), cases()))

"""Renders the chart as plain files, one per object, for use without Helm: `yaml/`, `yaml_arm/`, `namespaces.yml`.

`--write` writes the files; the checks compare them with the rendering."""

import shutil
import sys

import yaml

from chart import CHART, NAMESPACE, ROOT, Loader, template

# Files contain no Secrets: NATS has no authentication there, and network policies restrict its clients.
COMMON = [
    "--values",
    str(CHART / "values-faas-netes.yaml"),
    "--set=basicAuth.existingSecret=basic-auth",
    "--set=queue.jetstream.auth.enabled=false",
    "--set=networkPolicy.enabled=true",
    "--set=external.serviceType=NodePort",
    "--no-hooks",
]
FOLDERS = {
    "yaml": COMMON,
    # For 32-bit and 64-bit ARM.
    "yaml_arm": [*COMMON, "--values", str(CHART / "values-armhf.yaml"), "--set=nodeSelector=null"],
}
# Labels and annotations that only Helm uses.
NOISE = {
    "helm.sh/chart",
    "helm.sh/resource-policy",
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/version",
    "app.kubernetes.io/name",
    "app.kubernetes.io/part-of",
}
SHORT = {"PersistentVolumeClaim": "pvc", "HorizontalPodAutoscaler": "hpa", "PodDisruptionBudget": "pdb"}
# `kubectl apply -f` applies files in the order of their names. Dependencies of pods come first; otherwise the pods are
# created only when Kubernetes retries.
BEFORE_ALL = {"ServiceAccount", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "ConfigMap", "Secret"}
WORKLOADS = {"Deployment", "StatefulSet"}
HEADER = "# Rendered from chart/gateway by `make yaml`. Do not edit; change the chart.\n"


class Dumper(yaml.SafeDumper):
    """Indents lists below their key, and writes multi-line strings as literal blocks."""

    def increase_indent(self, flow=False, indentless=False):
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data):
        return True


Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def without_noise(value):
    if isinstance(value, dict):
        kept = {k: without_noise(v) for k, v in value.items() if k not in NOISE}
        return {k: v for k, v in kept.items() if not (k in ("labels", "annotations") and v == {})}
    if isinstance(value, list):
        return [without_noise(item) for item in value]
    return value


def dump(item):
    return yaml.dump(without_noise(item), Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)


def rank(item):
    """1 for dependencies of pods, 3 for workloads, 2 for all other objects."""
    return 1 if item["kind"] in BEFORE_ALL else 3 if item["kind"] in WORKLOADS else 2


def files():
    """Path below the repository → text."""
    rendered = {}
    for folder, arguments in FOLDERS.items():
        for item in template(arguments):
            if item["kind"] == "Namespace":
                continue
            kind = SHORT.get(item["kind"], item["kind"].lower())
            rendered[f"{folder}/{rank(item)}-{item['metadata']['name']}-{kind}.yml"] = HEADER + dump(item)
    namespaces = [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": NAMESPACE,
                # All pods of the gateway comply. The namespace of functions has no such label.
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            },
        },
        *[item for item in template(FOLDERS["yaml"]) if item["kind"] == "Namespace"],
    ]
    rendered["namespaces.yml"] = HEADER + "---\n".join(dump(item) for item in namespaces)
    return rendered


def on_disk():
    paths = [ROOT / "namespaces.yml", *(path for folder in FOLDERS for path in (ROOT / folder).glob("*"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths if path.exists()}


def drift():
    """The differences between the files and the rendering."""
    should, are = files(), on_disk()
    wrong = [f"{path} is missing" for path in sorted(should.keys() - are.keys())]
    wrong += [f"{path} is not in the rendering" for path in sorted(are.keys() - should.keys())]
    wrong += [f"{path} differs from the chart" for path in sorted(should) if are.get(path, should[path]) != should[path]]
    return len(should), [f"{what}: run `make yaml`" for what in wrong]


def order():
    """References to objects in later files: `kubectl apply -f` applies files in the order of their names."""
    wrong, count = [], 0
    for folder in FOLDERS:
        there = set()
        for path, text in sorted((path, text) for path, text in on_disk().items() if path.startswith(f"{folder}/")):
            item = yaml.load(text, Loader)
            there.add((item["kind"], item["metadata"]["name"]))
            pod = item["spec"].get("template", {}).get("spec", {}) if item["kind"] in WORKLOADS else {}
            needs = {("ServiceAccount", pod.get("serviceAccountName")), ("Role", item.get("roleRef", {}).get("name"))}
            needs |= {("ConfigMap", volume.get("configMap", {}).get("name")) for volume in pod.get("volumes", [])}
            needs = {need for need in needs if need[1] not in (None, "default")}
            count += len(needs)
            wrong += [f"{path} comes before {kind} {name}" for kind, name in sorted(needs - there)]
    return count, wrong


def parsed():
    """The objects of each folder, with the namespaces."""
    are = on_disk()
    for folder in FOLDERS:
        texts = [text for path, text in are.items() if path.startswith(f"{folder}/") or path == "namespaces.yml"]
        yield folder, [item for text in texts for item in yaml.load_all(text, Loader)]


def write():
    for folder in FOLDERS:
        shutil.rmtree(ROOT / folder, ignore_errors=True)
    for path, text in files().items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(text)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()

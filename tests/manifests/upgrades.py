"""Checks which pods an upgrade restarts: renders the chart, and then a modified copy, and compares."""

import json
import re
import shutil
import tempfile
from pathlib import Path

from chart import CHART, Refused, template

# Without a cluster each rendering would generate new passwords.
FIXED_SECRETS = ["--set=basicAuth.existingSecret=x", "--set=queue.jetstream.auth.existingSecret=y"]
BACKENDS = ("jetstream", "stan")
# Components with the image of this version: the only ones that a new version restarts.
OWN = {"gateway", "queue-worker"}


def changed(edits, arguments, live=()):
    """Renders a copy of the chart after the replacements in `edits`: (file, pattern, new text).

    `live`: the objects that exist in the cluster."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(CHART, Path(folder) / "gateway"))
        if live:
            pretend(copy, live)
        for file, pattern, text in edits:
            new, count = re.subn(pattern, text, (copy / file).read_text(), flags=re.M)
            assert count == 1, f"{pattern} is in {file} {count} times"
            (copy / file).write_text(new)
        return template(arguments, copy)


def pretend(copy, live):
    """Replaces `lookup` in the templates by a file with the objects of the cluster."""
    by_name = {f"{item['kind']} {item['metadata']['name']}": item for item in live}
    (copy / "live.json").write_text(json.dumps(by_name))
    for path in (copy / "templates").glob("*.*"):
        lookup = r'lookup "\S+" "(\S+)" (?:""|(\$root|)\.Release\.Namespace) ("\S*"|\$\w+)'
        replacement = r'get (\2.Files.Get "live.json" | fromJson) (printf "\1 %s" \3)'
        text = re.sub(lookup, replacement, path.read_text())
        assert "lookup" not in text, f"{path.name} has a lookup of another form"
        path.write_text(text)


def pods(objects):
    """Workload → pod template; a changed template restarts the pods."""
    workloads = [item for item in objects if item["kind"] in ("Deployment", "StatefulSet")]
    return {item["metadata"]["name"]: item["spec"]["template"] for item in workloads}


def of_versions():
    """A new version of chart and program: the number of compared templates, and the problems."""
    wrong, count = [], 0
    versions = [("Chart.yaml", r"^version: .*$", "version: 77.0.0"), ("Chart.yaml", r"^appVersion: .*$", "appVersion: 88.0.0")]
    for backend in BACKENDS:
        arguments = [*FIXED_SECRETS, f"--set=queue.backend={backend}"]
        before = pods(template(arguments))
        for edits, may in ((versions[:1], set()), (versions, OWN)):
            after = pods(changed(edits, arguments))
            restarted = {name for name in before if before[name] != after[name]}
            count += len(before)
            wrong += [f"{backend}: a new version restarts {name}" for name in sorted(restarted - may)]
            wrong += [f"{backend}: a new version does not restart {name}" for name in sorted(may - restarted)]
    return count, wrong


def of_configs(cases):
    """Files that a pod reads only at startup: a changed file restarts it, in every case and in a new chart."""
    wrong, count = [], 0
    edits = [
        ("templates/nats.yaml", r"http_port: 8222", "http_port: 8223"),
        ("templates/prometheus.yaml", r"refresh_interval: 5s", "refresh_interval: 6s"),
        ("templates/alertmanager.yaml", r"repeat_interval: 30s", "repeat_interval: 31s"),
    ]
    rules = [("rules/gateway.yml", r"^groups:", "# Reworded.\ngroups:")]
    new = [("a new chart", changed(edits, FIXED_SECRETS), []), ("new rules", changed(rules, FIXED_SECRETS), [])]
    by_name = {}
    for _, objects, _ in [*cases, *new]:
        texts = {item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"}
        for name, pod in pods(objects).items():
            if name in texts and "config" in {volume["name"] for volume in pod["spec"]["volumes"]}:
                checksum = pod["metadata"]["annotations"].get("checksum/config")
                by_name.setdefault(name, set()).add((checksum, str(texts[name])))
    for name, pairs in by_name.items():
        count += len(pairs)
        if len({checksum for checksum, _ in pairs}) < len(pairs):
            wrong.append(f"{name} is not restarted by a change of its files")
        if len({text for _, text in pairs}) < len(pairs):
            wrong.append(f"{name} is restarted although its files are unchanged")
    assert by_name.keys() == {"nats", "prometheus", "alertmanager"}, by_name.keys()
    return count, wrong


def of_live_objects():
    """Existing objects are kept, and changes that Kubernetes would reject fail with a remedy."""
    wrong, count = [], 0
    for backend, name in (("jetstream", "nats"), ("stan", "nats-streaming")):
        arguments = [*FIXED_SECRETS, f"--set=queue.backend={backend}"]
        live = template([*arguments, f"--set=queue.{backend}.storage.size=8192Mi"])
        for values, expected in (
            ([], None),
            (["size=9Gi"], "A larger disk"),
            (["className=fast"], "A larger disk"),
        ):
            message = None
            try:
                changed([], [*arguments, *(f"--set=queue.{backend}.storage.{value}" for value in values)], live)
            except Refused as error:
                message = str(error)
            count += 1
            if (expected or "") not in (message or "") or bool(expected) != bool(message):
                wrong.append(f"{name} with {values}: fails with {message} instead of {expected}")
    first = template(["--set=basicAuth.user=first"])
    login = {item["metadata"]["name"]: item["data"] for item in first if item["kind"] == "Secret"}
    then = changed([], ["--set=basicAuth.user=second"], first)
    for name in ("basic-auth", "nats-auth"):
        [now] = [item["data"] for item in then if (item["kind"], item["metadata"]["name"]) == ("Secret", name)]
        count += 1
        if now != login[name]:
            wrong.append(f"Secret {name} is not kept")
    if pods(then)["alertmanager"] != pods(first)["alertmanager"]:
        wrong.append("Alertmanager does not log in with the user of its Secret")
    [gateway] = [
        item["spec"]
        for item in changed([], ["--set=gateway.autoscaling.enabled=true"], template(["--set=gateway.replicas=3"]))
        if (item["kind"], item["metadata"]["name"]) == ("Deployment", "gateway")
    ]
    if gateway.get("replicas") != 3:
        wrong.append(f"with autoscaling three gateways become {gateway.get('replicas')}")
    return count + 2, wrong

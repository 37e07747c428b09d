"""What an upgrade restarts: the chart is rendered twice, the second time from a copy in which something differs."""

import json
import re
import shutil
import tempfile
from pathlib import Path

from chart import CHART, Refused, template

# What a live cluster keeps, a rendering makes anew.
KEPT = ["--set=basicAuth.existingSecret=x", "--set=queue.jetstream.auth.existingSecret=y"]
BACKENDS = ("jetstream", "stan")
# Run the image of this version; all others are to stay as they are.
OWN = {"gateway", "queue-worker"}


def changed(edits, arguments, live=()):
    """The objects of a chart in whose files each pattern of `edits`, (file, pattern, new text), was replaced.

    `live`: the objects that its cluster has."""
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
    """Has a chart look up what is in a file, as there is no cluster here."""
    by_name = {f"{item['kind']} {item['metadata']['name']}": item for item in live}
    (copy / "live.json").write_text(json.dumps(by_name))
    for path in (copy / "templates").glob("*.*"):
        asks = r'lookup "\S+" "(\S+)" (?:""|(\$root|)\.Release\.Namespace) ("\S*"|\$\w+)'
        answer = r'get (\2.Files.Get "live.json" | fromJson) (printf "\1 %s" \3)'
        text = re.sub(asks, answer, path.read_text())
        assert "lookup" not in text, f"{path.name} looks something up in another way"
        path.write_text(text)


def pods(objects):
    """Workload → template of its pods; another one restarts them."""
    workloads = [item for item in objects if item["kind"] in ("Deployment", "StatefulSet")]
    return {item["metadata"]["name"]: item["spec"]["template"] for item in workloads}


def of_versions():
    """A new version of chart and program: how many templates were compared, and what is wrong."""
    wrong, count = [], 0
    versions = [("Chart.yaml", r"^version: .*$", "version: 77.0.0"), ("Chart.yaml", r"^appVersion: .*$", "appVersion: 88.0.0")]
    for backend in BACKENDS:
        arguments = [*KEPT, f"--set=queue.backend={backend}"]
        before = pods(template(arguments))
        for edits, may in ((versions[:1], set()), (versions, OWN)):
            after = pods(changed(edits, arguments))
            restarted = {name for name in before if before[name] != after[name]}
            count += len(before)
            wrong += [f"{backend}: a new version restarts {name}" for name in sorted(restarted - may)]
            wrong += [f"{backend}: a new version leaves {name}" for name in sorted(may - restarted)]
    return count, wrong


def of_configs(cases):
    """Files that a pod reads only at its start: another text restarts it, in every case and in a new chart."""
    wrong, count = [], 0
    edits = [
        ("templates/nats.yaml", r"http_port: 8222", "http_port: 8223"),
        ("templates/prometheus.yaml", r"refresh_interval: 5s", "refresh_interval: 6s"),
        ("templates/alertmanager.yaml", r"repeat_interval: 30s", "repeat_interval: 31s"),
    ]
    rules = [("rules/gateway.yml", r"^groups:", "# Reworded.\ngroups:")]
    new = [("a new chart", changed(edits, KEPT), []), ("new rules", changed(rules, KEPT), [])]
    by_name = {}
    for _, objects, _ in [*cases, *new]:
        texts = {item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"}
        for name, pod in pods(objects).items():
            if name in texts and "config" in {volume["name"] for volume in pod["spec"]["volumes"]}:
                told = pod["metadata"]["annotations"].get("checksum/config")
                by_name.setdefault(name, set()).add((told, str(texts[name])))
    for name, pairs in by_name.items():
        count += len(pairs)
        if len({told for told, _ in pairs}) < len(pairs):
            wrong.append(f"{name} is not restarted by another text of its files")
        if len({text for _, text in pairs}) < len(pairs):
            wrong.append(f"{name} is restarted though its files are as before")
    assert by_name.keys() == {"nats", "prometheus", "alertmanager"}, by_name.keys()
    return count, wrong


def of_live_objects():
    """What a cluster has already is kept, and what it would not change is refused with a word of help."""
    wrong, count = [], 0
    for backend, name in (("jetstream", "nats"), ("stan", "nats-streaming")):
        arguments = [*KEPT, f"--set=queue.backend={backend}"]
        live = template([*arguments, f"--set=queue.{backend}.storage.size=8192Mi"])
        for values, told in (
            ([], None),
            (["size=9Gi"], "A larger disk"),
            (["className=fast"], "A larger disk"),
        ):
            said = None
            try:
                changed([], [*arguments, *(f"--set=queue.{backend}.storage.{value}" for value in values)], live)
            except Refused as error:
                said = str(error)
            count += 1
            if (told or "") not in (said or "") or bool(told) != bool(said):
                wrong.append(f"{name} with {values}: says {said} instead of {told}")
    first = template(["--set=basicAuth.user=first"])
    login = {item["metadata"]["name"]: item["data"] for item in first if item["kind"] == "Secret"}
    then = changed([], ["--set=basicAuth.user=second"], first)
    for name in ("basic-auth", "nats-auth"):
        [now] = [item["data"] for item in then if (item["kind"], item["metadata"]["name"]) == ("Secret", name)]
        count += 1
        if now != login[name]:
            wrong.append(f"Secret {name} is not kept")
    if pods(then)["alertmanager"] != pods(first)["alertmanager"]:
        wrong.append("Alertmanager logs in as somebody else than its Secret says")
    [gateway] = [
        item["spec"]
        for item in changed([], ["--set=gateway.autoscaling.enabled=true"], template(["--set=gateway.replicas=3"]))
        if (item["kind"], item["metadata"]["name"]) == ("Deployment", "gateway")
    ]
    if gateway.get("replicas") != 3:
        wrong.append(f"with autoscaling three gateways become {gateway.get('replicas')}")
    return count + 2, wrong

"""What an upgrade restarts: the chart is rendered twice, the second time from a copy in which something differs."""

import re
import shutil
import tempfile
from pathlib import Path

from chart import CHART, template

# What a live cluster keeps, a rendering makes anew.
KEPT = ["--set=basicAuth.existingSecret=x", "--set=queue.jetstream.auth.existingSecret=y"]
BACKENDS = ("jetstream", "stan")
# Run the image of this version; all others are to stay as they are.
OWN = {"gateway", "queue-worker"}


def changed(edits, arguments):
    """The objects of a chart in whose files each pattern of `edits`, (file, pattern, new text), was replaced."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(CHART, Path(folder) / "gateway"))
        for file, pattern, text in edits:
            new, count = re.subn(pattern, text, (copy / file).read_text(), flags=re.M)
            assert count == 1, f"{pattern} is in {file} {count} times"
            (copy / file).write_text(new)
        return template(arguments, copy)


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

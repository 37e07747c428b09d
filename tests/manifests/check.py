"""Checks of the image, the chart, the plain manifests, rules and dashboards. `make manifests` runs them."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

import chart
import live
import names
import plain
import settings
import upgrades
from chart import CHART, ROOT, Loader, Refused
from objects import Objects, containers, pod_of

TOOLS = ROOT / "target" / "manifests"
VENV = TOOLS / "venv" / "bin"
KUBERNETES = ("1.28", "1.34")
# Custom resources: Kubernetes has no schemas of them.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "HTTPRoute"}
# Names of OpenFaaS that do not follow promtool's conventions.
LEGACY_NAMES = {"gateway_function_invocation_started", "gateway_service_count", "gateway_service_ready_count"}


class Wrong(Exception):
    """The problems that a check found, one per line."""


def run(*command, **options):
    """Runs a program and returns its output; raises Wrong with the output if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, cwd=ROOT, **options)
    if done.returncode != 0:
        raise Wrong((done.stdout + done.stderr).strip() or f"{command[0]}: exit status {done.returncode}")
    return done.stdout


def require_none(wrong):
    if wrong:
        raise Wrong("\n".join(wrong))


def require_none_in_cases(wrong):
    """`wrong`: (case, problem). A problem of several cases is reported once."""
    by_problem = {}
    for case, problem in wrong:
        by_problem.setdefault(problem, []).append(case)
    require_none([
        f"{cases[0]}{f' and {len(cases) - 1} more' if cases[1:] else ''}: {problem}"
        for problem, cases in by_problem.items()
    ])


class Checks:
    """Each method is a check; its name is the subject, its result a summary of what was checked."""

    @functools.cached_property
    def cases(self):
        """Every rendering of the chart."""
        return chart.rendered()

    def image(self):
        run(VENV / "hadolint", "Dockerfile")
        text, cargo = (ROOT / "Dockerfile").read_text(), (ROOT / "Cargo.toml").read_text()
        needed = re.search(r'^rust-version = "(.*)"', cargo, re.M)[1]
        if f"/rust:{needed}." not in text:
            raise Wrong(f"Dockerfile does not build with Rust {needed}, which Cargo.toml asks for")
        version = re.search(r'^version = "(.*)"', cargo, re.M)[1]
        meta = yaml.load((CHART / "Chart.yaml").read_text(), Loader)
        require_none([f"the version is {version}, but {where} has {other}" for where, other in (
            ("Chart.yaml", meta["appVersion"]),
            ("Dockerfile", re.search(r"^ARG VERSION=(.*)", text, re.M)[1]),
        ) if other != version])
        return "1 Dockerfile, with the versions of Cargo.toml and the chart"

    def yamllint(self):
        files = [*(CHART.glob("*.yaml")), *(CHART / "rules").glob("*"), ROOT / "yaml", ROOT / "yaml_arm"]
        files += [ROOT / "namespaces.yml", *(ROOT / "tests/manifests/rules").glob("*")]
        run(VENV / "yamllint", "--strict", "-c", "tests/manifests/yamllint.yml", *files)
        return f"{len(files)} paths"

    def helm_lint(self):
        cases = list(chart.cases())
        for name, arguments, _ in cases:
            try:
                chart.helm("lint", "--strict", "--quiet", str(CHART), *arguments)
            except Refused as error:
                raise Wrong(f"{name}: {error}") from error
        return f"{len(cases)} sets of values"

    def helm_template(self):
        return f"{len(self.cases)} renderings, {sum(len(objects) for _, objects, _ in self.cases)} objects"

    def refused_values(self):
        """The schema rejects unknown and invalid values, and the templates reject incomplete ones."""
        bad = [
            "gatway.replicas=2",
            "gateway.replica=2",
            "gateway.replicas=two",
            "gateway.upstreamTimeout=1 minute",
            "gateway.env.max_cals=5",
            "gateway.env.port=8081",
            "worker.env.max_async_body_bytes=5",
            "queue.backend=kafka",
            "queue.jetstream.replicas=2",
            "external.serviceType=Nodeport",
            "external.nodePort=99999",
            "gateway.podDisruptionBudget.maxUnavailable=0%",
            "provider.image.tags=1",
            "prometheus.storage.size=lots",
            "prometheus.scrapeInterval=1.5s",
            "serviceMonitor.interval=15",
            "image.pullPolicy=Sometimes",
        ]
        for switch in bad:
            try:
                chart.template([f"--set={switch}"])
            except Refused:
                continue
            raise Wrong(f"--set {switch} is not rejected")
        incomplete = (
            ("queue.backend=external", "queue.external.address"),
            ("provider.image.repository=x", "provider.image.tag"),
            ("gateway.autoscale.enabled=true,queue.backend=none,gateway.replicas=2", "share their load"),
            ("gateway.autoscale.enabled=true,queue.backend=none,gateway.autoscaling.enabled=true", "share their load"),
        )
        for switch, expected in incomplete:
            try:
                chart.template([f"--set={switch}"])
            except Refused as error:
                if expected in str(error):
                    continue
            raise Wrong(f"--set {switch}: the error does not mention {expected}")
        return f"{len(bad) + len(incomplete)} invalid values"

    def own_variables(self):
        """The user's variables override those of the chart, with any value."""
        wrong, count = [], 0
        beside = ["--set=provider.image.repository=x", "--set=provider.image.tag=y"]
        for of, deployment, name in (
            ("gateway", "gateway", "read_timeout"),
            ("worker", "queue-worker", "upstream_timeout"),
            ("provider", "gateway", "basic_auth"),
        ):
            for value in ("7s", "0", "false", ""):
                objects = chart.template([*beside, f"--set={of}.env.{name}={value}"])
                [item] = [i for i in objects if (i["kind"], i["metadata"]["name"]) == ("Deployment", deployment)]
                [container] = [c for c in containers(pod_of(item)) if c["name"] == of]
                rendered = [v["value"] for v in container["env"] if v["name"] == name]
                count += 1
                if rendered != [value]:
                    wrong.append(f"{of}.env.{name}={value!r} becomes {rendered}")
        require_none(wrong)
        return f"{count} variables"

    def kubernetes_schemas(self):
        import kubernetes_validate

        wrong, distinct = [], {}
        for name, objects, _ in [*self.cases, *((n, o, []) for n, o in plain.parsed())]:
            for item in objects:
                distinct.setdefault(json.dumps(item, sort_keys=True), (name, item))
        checked = 0
        for name, item in distinct.values():
            for version in KUBERNETES:
                try:
                    kubernetes_validate.validate(item, version, strict=True)
                    checked += 1
                except kubernetes_validate.SchemaNotFoundError as error:
                    if item["kind"] not in CUSTOM:
                        wrong.append((name, f"Couldn't find schema: {error}"))
                except kubernetes_validate.ValidationError as error:
                    what = f"{'.'.join(map(str, error.path))}: {error.message}"
                    wrong.append((name, f"{item['kind']} {item['metadata']['name']} in {version}: {what}"))
        require_none_in_cases(wrong)
        return f"{len(distinct)} distinct objects, {checked} validations for {' and '.join(KUBERNETES)}"

    def references(self):
        """References to pods, ports, ConfigMaps, Secrets and ServiceAccounts; restricted pods; names of settings."""
        known, checked, wrong = settings.by_role(), 0, []
        plains = [(name, objects, ["basic-auth"]) for name, objects in plain.parsed()]
        for name, objects, secrets in [*self.cases, *plains]:
            one = Objects(objects, secrets, known)
            wrong += [(name, what) for what in one.check()]
            checked += one.checked
        require_none_in_cases(wrong)
        return f"{checked} conditions"

    def plain_manifests(self):
        count, wrong = plain.drift()
        needs, early = plain.order()
        require_none(wrong + early)
        return f"{count} files match the output of `make yaml`, {needs} references to earlier files"

    def upgrade(self):
        """A new chart version restarts changed pods, and no others."""
        count, wrong = upgrades.of_versions()
        configs, stale = upgrades.of_configs(self.cases)
        live, lost = upgrades.of_live_objects()
        require_none(wrong + stale + lost)
        return f"{count} pod templates, {configs} configurations, {live} upgrades of a live cluster"

    def settings_in_schema(self):
        """`env` accepts exactly the settings of the program, except for the ports of probes and Services."""
        definitions = json.loads((CHART / "values.schema.json").read_text())["definitions"]
        known, wrong = settings.by_role(), []
        for of, role in (("gateway", "serve"), ("worker", "worker")):
            should = known[role] - {"port", "metrics_port", "worker_metrics_port"}
            taken = set(definitions[f"{of}Settings"]["enum"])
            wrong += [f"{of}.env does not accept {name}" for name in should - taken]
            wrong += [f"{of}.env accepts {name}, which is not a setting" for name in taken - should]
        require_none(sorted(wrong))
        return f"{len(known['serve'] | known['worker'])} settings"

    def chart_readme(self):
        """README.md of the chart lists each value with its default; a template uses each value."""
        values = yaml.load((CHART / "values.yaml").read_text(), Loader)
        leaves = dict(flat(values))
        readme = (CHART / "README.md").read_text()
        documented = dict(re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", readme, re.M))
        wrong = [f"{path} is not in README.md" for path in leaves.keys() - documented.keys()]
        wrong += [f"{path} of README.md is not a value" for path in documented.keys() - leaves.keys()]
        for path in leaves.keys() & documented.keys():
            if documented[path] != json.dumps(leaves[path]):
                wrong.append(f"{path}: README.md has {documented[path]}, values.yaml {json.dumps(leaves[path])}")
        texts = "".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
        for path in leaves:
            # A template refers to the value by its full path, or by its last part inside of a `with`.
            parts = path.split(".")
            if f".Values.{path}" not in texts and not re.search(rf"\.{parts[-1]}\b", texts):
                wrong.append(f"{path} is in no template")
        require_none(sorted(wrong))
        return f"{len(leaves)} values"

    def prometheus_config(self):
        count = set()
        with tempfile.TemporaryDirectory() as place:
            for text in self.config_maps("prometheus"):
                for name, content in text.items():
                    path = Path(place) / name
                    path.write_text(content.replace("/etc/prometheus/", f"{place}/"))
                run("promtool", "check", "config", f"{place}/prometheus.yml")
                count.add(text["prometheus.yml"])
                for path in Path(place).iterdir():
                    path.unlink()
        run("promtool", "check", "rules", names.RULES)
        # The same for the Prometheus operator: the spec of its object is a rule file.
        for _, objects, _ in self.cases:
            for item in (i for i in objects if i["kind"] == "PrometheusRule"):
                with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
                    yaml.safe_dump(item["spec"], file)
                    run("promtool", "check", "rules", file.name)
                    count.add(str(item["spec"]))
        return f"{len(count)} configurations, {len(names.rules())} rules"

    def prometheus_rules(self):
        tests = sorted((ROOT / "tests/manifests/rules").glob("*.yml"))
        with tempfile.TemporaryDirectory() as place:
            # The rules as rendered with a values file, with the test file of the same name.
            for name, objects, _ in self.cases:
                test = ROOT / "tests/manifests/rules" / name.replace(".yaml", ".yml")
                if test in tests:
                    [text] = [i["data"] for i in objects if (i["kind"], i["metadata"]["name"]) == ("ConfigMap", "prometheus")]
                    (Path(place) / "gateway.rules.yml").write_text(text["gateway.rules.yml"])
                    run("promtool", "test", "rules", shutil.copy(test, place))
        run("promtool", "test", "rules", ROOT / "tests/manifests/rules/gateway.yml")
        texts = "".join(path.read_text() for path in tests)
        wrong = [f"{r['alert']} has no test" for r in names.rules() if "alert" in r and r["alert"] not in texts]
        require_none(wrong)
        return f"{len(tests)} files, {texts.count('eval_time')} evaluations"

    def single_numbers(self):
        """Single-value panels of dashboards get exactly one value, for busy, idle and new functions."""
        series = {
            "busy.fn": {"200": "0+90x60", "502": "0+10x60"},
            # Failed once, and has not been called since.
            "idle.fn": {"200": "7x60", "502": "1x60"},
            "new.fn": {},
        }
        calls = [
            {"series": f'{name}{{function_name="{function}", code="{code}", le="+Inf"}}', "values": values}
            for function, codes in series.items()
            for code, values in codes.items()
            for name in ("gateway_function_invocation_total", "gateway_functions_seconds_bucket")
        ]
        asked = [
            names.filled(query, function) for path in names.DASHBOARDS for query in names.single(path) for function in series
        ]
        # A query with `or vector(0)` always has a value; the comparison drops NaN.
        tests = [
            {"expr": f"count(({query}) >= 0)", "eval_time": "14m", "exp_samples": [{"value": 1}]}
            for query in dict.fromkeys(asked)
            if query.endswith("or vector(0)")
        ]
        with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
            yaml.safe_dump({
                "rule_files": [str(names.RULES)],
                "tests": [{"interval": "15s", "input_series": calls, "promql_expr_test": tests}],
            }, file)
            run("promtool", "test", "rules", file.name)
        return f"{len(tests)} queries"

    def alertmanager_config(self):
        configs = {text["alertmanager.yml"] for text in self.config_maps("alertmanager")}
        for text in configs:
            with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
                file.write(text)
                file.flush()
                run("amtool", "check-config", file.name)
        return f"{len(configs)} configurations"

    def nats_config(self):
        """The server accepts its configuration."""
        configs = {text["nats.conf"] for text in self.config_maps("nats")}
        env = {**os.environ, "POD_NAME": "nats-0", "NATS_USER": "gateway", "NATS_PASSWORD": "p1e9"}
        for text in configs:
            with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
                file.write(text)
                file.flush()
                run(shutil.which("nats-server") or "/usr/sbin/nats-server", "-t", "-c", file.name, env=env)
        return f"{len(configs)} configurations"

    def metric_names(self):
        """Source, docs/METRICS.md, rules and dashboards have the same metrics."""
        source, docs = names.in_source(), names.in_docs()
        wrong = [f"{name} is exported, but not in docs/METRICS.md" for name in source - docs.keys()]
        wrong += [f"{name} is in docs/METRICS.md, but not exported" for name in docs.keys() - source]
        asked, missing = names.unknown()
        wrong += [f"{where} queries {name}, which is not exported" for where, name in missing]
        require_none(sorted(wrong))
        return f"{len(source)} metrics, {asked} queries of rules and {len(names.DASHBOARDS)} dashboards"

    def alerts_have_a_page(self):
        page = (ROOT / "docs/OPERATE.md").read_text()
        alerts = [rule["alert"] for rule in names.rules() if "alert" in rule]
        require_none([f"docs/OPERATE.md has no section {alert}" for alert in alerts if f"### {alert}\n" not in page])
        return f"{len(alerts)} alerts"

    def everything_at_work(self):
        """See live.py: a queued call, a scrape, an alert that scales its function, and the queries of dashboards."""
        with tempfile.TemporaryDirectory() as folder, live.Machine(folder) as machine:
            try:
                return self.look_at(machine)
            except (AssertionError, OSError) as error:
                raise Wrong(f"{error}\n{machine.logs()}") from error

    def look_at(self, machine):
        machine.start_all()
        live.eventually("the gateway is ready", lambda: live.get(machine.url("http", "/_/ready")))
        # The worker depends on the gateway, and may have started first.
        live.eventually("the worker is ready", lambda: live.get(machine.url("worker_metrics", "/_/ready")))
        output = machine.helm_test()
        assert "expected: 404" in output, output
        machine.deploy(service="echo", image="-", envProcess="cat", labels={"com.openfaas.scale.max": "5"})
        # Without test.function it calls no function.
        output = machine.helm_test()
        assert "expected: 404" in output, output
        output = machine.helm_test("echo")
        assert "executed: succeeded" in output, output

        def fires():
            for _ in range(20):
                live.get(machine.url("http", "/function/echo"))
            alerts = json.loads(live.get(machine.url("prometheus", "/api/v1/alerts")))["data"]["alerts"]
            return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}

        fired = live.eventually("an alert fires", fires)
        assert fired == {"APIHighInvocationRate"}, fired
        echo = live.eventually(
            "Alertmanager scales the function",
            lambda: next((f for f in [machine.functions()["echo"]] if f["replicas"] > 1), None),
        )
        assert echo["invocationCount"] > 20, echo
        exported, lint = machine.exported()
        docs = names.in_docs()
        require_none([f"{name} is exported as {kind}, but docs/METRICS.md has {docs.get(name)}" for name, kind in exported.items()
            if docs.get(name) != kind])
        # promtool's findings, except for names that operators know from OpenFaaS.
        require_none([line for line in lint if line.split()[0] not in LEGACY_NAMES])
        queries = [query for path in names.DASHBOARDS for query in names.queries(path) if "label_values" not in query]
        with_data = sum(bool(machine.query(names.filled(query, "echo.openfaas-fn"))) for query in queries)
        return (
            f"queued call executed, alert fired, {echo['replicas']} replicas, {echo['invocationCount']} calls counted, "
            f"{len(exported)} metrics, {len(queries)} queries of dashboards ({with_data} with data)"
        )

    def config_maps(self, name):
        found = [item for _, objects, _ in self.cases for item in objects]
        return [i["data"] for i in found if (i["kind"], i["metadata"]["name"]) == ("ConfigMap", name)]


HELPERS = {"config_maps", "look_at"}


def flat(value, path=""):
    """Path and value of each leaf; an empty map is a leaf as well."""
    if isinstance(value, dict) and value and not path.endswith("resources") and not path.endswith("labels"):
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def main():
    only = sys.argv[1:]
    checks, passed, failed = Checks(), 0, 0
    for name, check in vars(Checks).items():
        if not callable(check) or name in HELPERS or only and name not in only:
            continue
        start = time.monotonic()
        try:
            print(f"{name}: {check(checks)} ({time.monotonic() - start:.1f} s)", flush=True)
            passed += 1
        except (Wrong, Refused) as wrong:
            print(f"{name}: FAILED\n  " + str(wrong).replace("\n", "\n  "), flush=True)
            failed += 1
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())

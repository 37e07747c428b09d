"""Names of metrics in the source, in docs/METRICS.md, and in the queries of rules and dashboards."""

import json
import re

import yaml

from chart import CHART, ROOT

RULES = CHART / "rules" / "gateway.yml"
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
# Metrics of Prometheus itself.
BUILT_IN = {"up"}
PREFIX = r"(?:gateway|queue_worker|http)"
# Words of PromQL that look like names.
WORDS = set(
    "sum max min avg count by without on ignoring group_left group_right and or unless offset bool topk bottomk rate "
    "irate increase absent histogram_quantile clamp_min clamp_max label_replace vector time inf nan".split()
)


def in_source():
    """Every metric that the program may export."""
    sources = [path for top in ("src", "crates") for path in (ROOT / top).rglob("*.rs")]
    texts = [path.read_text() for path in sources if "metrics" in path.parts or path.stem == "metrics"]
    texts = [text.split("#[cfg(test)]")[0] for text in texts]
    return {name for text in texts for name in re.findall(rf'"({PREFIX}_[a-z_]+)"', text)}


def in_docs():
    """Name → kind in docs/METRICS.md."""
    text = (ROOT / "docs/METRICS.md").read_text()
    rows = re.findall(r"^\| `([a-z_]+)(?:\{[a-z_, ]*\})?` \| (counter|gauge|histogram) \|", text, re.M)
    return dict(rows)


def series(documented):
    """Names of the series of each metric: histograms have three."""
    for name, kind in documented.items():
        if kind == "histogram":
            yield from (f"{name}_bucket", f"{name}_sum", f"{name}_count")
        else:
            yield name


def rules():
    """Every rule of the chart."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def single(dashboard):
    """The queries of single-value panels."""
    panels = json.loads(dashboard.read_text())["panels"]
    return [target["expr"] for panel in panels if panel["type"] == "stat" for target in panel["targets"]]


def queries(dashboard):
    """All queries of a dashboard."""
    def walk(value):
        if isinstance(value, dict):
            if isinstance(value.get("expr"), str):
                yield value["expr"]
            if isinstance(value.get("query"), str) and value.get("type") == "query":
                yield value["query"]
            for inner in value.values():
                yield from walk(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner)

    return list(walk(json.loads(dashboard.read_text())))


def filled(query, function):
    """A dashboard's query with its variables replaced, as Grafana does."""
    return query.replace("$__rate_interval", "1m").replace("$function", function).replace("$queue", ".+")


def used(expression):
    """Names of series in a PromQL expression."""
    bare = re.sub(r'"[^"]*"|\'[^\']*\'', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    # Removes the labels of aggregations and vector matches.
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    # The second argument of label_values() is a label; names after $ are variables of the dashboard.
    bare = re.sub(r"label_values\(([^,()]+),[^)]*\)", r"\1", bare)
    bare = re.sub(r"\$\w+", "", bare)
    return {name for name in re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare) if name not in WORDS}


def documented_queries():
    """PromQL of the table in docs/METRICS.md."""
    section = (ROOT / "docs/METRICS.md").read_text().split("## Queries")[1].split("\n## ")[0]
    return re.findall(r"^\| .* \| `(.*)` \|$", section, re.M)


def unknown():
    """The number of queries, and the names in them that are not exported: (where, name)."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = set(series(in_docs())) | recorded | BUILT_IN
    asked = [(f"rule {rule.get('alert') or rule['record']}", rule["expr"]) for rule in rules()]
    asked += [(path.name, query) for path in DASHBOARDS for query in queries(path)]
    asked += [("docs/METRICS.md", query) for query in documented_queries()]
    missing = [(where, name) for where, query in asked for name in sorted(used(query) - known)]
    return len(asked), missing

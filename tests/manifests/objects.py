"""Invariants of the objects of one rendering: all references resolve, and every pod is restricted."""

import re

import yaml

WORKLOADS = {"Deployment", "StatefulSet", "Pod"}
# Objects that Kubernetes creates in every namespace.
BUILT_IN = {("ConfigMap", "kube-root-ca.crt")}
CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding"}


class Objects:
    """The objects of one rendering, and the problems found in them."""

    def __init__(self, objects, secrets_of_others=(), known_settings=None):
        self.objects = objects
        self.others = set(secrets_of_others)
        self.settings = known_settings or {}
        self.wrong = []
        self.checked = 0

    def check(self):
        """Checks all objects; returns the list of problems."""
        seen = set()
        for item in self.objects:
            key = (item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"])
            self.expect(key not in seen, item, "appears twice")
            seen.add(key)
            namespaced = item["kind"] not in CLUSTER_WIDE
            self.expect(namespaced == bool(key[1]), item, "must have a namespace exactly if its kind is namespaced")
        for item in self.objects:
            if item["kind"] in WORKLOADS:
                self.workload(item)
            else:
                getattr(self, item["kind"], lambda _: None)(item)
        return self.wrong

    def expect(self, holds, item, what):
        self.checked += 1
        if not holds:
            self.wrong.append(f"{item['kind']} {item['metadata']['name']}: {what}")

    # --- finding ---

    def find(self, kind, name):
        for item in self.objects:
            if (item["kind"], item["metadata"]["name"]) == (kind, name):
                return item
        return None

    def pods(self, labels):
        """Pods that a selector of `labels` matches."""
        pods = [(item, pod_of(item)) for item in self.objects if item["kind"] in WORKLOADS]
        return [
            pod
            for item, pod in pods
            if labels.items() <= labels_of(item if item["kind"] == "Pod" else item["spec"]["template"]).items()
        ]

    def selects(self, item, labels, what="selector"):
        self.expect(labels and self.pods(labels), item, f"{what} {labels} matches no pod")

    def refers(self, item, kind, name, keys=()):
        """`item` uses `keys` of the object `kind` `name`."""
        if (kind, name) in BUILT_IN or kind == "Secret" and name in self.others:
            return
        target = self.find(kind, name)
        self.expect(target, item, f"{kind} {name} does not exist")
        for key in keys if target else ():
            held = {**target.get("data", {}), **target.get("stringData", {})}
            self.expect(key in held, item, f"{kind} {name} has no key {key}")

    # --- kinds ---

    def Service(self, item):
        labels = item["spec"]["selector"]
        self.selects(item, labels)
        for port in item["spec"]["ports"]:
            for pod in self.pods(labels):
                self.expect(port["targetPort"] in port_names(pod), item, f"no pod has a port {port['targetPort']}")
        is_node_port = item["spec"].get("type") == "NodePort"
        self.expect(
            all(is_node_port == ("nodePort" in port) for port in item["spec"]["ports"]),
            item,
            "nodePort and the type NodePort require each other",
        )

    def PodDisruptionBudget(self, item):
        self.selects(item, item["spec"]["selector"]["matchLabels"])

    def NetworkPolicy(self, item):
        labels = item["spec"]["podSelector"]["matchLabels"]
        self.selects(item, labels)
        for rule in item["spec"]["ingress"]:
            for peer in rule.get("from", []):
                # A peer that is not deployed is harmless, a misspelled one is not.
                names = {"gateway", "queue-worker", "nats", "prometheus"}
                own = "namespaceSelector" not in peer
                self.expect(not own or peer["podSelector"]["matchLabels"]["app"] in names, item, f"unknown peer {peer}")
            for port in rule["ports"]:
                for pod in self.pods(labels):
                    self.expect(port["port"] in port_numbers(pod), item, f"no pod has the port {port['port']}")

    def HorizontalPodAutoscaler(self, item):
        target = item["spec"]["scaleTargetRef"]
        found = self.find(target["kind"], target["name"])
        self.expect(found, item, f"its target {target} does not exist")
        self.expect("replicas" not in found["spec"], item, "its target sets replicas")

    def RoleBinding(self, item):
        role = item["roleRef"]
        self.refers(item, role["kind"], role["name"])
        for subject in item["subjects"]:
            self.refers(item, subject["kind"], subject["name"])

    ClusterRoleBinding = RoleBinding

    def Role(self, item):
        for rule in item["rules"]:
            wild = "*" in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            self.expect(not wild, item, "a rule allows everything")

    ClusterRole = Role

    def Ingress(self, item):
        for tls in item["spec"].get("tls", []):
            self.refers(item, "Secret", tls["secretName"])
        for rule in item["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                self.reaches(item, backend["name"], backend["port"].get("name") or backend["port"]["number"])

    def HTTPRoute(self, item):
        for rule in item["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                self.reaches(item, backend["name"], backend["port"])

    def ServiceMonitor(self, item):
        wanted = item["spec"]["selector"]["matchLabels"].items()
        services = [s for s in self.objects if s["kind"] == "Service" and wanted <= labels_of(s).items()]
        self.expect(services, item, "matches no Service")
        for service in services:
            for endpoint in item["spec"]["endpoints"]:
                self.reaches(item, service["metadata"]["name"], endpoint["port"])

    def ConfigMap(self, item):
        """Whoever is named by host and port in a file is there."""
        for text in item["data"].values():
            for host, port in re.findall(r"\b(gateway|alertmanager|prometheus|nats)(?:\.[a-z-]+)?:(\d+)\b", text):
                self.reaches(item, host, int(port))
        for job in yaml.safe_load(item["data"].get("prometheus.yml", "{}")).get("scrape_configs", []):
            for dns in job["dns_sd_configs"]:
                for name in dns["names"]:
                    self.reaches(item, name, dns["port"])

    def reaches(self, item, service, port):
        """`port` by name or number is one of `service`."""
        self.refers(item, "Service", service)
        ports = (self.find("Service", service) or {"spec": {"ports": []}})["spec"]["ports"]
        self.expect(any(port in (p["name"], p["port"]) for p in ports), item, f"Service {service} has no port {port}")

    # --- pods ---

    def workload(self, item):
        pod = pod_of(item)
        if item["kind"] != "Pod":
            template = item["spec"]["template"]
            labels = item["spec"]["selector"]["matchLabels"]
            self.expect(labels.items() <= labels_of(template).items(), item, "its selector does not match its pods")
            annotations = template["metadata"].get("annotations", {})
            if annotations.get("prometheus.io/scrape") == "true":
                port = annotations.get("prometheus.io/port")
                self.expect(int(port or 0) in port_numbers(pod), item, f"is scraped at {port}, which is not a port of it")
        if item["kind"] == "StatefulSet":
            self.refers(item, "Service", item["spec"]["serviceName"])
        for spread in pod.get("topologySpreadConstraints", []):
            self.selects(item, spread["labelSelector"]["matchLabels"], "topology spread")
        if pod.get("serviceAccountName"):
            self.refers(item, "ServiceAccount", pod["serviceAccountName"])
        for secret in pod.get("imagePullSecrets", []):
            self.refers(item, "Secret", secret["name"])
        volumes = self.volumes(item, pod)
        for container in containers(pod):
            self.container(item, pod, container, volumes)
        self.restricted(item, pod)

    def volumes(self, item, pod):
        """The files of each volume; None if they are unknown."""
        volumes = {claim["metadata"]["name"]: None for claim in item["spec"].get("volumeClaimTemplates", [])}
        for volume in pod.get("volumes", []):
            sources = volume.get("projected", {}).get("sources", [volume])
            files = [self.files(item, source) for source in sources]
            volumes[volume["name"]] = None if None in files else set().union(*files)
        return volumes

    def files(self, item, source):
        if "persistentVolumeClaim" in source:
            self.refers(item, "PersistentVolumeClaim", source["persistentVolumeClaim"]["claimName"])
        for field, kind in (("configMap", "ConfigMap"), ("secret", "Secret")):
            if field in source:
                name = source[field].get("name") or source[field].get("secretName")
                items = source[field].get("items", [])
                self.refers(item, kind, name, [i["key"] for i in items])
                held = (self.find(kind, name) or {}).get("data", {})
                return {i["path"] for i in items} or set(held)
        return None

    def container(self, item, pod, container, volumes):
        name = container["name"]
        for mount in container.get("volumeMounts", []):
            self.expect(mount["name"] in volumes, item, f"{name} mounts {mount['name']}, which is not a volume")
            files = volumes.get(mount["name"])
            if "subPath" in mount and files is not None:
                self.expect(mount["subPath"] in files, item, f"{name} mounts {mount['subPath']}, which is not a file")
        mounted = [mount["name"] for mount in container.get("volumeMounts", [])]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if probe in container:
                port = container[probe]["httpGet"]["port"]
                own = {p["name"] for p in container["ports"]}
                self.expect(port in own, item, f"{probe} of {name} uses port {port}, which {name} does not have")
        names = [variable["name"] for variable in container.get("env", [])]
        self.expect(len(names) == len(set(names)), item, f"{name} has a variable twice")
        for variable in container.get("env", []):
            for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                if field in variable.get("valueFrom", {}):
                    ref = variable["valueFrom"][field]
                    self.refers(item, kind, ref["name"], [ref["key"]])
        for source in container.get("envFrom", []):
            for field, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
                if field in source:
                    self.refers(item, kind, source[field]["name"])
        self.expect(re.search(r":[^:/]+$", container["image"]), item, f"{name}'s image has no tag")
        for kind in ("requests", "limits"):
            self.expect("memory" in container["resources"].get(kind, {}), item, f"{name} has no {kind} for memory")
        if container.get("args", [""])[0] in ("serve", "worker"):
            self.gateway(item, pod, container, mounted)

    def gateway(self, item, pod, container, mounted):
        """Containers of the gateway: their variables are settings, and the hosts in them exist."""
        env = {v["name"]: v.get("value") for v in container["env"]}
        role = container["args"][0]
        for name in env:
            self.expect(name in self.settings.get(role, ()), item, f"{name} is not a setting of {role}")
        seconds = sum(int(env.get(name, "0s")[:-1]) for name in ("shutdown_delay", "shutdown_grace"))
        grace = pod["terminationGracePeriodSeconds"]
        self.expect(grace > seconds, item, f"is killed after {grace} s, but takes {seconds} s to stop")
        for host, port in (
            ("faas_nats_address", "faas_nats_port"),
            ("faas_gateway_address", "faas_gateway_port"),
            ("faas_prometheus_host", "faas_prometheus_port"),
        ):
            # Skips host names outside of the namespace, and Services that the operator provides.
            if "." not in env.get(host, ".") and self.find("Service", env[host]):
                self.reaches(item, env[host], int(env[port]))
        if "faas_nats_address" in env and "." not in env["faas_nats_address"]:
            self.refers(item, "Service", env["faas_nats_address"])
        if role == "worker":
            # The largest request body, and the largest response of a callback.
            body = int(env_of(self.find("Deployment", "gateway"))["max_async_body_bytes"])
            most = int(env["max_inflight"]) * (body + (16 << 20))
            limit = container["resources"]["limits"]["memory"]
            self.expect(bytes_of(limit) > most, item, f"may need {most} bytes, but is killed at {limit}")
            if "functions_provider_url" not in env:
                # The gateway must time out first and respond 504; otherwise it would count a disconnected client.
                gateway = env_of(self.find("Deployment", "gateway"))
                most = seconds_of(gateway["upstream_timeout"])
                if gateway["scale_from_zero"] == "true":
                    most += seconds_of(gateway.get("cold_start_timeout", "60s"))
                wait = env["upstream_timeout"]
                self.expect(seconds_of(wait) > most, item, f"waits for {wait}, but the gateway may take {most} s")
        for other in (c for c in containers(pod) if c["name"] == "provider"):
            # Otherwise the provider would abort calls before the gateway's timeout.
            given = {v["name"]: v.get("value") for v in other["env"]}
            enough = seconds_of(given["write_timeout"]) > seconds_of(env["upstream_timeout"])
            self.expect(enough, item, f"the provider times out after {given['write_timeout']}")
        for probe in ("startupProbe", "livenessProbe"):
            # A probe on the client port would kill a gateway at its connection limit.
            self.expect(container[probe]["httpGet"]["port"] == "metrics", item, f"{probe} uses the client port")
        self.expect((env["basic_auth"] == "true") == ("auth" in mounted), item, "must mount credentials exactly if basic_auth is on")

    def restricted(self, item, pod):
        """Pod Security "restricted", and a read-only root file system."""
        context = pod.get("securityContext", {})
        self.expect(context.get("runAsNonRoot") is True, item, "may run as root")
        self.expect(context.get("runAsUser") != 0, item, "runs as root")
        profile = context.get("seccompProfile", {}).get("type")
        self.expect(profile == "RuntimeDefault", item, "has no seccomp profile")
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            self.expect(not pod.get(field), item, f"has {field}")
        allowed = {"configMap", "secret", "emptyDir", "projected", "persistentVolumeClaim"}
        for volume in pod.get("volumes", []):
            self.expect(set(volume) - {"name"} <= allowed, item, f"mounts {volume}")
        for container in containers(pod):
            own = container.get("securityContext", {})
            for field, value in (("allowPrivilegeEscalation", False), ("readOnlyRootFilesystem", True)):
                self.expect(own.get(field) is value, item, f"{container['name']}: {field} is not {value}")
            self.expect(own.get("capabilities") == {"drop": ["ALL"]}, item, f"{container['name']} has capabilities")


def pod_of(item):
    return item["spec"] if item["kind"] == "Pod" else item["spec"]["template"]["spec"]


def env_of(item):
    """The variables of a workload's first container."""
    return {v["name"]: v.get("value") for v in pod_of(item)["containers"][0]["env"]}


def seconds_of(duration):
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([0-9.]+)([a-z]*)", duration))


def bytes_of(quantity):
    return int(quantity[:-2]) << {"Ki": 10, "Mi": 20, "Gi": 30}[quantity[-2:]]


def labels_of(item):
    return item["metadata"].get("labels", {})


def containers(pod):
    return pod["containers"] + pod.get("initContainers", [])


def port_names(pod):
    return {port["name"] for c in containers(pod) for port in c.get("ports", [])}


def port_numbers(pod):
    return {port["containerPort"] for c in containers(pod) for port in c.get("ports", [])}

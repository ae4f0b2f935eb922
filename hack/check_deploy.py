"""The checks of hack/check-deploy, which installs what this needs."""

import hashlib
import http.server
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import helm_python
import jsonschema
import kubernetes_validate
import pydantic
import yaml
from cloudcoil.models.prometheus_operator import v1 as prometheus

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy/helm/ccnode"
VALUES = ROOT / "deploy/helm/values"
NAMESPACE = "ccnode"

# The oldest that the chart's policies work on, the newest that the tool knows.
VERSIONS = ["1.32", "1.37"]
# Kinds of others than Kubernetes: those of the Prometheus Operator by types that are made from its own schemas, the rest by ours.
PROMETHEUS = {("monitoring.coreos.com/v1", kind) for kind in ("PodMonitor", "PrometheusRule", "ServiceMonitor")}
SCHEMAS = yaml.safe_load((ROOT / "hack/check-deploy.schemas.yaml").read_text())
FOREIGN = {
    ("nfd.k8s-sigs.io/v1alpha1", "NodeFeatureRule"),
    ("security.openshift.io/v1", "SecurityContextConstraints"),
}

# Every switch of the chart, with what it is not by default.
SWITCHES = {
    "mode": "observe",
    "ccManager.enabled": False,
    "vfioManager.enabled": False,
    "devicePlugin.enabled": False,
    "nodes.workloadConfig": False,
    "nodes.enabledLabel": False,
    "ccManager.hostPID": False,
    "ccManager.onBusy": "wait",
    "ccManager.pauseOperator.enabled": True,
    "vfioManager.loadModules": False,
    "vfioManager.statusFiles": True,
    "vfioManager.takeFromDriver": True,
    "vfioManager.select": ["model=H100", "numa=0"],
    "vfioManager.bindNVSwitches": True,
    "devicePlugin.ccGate": "off",
    "devicePlugin.gpuAlias": "",
    "devicePlugin.vfioBackend": "legacy",
    "devicePlugin.deviceIdScheme": "pci",
    "devicePlugin.ppciePolicy": "enforce",
    "devicePlugin.features": True,
    "hostPaths.cdi": "/etc/cdi",
    "hostPaths.cdiStatic": "",
    "openshift.enabled": True,
    "rbac.create": False,
    "policies.enabled": False,
    "policies.operator.enabled": True,
    "policies.ppcie.enabled": False,
    "networkPolicy.enabled": False,
    "networkPolicy.scrapers": {"kubernetes.io/metadata.name": "monitoring"},
    "networkPolicy.apiServerCIDRs": ["10.0.0.1/32"],
    "prometheus.podMonitor.enabled": True,
    "prometheus.serviceMonitor.enabled": True,
    "prometheus.rules": {"enabled": True, "runbookBase": "https://docs.example.org/ccnode"},
    "grafana.enabled": True,
    "nfd.rules": True,
    "runtimeClasses.enabled": True,
    "namespace.create": True,
    "cleanup.enabled": False,
    "global.registry": "registry.example.org/ccnode",
    "global.imagePullSecrets": ["one", "two"],
    "tolerations": [],
    "priorityClassName": "",
    "podLabels": {"team": "platform"},
    "podAnnotations": {"example.org/owner": "platform"},
    "nodes.selector": {"topology.kubernetes.io/zone": "a"},
    "hostPaths.kubelet": "/var/lib/k0s/kubelet",
    "logs.format": "text",
    "ccManager.defaultMode": "ppcie",
    "ccManager.teeMissing": "hold",
    "ccManager.image.digest": "sha256:" + 64 * "a",
    "ccManager.extraEnv": [{"name": "RUST_BACKTRACE", "value": "1"}],
    "selinux.vfioManager": "",
    "policies.modeUsers": ["alice"],
    "prometheus.podMonitor.operator": {"enabled": True},
    "runtimeClasses.countKeys": True,
}

# Values that are refused, and what is said then.
REFUSED = [
    ({"mode": "audit"}, ["mode", "enforce", "observe"]),
    ({"ccManager": {"defaultMode": "confidential"}}, ["defaultMode", "devtools"]),
    ({"ccManager": {"allowedModes": ["on", "prod"]}}, ["allowedModes"]),
    ({"ccManager": {"allowedModes": ["off"]}}, ['defaultMode "on" is not among ccManager.allowedModes (off)']),
    ({"ccManager": {"holdDown": "fast"}}, ["holdDown"]),
    ({"devicePlugin": {"gpuAlias": "nvidia.com/pgpu"}}, ["gpuAlias"]),
    ({"devicePlugin": {"gpuAlias": "-gpu"}}, ["gpuAlias"]),
    ({"devicePlugin": {"nvswitchAlias": "8switches"}}, ["nvswitchAlias"]),
    ({"devicePlugin": {"gpuAlias": "gpu", "nvswitchAlias": "gpu"}}, ['gpuAlias and devicePlugin.nvswitchAlias are both "gpu"']),
    ({"devicePlugin": {"gpuAlias": ""}}, ["policies.ppcie counts the resources"]),
    ({"vfioManager": {"select": ["41:00.0"]}}, ["select"]),
    ({"vfioManager": {"select": [""]}}, ["select"]),
    ({"nodes": {"workloadConfig": False, "enabledLabel": False}}, ["No node is selected"]),
    (
        {"ccManager": {"enabled": False}, "vfioManager": {"enabled": False}, "devicePlugin": {"enabled": False}},
        ["All three agents are off"],
    ),
    ({"ccManager": {"enabled": False}}, ["no GPU would ever be offered"]),
    ({"ccManger": {"enabled": False}}, ["ccManger"]),
    ({"devicePlugin": {"image": {"repository": "device-plugin", "digest": "sha256:abc"}}}, ["digest"]),
    ({"hostPaths": {"kubelet": "var/lib/kubelet"}}, ["kubelet"]),
    ({"devicePlugin": {"vfioBackend": "vfio"}}, ["vfioBackend", "iommufd"]),
    ({"devicePlugin": {"deviceIdScheme": "bdf"}}, ["deviceIdScheme", "iommu"]),
    ({"devicePlugin": {"ppciePolicy": "refuse"}}, ["ppciePolicy", "enforce"]),
    ({"devicePlugin": {"ccGate": "on"}}, ["ccGate", "require"]),
    ({"ccManager": {"onBusy": "evict"}}, ["onBusy", "refuse"]),
    ({"cleanup": {"seconds": 0}}, ["seconds"]),
    ({"metrics": {"port": 80}}, ["port"]),
    (
        {"prometheus": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}},
        ["each would be read twice"],
    ),
    ({"prometheus": {"rules": {"enabled": True}}}, ["set prometheus.rules.runbookBase"]),
    ({"prometheus": {"rules": {"runbookBase": "docs"}}}, ["runbookBase"]),
]

# A ClusterPolicy's spec, the values, and which agents are named in the refusal; none: it is no trouble.
BESIDE = [
    ({"sandboxWorkloads": {"enabled": True, "mode": "kata"}}, {}, "ccManager, vfioManager, devicePlugin"),
    ({"sandboxWorkloads": {"enabled": False, "mode": "kata"}}, {}, None),
    ({}, {}, None),
    (
        {"sandboxWorkloads": {"enabled": True, "mode": "kata"}, "ccManager": {"enabled": False}},
        {"vfioManager": {"enabled": False}, "devicePlugin": {"enabled": False}},
        None,
    ),
    (
        {"sandboxWorkloads": {"enabled": True, "mode": "kata"}, "ccManager": {"enabled": True}},
        {"vfioManager": {"enabled": False}, "devicePlugin": {"enabled": False}},
        "ccManager",
    ),
    # The operator's other mode runs neither a cc-manager nor a plugin for Kata, but one for KubeVirt.
    ({"sandboxWorkloads": {"enabled": True, "mode": "kubevirt"}}, {}, "vfioManager, devicePlugin"),
    ({"sandboxWorkloads": {"enabled": True, "mode": "kata"}}, {"mode": "observe"}, "ccManager"),
]

# Committed renderings: file, values, what of it.
RENDERED = ROOT / "deploy/rendered"
SOURCES = RENDERED / "sources.sha256"


class Failure(Exception):
    """Something is not as it should be."""


def nested(switches):
    """{'a.b': 1} as {'a': {'b': 1}}."""
    result = {}
    for name, value in switches.items():
        *folders, last = name.split(".")
        at = result
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = value
    return result


def merged(one, other):
    """Values of the one, with those of the other over them."""
    result = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


class Helm:
    """Renders the chart: by the program helm where there is one, else by its engine as a library."""

    def __init__(self):
        self.program = shutil.which("helm")
        self.chart = None if self.program else helm_python.Chart.load(CHART)

    def name(self):
        if self.program:
            version = subprocess.run([self.program, "version", "--short"], capture_output=True, text=True, check=True)
            return f"helm {version.stdout.strip()}"
        return f"Helm's engine {helm_python.helm_sdk_version()} (helm-python-sdk {helm_python.__version__})"

    def render(self, values):
        """The text of each template, by its path within the chart; Failure with Helm's words when it refuses."""
        if not self.program:
            try:
                self.chart.validate_schema(values)
                files = self.chart.render(values, name="ccnode", namespace=NAMESPACE)
            except helm_python.HelmError as error:
                raise Failure(str(error)) from error
            texts = {path.removeprefix("ccnode/templates/"): text for path, text in files.items() if text.strip()}
            texts.pop("NOTES.txt", None)
            return dict(sorted(texts.items()))
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(values, file)
            file.flush()
            command = [self.program, "template", "ccnode", str(CHART), "--namespace", NAMESPACE, "--values", file.name]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise Failure(result.stderr)
        texts = {}
        for part in re.split(r"^---$\n?", result.stdout, flags=re.MULTILINE):
            if match := re.match(r"# Source: ccnode/templates/(\S+)\n", part):
                texts[match[1]] = texts.get(match[1], "") + "---\n" + part[match.end() :]
        return dict(sorted(texts.items()))


def objects(text):
    """The objects of a text."""
    return [item for item in yaml.safe_load_all(text) if item]


def is_hook(item):
    return "helm.sh/hook" in item.get("metadata", {}).get("annotations", {})


def unknown_to(given, kept, path=""):
    """The first part of what was given that was not kept; None: it is all there."""
    if isinstance(given, dict) and isinstance(kept, dict):
        missing = next((f"{path}.{key} is unknown" for key in given if key not in kept), None)
        return missing or next(filter(None, (unknown_to(value, kept[key], f"{path}.{key}") for key, value in given.items())), None)
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = enumerate(zip(given, kept, strict=True))
        return next(filter(None, (unknown_to(one, other, f"{path}[{index}]") for index, (one, other) in pairs)), None)
    return None if given == kept else f"{path}: {given} became {kept}"


def complaint_of(kind, item):
    """What is wrong with an object of a foreign kind; None: nothing."""
    if kind in PROMETHEUS:
        try:
            read = getattr(prometheus, kind[1]).model_validate(item)
        except pydantic.ValidationError as error:
            return str(error)
        return unknown_to(item, read.model_dump(by_alias=True, exclude_none=True, mode="json"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(SCHEMAS[kind[1]]).iter_errors(item))
    return f"{error.json_path}: {error.message}" if error else None


class Schemas:
    """Objects against Kubernetes' schemas; each different one once."""

    def __init__(self):
        self.seen = set()
        self.foreign = set()

    def check(self, item, where):
        kind = (item.get("apiVersion"), item.get("kind"))
        text = json.dumps(item, sort_keys=True)
        if text in self.seen:
            return
        self.seen.add(text)
        if kind in PROMETHEUS | FOREIGN:
            self.foreign.add(kind[1])
            if complaint := complaint_of(kind, item):
                raise Failure(f"{where}: {kind[1]} {item['metadata'].get('name')}: {complaint}")
            return
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(item, version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                message = getattr(error, "message", str(error))
                raise Failure(f"{where}: {kind[1]} {item['metadata'].get('name')}, {version}: {message}") from error


def check_object(item, where):
    """What Kubernetes' schemas do not say."""
    name = f"{where}: {item['kind']} {item['metadata']['name']}"
    if item["kind"] == "PrometheusRule" and "RUNBOOKS" in json.dumps(item):
        raise Failure(f"{name}: an alert's runbook has no address")
    if item["kind"] != "DaemonSet":
        return
    pod = item["spec"]["template"]["spec"]
    agent = item["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
    if pod["automountServiceAccountToken"] != (agent in ("cc-manager", "cleanup")):
        raise Failure(f"{name}: whether it has a token")
    if pod["securityContext"]["seccompProfile"] != {"type": "RuntimeDefault"}:
        raise Failure(f"{name}: no seccomp profile")
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"] + pod.get("initContainers", []):
        context = container["securityContext"]
        if not context["readOnlyRootFilesystem"]:
            raise Failure(f"{name}: its root can be written to")
        if context["privileged"] != (agent == "cc-manager"):
            raise Failure(f"{name}: privileged is for cc-manager alone")
        if not context["privileged"] and "ALL" not in context["capabilities"]["drop"]:
            raise Failure(f"{name}: capabilities are not dropped")
        if not {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes:
            raise Failure(f"{name}: a mount without volume")
        environment = {item["name"]: item.get("value") for item in container.get("env", [])}
        if environment.get("CCNODE_MODE") == "observe" and agent in ("vfio-manager", "device-plugin"):
            # Its units.json is what it tells by.
            writable = {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            if not writable <= {"tmp", "plugins"} or context["capabilities"].get("add"):
                raise Failure(f"{name}: it only observes, and could change something: {writable}")
        if not container["resources"].get("requests"):
            raise Failure(f"{name}: no requests")


def variants(helm, schemas):
    """Every switch and every pair of switches, from the default."""
    done, refused = 0, 0
    singles = [[name] for name in SWITCHES]
    pairs = [list(pair) for pair in itertools.combinations(SWITCHES, 2)]
    for names in [[], *singles, *pairs]:
        values = nested({name: SWITCHES[name] for name in names})
        where = "with " + (", ".join(names) or "nothing set")
        try:
            texts = helm.render(values)
        except Failure as error:
            # What contradicts itself is refused in our own words.
            known = ["each would be read twice", "No node is selected", "no GPU would ever", "policies.ppcie counts", "All three"]
            if not any(text in str(error) for text in known):
                raise Failure(f"{where}: {error}") from error
            refused += 1
            continue
        check_rendering(texts, where, schemas)
        done += 1
    return f"{done} variants of {len(SWITCHES)} switches, alone and in pairs; {refused} more contradict themselves and are refused"


def check_rendering(texts, where, schemas):
    found = set()
    for path, text in texts.items():
        for item in objects(text):
            identity = (item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"])
            if identity in found:
                raise Failure(f"{where}: {path}: {identity} twice")
            found.add(identity)
            schemas.check(item, f"{where}: {path}")
            check_object(item, f"{where}: {path}")


def documented(helm, schemas):
    files = sorted(VALUES.glob("*.yaml"))
    for file in files:
        values = yaml.safe_load(file.read_text())
        check_rendering(helm.render(values), file.name, schemas)
    return f"{len(files)} values files: {', '.join(file.stem for file in files)}"


def lint(_helm, _schemas):
    for file in [None, *sorted(VALUES.glob("*.yaml"))]:
        values = yaml.safe_load(file.read_text()) if file else {}
        report = helm_python.lint(CHART, values, strict=True, namespace=NAMESPACE, kube_version="v1.33.0")
        bad = [message for message in report["messages"] if message["severity"] > 1]
        if bad:
            raise Failure(f"{file.name if file else 'default'}: {bad}")
    return "the chart, with each values file"


def refusals(helm, _schemas):
    for values, words in REFUSED:
        try:
            helm.render(values)
        except Failure as error:
            missing = [word for word in words if word not in str(error)]
            if missing:
                raise Failure(f"{values}: the message lacks {missing}: {error}") from error
            continue
        raise Failure(f"{values} is not refused")
    return f"{len(REFUSED)} wrong values"


class Cluster(http.server.BaseHTTPRequestHandler):
    """As much of an API server as the chart's lookup asks."""

    spec = None
    minor = 33

    def do_GET(self):
        group = {"name": "nvidia.com", "versions": [{"groupVersion": "nvidia.com/v1", "version": "v1"}]}
        group["preferredVersion"] = group["versions"][0]
        item = {"apiVersion": "nvidia.com/v1", "kind": "ClusterPolicy", "metadata": {"name": "cluster-policy"}}
        answers = {
            "/version": {"major": "1", "minor": str(self.minor), "gitVersion": f"v1.{self.minor}.4"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]},
            "/apis/nvidia.com/v1": {
                "kind": "APIResourceList",
                "groupVersion": "nvidia.com/v1",
                "resources": [
                    {"name": "clusterpolicies", "kind": "ClusterPolicy", "namespaced": False, "verbs": ["get", "list"]}
                ],
            },
            "/apis/nvidia.com/v1/clusterpolicies": {
                "apiVersion": "nvidia.com/v1",
                "kind": "ClusterPolicyList",
                "metadata": {"resourceVersion": "1"},
                "items": [{**item, "spec": self.spec}],
            },
        }
        answer = answers.get(self.path.split("?")[0])
        body = json.dumps(answer or {"kind": "Status", "code": 404}).encode()
        self.send_response(200 if answer else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def beside(_helm, _schemas):
    """What is refused because of the cluster: a GPU Operator that runs the same agents, and an old Kubernetes."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cluster)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    cluster = {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
    cluster["clusters"] = [{"name": "here", "cluster": {"server": address}}]
    cluster["contexts"] = [{"name": "here", "context": {"cluster": "here", "user": "me"}}]
    cluster["users"] = [{"name": "me", "user": {"token": "none"}}]

    def said_to(values, ask=lambda config, chart, values: config.render(chart, values, name="ccnode", namespace=NAMESPACE)):
        config = helm_python.Config(kubeconfig_content=yaml.safe_dump(cluster), namespace=NAMESPACE)
        with config, helm_python.Chart.load(CHART) as chart:
            try:
                ask(config, chart, values)
            except helm_python.HelmError as error:
                return str(error)
        return None

    for spec, values, named in BESIDE:
        Cluster.spec = spec
        said = said_to(values)
        wanted = f"ClusterPolicy cluster-policy of the GPU Operator runs the same agents: {named}. "
        if (said is None) != (named is None) or (named and wanted not in said):
            raise Failure(f"beside {spec} with {values}: {said}")
    # Rendering alone does not ask which Kubernetes it is.
    Cluster.spec, Cluster.minor = {}, 31
    install = lambda config, chart, values: config.install(chart, "ccnode", values, dry_run="server")
    wanted = "Kubernetes has since 1.32; this is v1.31.4. Set policies.enabled=false"
    if wanted not in (said := said_to({}, install) or "nothing"):
        raise Failure(f"policies on Kubernetes 1.31: {said}")
    # This cluster is too small to install anything: it gets as far as that.
    if "unable to build kubernetes objects" not in (said := said_to({"policies": {"enabled": False}}, install) or "nothing"):
        raise Failure(f"without policies on Kubernetes 1.31: {said}")
    server.shutdown()
    return f"{len(BESIDE)} ClusterPolicies; Kubernetes 1.31 only without policies"


def head(of):
    return f"# {of}\n# Made by hack/check-deploy --write; do not edit.\n"


def joined(texts, wanted=lambda item: True):
    """The templates' texts as one, without those objects that are not wanted."""
    parts = []
    for path, text in texts.items():
        for part in re.split(r"^---\s*$\n?", text, flags=re.MULTILINE):
            items = objects(part)
            if items and wanted(items[0]):
                body = part.strip("\n")
                parts.append(f"---\n# Source: {path}\n{body}\n")
    return "".join(parts)


def renderings(helm):
    """Each committed file with what is to be in it."""
    default = helm.render({})
    everything = helm.render(yaml.safe_load((VALUES / "everything.yaml").read_text()))
    observe = helm.render(yaml.safe_load((VALUES / "observe.yaml").read_text()))
    base = helm.render({"namespace": {"create": True}})
    policies = helm.render(yaml.safe_load((VALUES / "operator-policies.yaml").read_text()))
    images = sorted({image for text in default.values() for image in re.findall(r"\bimage: (\S+)", text)})
    manager = lambda text: text.replace("app.kubernetes.io/managed-by: Helm", "app.kubernetes.io/managed-by: ccnode")
    files = {
        RENDERED / "default.yaml": head("The chart with its default values.") + joined(default),
        RENDERED / "observe.yaml": head("The chart with deploy/helm/values/observe.yaml.") + joined(observe),
        RENDERED / "everything.yaml": head("The chart with deploy/helm/values/everything.yaml.") + joined(everything),
        # Kustomize knows no hooks: ccnode cleanup is run by hand there.
        ROOT / "deploy/kustomize/base/ccnode.yaml": manager(
            head("The chart with its default values and its namespace, without Helm's hooks.")
            + joined(base, lambda item: not is_hook(item))
        ),
        ROOT / "deploy/policies/gpu-operator.yaml": manager(
            head("Admission policies for the service accounts of the GPU Operator's agents (Kubernetes 1.32 or newer).")
            + joined(policies, lambda item: item["kind"].startswith("ValidatingAdmissionPolicy"))
        ),
        ROOT / "deploy/images.txt": "".join(f"{image}\n" for image in images),
    }
    sources = [path for path in sorted(CHART.rglob("*")) if path.is_file()]
    sources += [VALUES / "everything.yaml", VALUES / "observe.yaml", VALUES / "operator-policies.yaml"]
    digests = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(ROOT)}\n" for path in sources)
    files[SOURCES] = "".join(digests)
    return files


def committed(helm, schemas):
    files = renderings(helm)
    for path, text in files.items():
        if not path.exists() or path.read_text() != text:
            raise Failure(f"{path.relative_to(ROOT)} is not what the chart renders; run hack/check-deploy --write")
        if path.suffix == ".yaml":
            for item in objects(text):
                schemas.check(item, str(path.relative_to(ROOT)))
    return f"{len(files)} files are what the chart renders"


def kustomize(_helm, schemas):
    count = 0
    for folder in sorted(path.parent for path in (ROOT / "deploy/kustomize").rglob("kustomization.yaml")):
        result = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
        if result.returncode:
            raise Failure(f"{folder.relative_to(ROOT)}: {result.stderr}")
        for item in objects(result.stdout):
            schemas.check(item, str(folder.relative_to(ROOT)))
            check_object(item, str(folder.relative_to(ROOT)))
            count += 1
    return f"{count} objects of base and example"


def strictness(_helm, schemas):
    """A mistake in an object of a foreign kind is seen, wherever it is."""
    seen = 0
    for item in objects((RENDERED / "everything.yaml").read_text()):
        kind = (item["apiVersion"], item["kind"])
        if kind not in PROMETHEUS | FOREIGN:
            continue
        if complaint_of(kind, {**item, "sepc": {}}) is None:
            raise Failure(f"{kind[1]}: nobody misses a wrong field")
        wrong = json.loads(json.dumps(item))
        inner = wrong["spec"] if "spec" in wrong else wrong["runAsUser"]
        inner["colour"] = "blue"
        if complaint_of(kind, wrong) is None:
            raise Failure(f"{kind[1]}: nobody misses a wrong field within")
        seen += 1
    return f"{seen} objects of foreign kinds, each with two mistakes"


def samples(_helm, schemas):
    files = sorted((ROOT / "deploy/samples").glob("*.yaml"))
    for file in files:
        for item in objects(file.read_text()):
            schemas.check(item, file.name)
    return f"{len(files)} pods"


def run(command, folder=ROOT):
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Failure(f"{' '.join(map(str, command[:3]))}: {result.stdout}{result.stderr}")


def shell(_helm, _schemas):
    scripts = []
    for path in sorted([*(ROOT / "hack").iterdir(), *(ROOT / "deploy").rglob("*"), *(ROOT / ".ci").rglob("*")]):
        if path.is_file() and (path.suffix == ".sh" or path.read_bytes()[:20].split(b"\n")[0].endswith((b"bash", b"/sh"))):
            scripts.append(path.relative_to(ROOT))
    run(["shellcheck", "--external-sources", *scripts])
    return f"{len(scripts)} scripts"


def alerts(_helm, _schemas):
    folder = ROOT / "deploy/dashboards"
    run(["promtool", "check", "rules", "alerts.yaml"], folder)
    run(["promtool", "test", "rules", "alerts-test.yaml"], folder)
    groups = yaml.safe_load((folder / "alerts.yaml").read_text())["groups"]
    tested = set()
    for test in yaml.safe_load((folder / "alerts-test.yaml").read_text())["tests"]:
        tested |= {part["alertname"] for part in test["alert_rule_test"] if part["exp_alerts"]}
    runbooks = (ROOT / "docs/runbooks.md").read_text()
    rules = [rule for group in groups for rule in group["rules"]]
    for rule in rules:
        name = rule["alert"]
        if name not in tested:
            raise Failure(f"alert {name} has no test in which it fires")
        if rule["annotations"]["runbook_url"] != f"RUNBOOKS/runbooks.md#{name.lower()}" or f"\n## {name}\n" not in runbooks:
            raise Failure(f"alert {name} has no section in docs/runbooks.md")
    return f"{len(rules)} alerts, each with a test and a runbook"


def dashboard(_helm, _schemas):
    """Prometheus understands what the panels ask; which metrics there are is for tests/tests/chart.rs."""

    def expressions(value):
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from [inner] if name == "expr" and isinstance(inner, str) else expressions(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from expressions(inner)

    asked = list(expressions(json.loads((ROOT / "deploy/dashboards/ccnode.json").read_text())))
    # As Grafana puts them in for all nodes.
    asked = [text.replace("$__rate_interval", "2m").replace("$node", ".*") for text in asked]
    if left := [text for text in asked if "$" in text]:
        raise Failure(f"variables that there are none of: {left}")
    rules = [{"record": f"panel:{index}", "expr": text} for index, text in enumerate(asked)]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}, file)
        file.flush()
        run(["promtool", "check", "rules", file.name])
    return f"{len(asked)} queries"


CHECKS = {
    "the chart's rules": lint,
    "every switch": variants,
    "documented values": documented,
    "wrong values": refusals,
    "what is refused in a cluster": beside,
    "committed renderings": committed,
    "kustomize": kustomize,
    "foreign kinds": strictness,
    "samples": samples,
    "shell scripts": shell,
    "alerts": alerts,
    "dashboard": dashboard,
}


def main():
    helm, schemas = Helm(), Schemas()
    print(f"rendered by {helm.name()}")
    if sys.argv[1:] == ["--write"]:
        for path, text in renderings(helm).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    elif sys.argv[1:]:
        sys.exit("usage: hack/check-deploy [--write]")
    failed = 0
    for name, check in CHECKS.items():
        try:
            print(f"ok      {name}: {check(helm, schemas)}")
        except Failure as failure:
            failed += 1
            print(f"FAILED  {name}: {failure}")
    kinds = ", ".join(sorted(schemas.foreign))
    print(f"{len(schemas.seen)} different objects checked against the schemas of {' and '.join(VERSIONS)}, and of {kinds}")
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


main()

"""The manifests of deploy/: Kubernetes' schemas, Ray Serve's schema, KubeRay's fields, and what they name exists here.

KubeRay's own schema comes in no package. The fields that its release 1.7 knows, as far as the manifest may use them,
are listed here; everything inside a pod template is checked against Kubernetes' schema.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from noria.errors import SettingsError
from noria.settings import Settings
from serving import background, cluster, keys, pool, replica

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = "1.34"
FILES = sorted(DEPLOY.rglob("*.yaml"))
DOCUMENTS = [(path.name, one) for path in FILES for one in yaml.safe_load_all(path.read_text())]
PLAIN = [(name, one) for name, one in DOCUMENTS if one["apiVersion"] != "ray.io/v1"]
SERVICE_FIELDS = {
    "deploymentUnhealthySecondThreshold", "excludeHeadPodFromServeSvc", "managedBy", "rayClusterConfig",
    "rayClusterDeletionDelaySeconds", "serveConfigV2", "serveService", "serviceUnhealthySecondThreshold", "suspend",
    "upgradeStrategy",
}  # fmt: skip
CLUSTER_FIELDS = {
    "authOptions": dict, "autoscalerOptions": dict, "enableInTreeAutoscaling": bool, "gcsFaultToleranceOptions": dict,
    "headGroupSpec": dict, "headServiceAnnotations": dict, "networkPolicy": dict, "rayVersion": str, "suspend": bool,
    "tlsOptions": dict, "upgradeStrategy": dict, "workerGroupSpecs": list,
}  # fmt: skip
HEAD_FIELDS = {
    "enableIngress": bool, "headService": dict, "labels": dict, "rayStartParams": dict, "resources": dict,
    "serviceType": str, "template": dict,
}  # fmt: skip
WORKER_FIELDS = {
    "groupName": str, "idleTimeoutSeconds": int, "labels": dict, "maxReplicas": int, "minReplicas": int,
    "numOfHosts": int, "rayStartParams": dict, "replicas": int, "resources": dict, "scaleStrategy": dict,
    "suspend": bool, "template": dict,
}  # fmt: skip


def of_kind(kind):
    (found,) = [one for _, one in DOCUMENTS if one["kind"] == kind]
    return found


def check(kind, spec, version="v1"):
    kubernetes_validate.validate({"apiVersion": version, "kind": kind, **spec}, KUBERNETES, strict=True)


@pytest.mark.parametrize(("name", "document"), PLAIN, ids=[f"{name}-{one['kind']}" for name, one in PLAIN])
def test_plain_documents_fit_kubernetes_schemas(name, document):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_schemas_refuse_what_is_wrong():
    with pytest.raises(kubernetes_validate.ValidationError):
        check("Pod", {"metadata": {"name": "one"}, "spec": {"containers": [{"name": "one", "imagee": "x"}]}})


def fits(given, fields):
    assert set(given) <= set(fields), f"unknown to KubeRay 1.7: {set(given) - set(fields)}"
    wrong = {name: value for name, value in given.items() if not isinstance(value, fields[name])}
    assert not wrong, f"of another type: {wrong}"


def groups():
    given = of_kind("RayService")["spec"]["rayClusterConfig"]
    return [given["headGroupSpec"], *given["workerGroupSpecs"]]


def test_the_ray_service_has_fields_that_kuberay_knows():
    spec = of_kind("RayService")["spec"]
    assert set(spec) <= SERVICE_FIELDS
    assert isinstance(spec["serveConfigV2"], str)
    given = spec["rayClusterConfig"]
    fits(given, CLUSTER_FIELDS)
    assert given["authOptions"] == {"mode": "token"}
    fits(given["headGroupSpec"], HEAD_FIELDS)
    for group in given["workerGroupSpecs"]:
        fits(group, WORKER_FIELDS)
        assert {"groupName", "minReplicas", "maxReplicas", "template"} <= set(group)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        template = group["template"]
        check("Pod", {"metadata": {"name": "one", **template["metadata"]}, "spec": template["spec"]})


def test_the_serve_config_fits_ray_and_its_application_builds(monkeypatch, tmp_path):
    config = ServeDeploySchema(**yaml.safe_load(of_kind("RayService")["spec"]["serveConfigV2"]))
    (app,) = config.applications
    module, name = app.import_path.split(":")
    build = getattr(importlib.import_module(module), name)
    monkeypatch.setenv("NORIA_MLFLOW_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("NORIA_API_KEYS", str(tmp_path / "keys.json"))
    with pytest.raises(SettingsError, match="noria key add"):  # open to the cluster's network without a key
        build(cluster.Options(**app.args))
    keys.add(tmp_path / "keys.json", "team", ["predict"], "2026-01-01T00:00:00Z")
    built = build(cluster.Options(**app.args))
    assert config.http_options.host == app.args["host"]
    assert built._bound_deployment.name == cluster.NAME
    assert config.http_options.request_timeout_s == cluster.REQUEST_SECONDS
    assert str(config.http_options.port) in {
        str(port["containerPort"]) for group in groups() for port in ports(group) if port["name"] == "serve"
    }


def ports(group):
    return [port for container in group["template"]["spec"]["containers"] for port in container["ports"]]


def test_the_versions_fit_the_tested_set():
    locked = dict(
        line.split("==") for line in (DEPLOY.parent / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert of_kind("RayService")["spec"]["rayClusterConfig"]["rayVersion"] == locked["ray"]


def pods():
    named = [("deployment", of_kind("Deployment")["spec"]["template"]["spec"])]
    return named + [(f"ray-{place}", group["template"]["spec"]) for place, group in enumerate(groups())]


@pytest.mark.parametrize(("name", "pod"), pods())
def test_every_pod_is_no_root_and_has_limits_and_known_settings(name, pod):
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"]
    for container in pod["containers"]:
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"]["memory"] and container["resources"]["limits"]["memory"]
        configured = {entry["name"] for entry in container.get("env", [])} | set(of_kind("ConfigMap")["data"])
        ours = {variable for variable in configured if variable.startswith("NORIA_")}
        assert ours and ours <= {f"NORIA_{field.upper()}" for field in Settings.model_fields}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_deployment_ends_later_than_the_server():
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert before + pool.END_SECONDS + background.LAST_DRAIN_SECONDS < pod["terminationGracePeriodSeconds"]
    for kind, path in (("startup", "live"), ("readiness", "ready"), ("liveness", "live")):
        assert container[f"{kind}Probe"]["httpGet"]["path"] == f"/v2/health/{path}"
    assert of_kind("Service")["spec"]["selector"] == of_kind("Deployment")["spec"]["selector"]["matchLabels"]


def test_a_ray_pod_ends_later_than_its_replicas():
    for group in groups()[1:]:
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > cluster.GRACE_SECONDS + replica.LAST_DRAIN_SECONDS


def test_replicas_import_neither_ray_nor_mlflow():
    listed = "import sys, serving.replica, serving.ingress; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", listed], capture_output=True, text=True, check=True)
    assert not {"ray", "mlflow", "torch"} & set(done.stdout.split())


def test_the_image_installs_the_tested_set():
    text = (DEPLOY / "Dockerfile").read_text()
    assert "--constraint constraints.txt" in text
    users = {str(pod["securityContext"]["runAsUser"]) for _, pod in pods()}
    assert users == set(re.findall(r"^USER (\d+)$", text, re.MULTILINE))

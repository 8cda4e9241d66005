"""The overlays render, and what they render is what Kubernetes, KubeRay and Ray Serve accept."""

from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serving.cluster.app import GatewayArgs
from serving.config import ModelSpec, validated
from tests.deploy.manifests import (
    KUBERNETES,
    OVERLAYS,
    Object,
    only,
    rayservice_schema,
    rendered,
    serve_config,
)

CUSTOM = {"RayService", "PodMonitor", "PrometheusRule"}
BUILDERS: dict[str, Any] = {
    "serving.cluster.app:gateway": GatewayArgs,
    "serving.cluster.app:model": ModelSpec,
}

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


def pods(objects: list[Object]) -> list[tuple[str, Object]]:
    """The pod templates of all objects, by name."""
    cluster = only(objects, "RayService")["spec"]["rayClusterConfig"]
    found = [("head", cluster["headGroupSpec"]["template"])]
    found += [(group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"]]
    found += [(o["metadata"]["name"], o["spec"]["template"]) for o in objects if o["kind"] == "Deployment"]
    return found


@overlays
def test_core_objects_are_valid(overlay: str) -> None:
    for thing in rendered(overlay):
        if thing["kind"] not in CUSTOM:
            kubernetes_validate.validate(thing, KUBERNETES, strict=True)


@overlays
def test_the_rayservice_is_valid(overlay: str) -> None:
    rayservice_schema().validate(only(rendered(overlay), "RayService"))


def test_an_unknown_field_of_a_rayservice_is_refused() -> None:
    thing = only(rendered("cpu"), "RayService")
    wrong = {**thing, "spec": {**thing["spec"], "serveConfig": ""}}
    with pytest.raises(jsonschema.ValidationError, match="serveConfig"):
        rayservice_schema().validate(wrong)


@overlays
def test_pods_are_valid_where_a_custom_kind_embeds_them(overlay: str) -> None:
    for name, template in pods(rendered(overlay)):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**template["metadata"], "name": name},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@overlays
def test_the_serve_configuration_is_one_that_ray_and_the_builders_take(overlay: str) -> None:
    embedded = yaml.safe_load(only(rendered(overlay), "RayService")["spec"]["serveConfigV2"])
    assert embedded == serve_config(overlay)
    unknown = embedded.keys() - ServeDeploySchema.model_fields.keys()
    assert not unknown  # the schema ignores what it does not know
    schema = ServeDeploySchema.model_validate(embedded)
    assert schema.grpc_options.grpc_servicer_functions == ["serving.gateway.services.add_services"]
    args = {}
    for application in schema.applications:
        kind = BUILDERS[application.import_path]
        args[application.name] = validated(kind, application.args, application.name)
    fronts = [a for a in schema.applications if a.route_prefix is not None]
    assert [a.import_path for a in fronts] == ["serving.cluster.app:gateway"]
    served = {a.name for name, a in args.items() if isinstance(a, ModelSpec)}
    assert set(args[fronts[0].name].models) == served


@overlays
def test_the_smallest_cluster_has_room_for_the_smallest_number_of_replicas(overlay: str) -> None:
    """In Ray's bookkeeping, where a replica that does not fit waits for ever without a word."""
    config = only(rendered(overlay), "RayService")["spec"]
    nodes = [
        {key: float(group["rayStartParams"].get(f"num-{key}", 0)) for key in ("cpus", "gpus")}
        for group in config["rayClusterConfig"]["workerGroupSpecs"]
        for _ in range(group["minReplicas"])
    ]
    wanted = []
    for application in serve_config(overlay)["applications"]:
        args = validated(BUILDERS[application["import_path"]], application["args"], application["name"])
        if isinstance(args, ModelSpec):
            count = args.autoscaling.min_replicas if args.autoscaling else args.replicas
            wanted += [(args.cpus, args.gpus or 0)] * count
        else:
            wanted += [(args.spec.cpus, 0)] * args.spec.replicas
    for cpus, gpus in sorted(wanted, key=lambda need: (-need[1], -need[0])):  # the largest first
        fitting = [n for n in nodes if n["cpus"] >= cpus and n["gpus"] >= gpus]
        assert fitting, f"no node has {cpus} cpus and {gpus} gpus left: {nodes}"
        place = min(fitting, key=lambda n: (n["gpus"], n["cpus"]))
        place["cpus"] -= cpus
        place["gpus"] -= gpus


@overlays
def test_ports_agree(overlay: str) -> None:
    """Of the Serve configuration, the service, the pods and the network policy."""
    objects = rendered(overlay)
    config = serve_config(overlay)
    ports = {"serve": config["http_options"]["port"], "serve-grpc": config["grpc_options"]["port"]}
    service = only(objects, "RayService")["spec"]["serveService"]["spec"]["ports"]
    assert {p["name"]: p["port"] for p in service} == ports
    for name, template in pods(objects):
        if name != "fathom-front":
            declared = {p["name"]: p["containerPort"] for p in template["spec"]["containers"][0]["ports"]}
            assert ports.items() <= declared.items(), name
    door = only(objects, "NetworkPolicy", "serve")["spec"]["ingress"][0]["ports"]
    assert {p["port"] for p in door} == set(ports.values())


@overlays
def test_pods_are_what_the_restricted_pod_security_standard_asks(overlay: str) -> None:
    objects = rendered(overlay)
    labels = only(objects, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    contexts = [
        (name, container["securityContext"])
        for name, template in pods(objects)
        for container in template["spec"]["containers"]
    ]
    options = only(objects, "RayService")["spec"]["rayClusterConfig"]["autoscalerOptions"]
    contexts.append(("autoscaler", options["securityContext"]))
    for name, context in contexts:
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0, name
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name


def chosen(selector: Object, objects: list[Object]) -> list[Object]:
    """The pod templates that a label selector matches."""
    found = []
    for _, template in pods(objects):
        labels = template["metadata"]["labels"]
        by_key = [labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()]
        by_key += [
            e["key"] in labels for e in selector.get("matchExpressions", []) if e["operator"] == "Exists"
        ]
        if all(by_key):
            found.append(template)
    return found


@overlays
def test_selectors_find_the_pods_they_are_meant_for(overlay: str) -> None:
    objects = rendered(overlay)
    for thing in objects:
        spec = thing.get("spec", {})
        if thing["kind"] == "NetworkPolicy":
            assert chosen(spec["podSelector"], objects), thing["metadata"]["name"]
        elif thing["kind"] in ("PodDisruptionBudget", "Deployment"):
            assert chosen(spec["selector"], objects), thing["metadata"]["name"]
        elif thing["kind"] == "Service":
            assert chosen({"matchLabels": spec["selector"]}, objects), thing["metadata"]["name"]


@overlays
def test_monitors_scrape_ports_that_the_pods_have_and_the_network_policies_open(overlay: str) -> None:
    objects = rendered(overlay)
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
    for monitor in (o for o in objects if o["kind"] == "PodMonitor"):
        templates = chosen(monitor["spec"]["selector"], objects)
        assert templates, monitor["metadata"]["name"]
        for template in templates:
            ports = {p["name"]: p["containerPort"] for p in template["spec"]["containers"][0]["ports"]}
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                open_to_monitoring = {
                    port["port"]
                    for policy in policies
                    if template in chosen(policy["podSelector"], objects)
                    for rule in policy.get("ingress", [])
                    for source in rule.get("from", [])
                    if "fathom/monitoring" in source.get("namespaceSelector", {}).get("matchLabels", {})
                    for port in rule["ports"]
                }
                assert ports[endpoint["port"]] in open_to_monitoring, monitor["metadata"]["name"]


@overlays
def test_a_pod_has_time_to_drain(overlay: str) -> None:
    for name, template in pods(rendered(overlay)):
        hook = template["spec"]["containers"][0].get("lifecycle")
        if hook is not None and "drain.sh" in hook["preStop"]["exec"]["command"][-1]:
            seconds = int(hook["preStop"]["exec"]["command"][-1].split()[-1])
            assert seconds < template["spec"]["terminationGracePeriodSeconds"], name

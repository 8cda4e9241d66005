"""What `kubectl kustomize` makes of the overlays, and the schemas that judge it."""

import gzip
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(p.parent.name for p in DEPLOY.glob("overlays/*/kustomization.yaml"))
CRD = ROOT.parent / "shared" / "data" / "ray.io_rayservices.yaml.gz"
KUBERNETES = "1.30"  # the oldest that the manifests are written for

Object = dict[str, Any]


@cache
def rendered(overlay: str) -> list[Object]:
    """Every object of an overlay. Skips where kubectl is not installed."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: Debian's package is kubernetes-client")
    folder = DEPLOY / "overlays" / overlay
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def only(objects: list[Object], kind: str, name: str | None = None) -> Object:
    found = [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects of kind {kind} and name {name}"
    return found[0]


def serve_config(overlay: str) -> Object:
    """The Serve configuration of an overlay, as its file has it."""
    return yaml.safe_load((DEPLOY / "overlays" / overlay / "serve.yaml").read_text())


@cache
def rayservice_schema() -> jsonschema.Draft202012Validator:
    """Raises ValidationError for what is no RayService, unknown fields among it. Skips where the schema is absent."""
    if not CRD.exists():
        pytest.skip(f"the schema of RayService is not at {CRD.name} in ../shared/data")
    definition = yaml.load(gzip.decompress(CRD.read_bytes()), yaml.CSafeLoader)
    versions = {v["name"]: v for v in definition["spec"]["versions"]}
    return jsonschema.Draft202012Validator(_strict(versions["v1"]["schema"]["openAPIV3Schema"]))


def _strict(schema: Any) -> Any:
    """OpenAPI as Kubernetes uses it, as JSON schema: what a structural schema does not name is refused."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if isinstance(schema.get("properties"), dict):
        made["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    return made

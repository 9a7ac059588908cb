"""The cluster files against the schemas of those who read them: Ray, AWS, Google Cloud, Kubernetes. No network."""

import copy
import json
import re
from importlib import resources
from pathlib import Path

import boto3
import botocore.session
import jsonschema
import kubernetes_validate
import pytest
import yaml
from botocore.validate import ParamValidator
from clusters import REPOSITORY
from moto import mock_aws
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private import commands
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = REPOSITORY / "cluster"
FILES = {path.name: yaml.safe_load(path.read_text()) for path in sorted(CLUSTER.glob("*.yaml"))}
RAY = {name: content for name, content in FILES.items() if "provider" in content}
CLOUD = {name: content for name, content in RAY.items() if content["provider"]["type"] != "local"}
KUBERNETES = {name: content for name, content in FILES.items() if "apiVersion" in content}
TOKEN = "~/.ray/auth_token"


# ---- Ray's own view of cluster.yaml and its siblings


def ray_faults(content: dict, root: Path = REPOSITORY) -> list[str]:
    """What `ray up` would refuse, and what it would find out too late: files to be copied that are not there."""
    faults = []
    try:
        validate_config(prepare_config(copy.deepcopy(content)))
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}".splitlines()[0])
    mounts = content.get("file_mounts") or {}
    faults += [
        f"file_mounts: no {source}" for source in mounts.values() if source != TOKEN and not (root / source).exists()
    ]
    if TOKEN not in mounts.values():
        faults.append("file_mounts: the token does not travel")
    return faults


@pytest.mark.parametrize("name", RAY)
def test_ray_takes_it(name):
    assert ray_faults(RAY[name]) == []


@pytest.mark.parametrize("name", CLOUD)
def test_workers_start_from_zero_and_the_head_only_drives(name):
    types = CLOUD[name]["available_node_types"]
    head = types[CLOUD[name]["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    workers = {kind: each for kind, each in types.items() if each is not head}
    assert not any(each.get("min_workers", 0) for each in workers.values())
    assert sum(each["max_workers"] for each in workers.values()) == CLOUD[name]["max_workers"]


def test_what_the_clouds_have_in_common_is_the_same():
    aws, gcp = FILES["cluster.yaml"], FILES["gcp.yaml"]
    own = {"provider", "available_node_types", "head_setup_commands"}
    assert {key: aws[key] for key in aws if key not in own} == {key: gcp[key] for key in gcp if key not in own}


RAY_TYPOS = {
    "unknown key": lambda c: c.update(max_worker=3),
    "unknown key of a node type": lambda c: c["available_node_types"]["gpu24"].update(max_worker=3),
    "no such head": lambda c: c.update(head_node_type="haed"),
    "number as text": lambda c: c.update(max_workers="8"),
    "unknown provider": lambda c: c["provider"].update(type="asw"),
    "commands as text": lambda c: c.update(setup_commands="pip install ."),
    "half a GPU": lambda c: c["available_node_types"]["gpu24"].update(resources={"GPU": 0.5}),
    "source not there": lambda c: c["file_mounts"].update({"~/cvdd/setup.py": "setup.py"}),
    "token forgotten": lambda c: c["file_mounts"].pop(TOKEN),
}


@pytest.mark.parametrize("typo", RAY_TYPOS)
@pytest.mark.parametrize("name", CLOUD)
def test_typos_are_caught(name, typo):
    wrong = copy.deepcopy(CLOUD[name])
    RAY_TYPOS[typo](wrong)
    assert ray_faults(wrong)


# ---- AWS


def aws_faults(node_config: dict) -> list[str]:
    """What EC2's RunInstances would refuse: unknown or wrongly typed parameters, values that do not exist."""
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape)
    return [*([report.generate_report()] if report.has_errors() else []), *_not_allowed(node_config, shape)]


def _not_allowed(value, shape, path=""):
    if shape.type_name == "structure" and isinstance(value, dict):
        return [
            f
            for key in value
            if key in shape.members
            for f in _not_allowed(value[key], shape.members[key], f"{path}.{key}")
        ]
    if shape.type_name == "list" and isinstance(value, list):
        return [fault for each in value for fault in _not_allowed(each, shape.member, path)]
    allowed = getattr(shape, "enum", None)
    return [f"{path}: {value!r}"] if allowed and value not in allowed else []


AWS = FILES["cluster.yaml"]["available_node_types"]
AWS_TYPOS = [
    {"InstnceType": "g5.2xlarge"},
    {"InstanceType": "g5.3xlarge"},
    {"InstanceType": 5},
    {"InstanceMarketOptions": {"MarketType": "sport"}},
    {"IamInstanceProfile": {"name": "x"}},
    {"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": "200"}}]},
    {"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeType": "gp4"}}]},
]


@pytest.mark.parametrize("kind", AWS)
def test_ec2_takes_the_machines(kind):
    assert aws_faults(AWS[kind]["node_config"]) == []


@pytest.mark.parametrize("typo", AWS_TYPOS, ids=str)
def test_typos_in_machines_are_caught(typo):
    assert aws_faults({**AWS["gpu24"]["node_config"], **typo})


def test_ray_launches_them_on_a_simulated_aws(tmp_path, monkeypatch):
    """As `ray up` and the autoscaler do it, down to the instances: spot workers with a role that reaches S3."""
    for name, value in {"HOME": tmp_path, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    used = [each["node_config"]["InstanceType"] for each in AWS.values()]
    with mock_aws():
        region = FILES["cluster.yaml"]["provider"]["region"]
        ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
        known = ec2.describe_instance_types(InstanceTypes=used)["InstanceTypes"]  # all of them would take half a minute
        monkeypatch.setattr("ray.autoscaler._private.aws.node_provider.list_ec2_instances", lambda *_: known)
        for profile in ("cvdd-ray-head", "cvdd-ray-worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        full = commands._bootstrap_config(copy.deepcopy(FILES["cluster.yaml"]), no_config_cache=True)
        assert full["available_node_types"]["gpu24"]["resources"]["accelerator_type:A10G"] == 1
        assert full["available_node_types"]["head"]["resources"] == {"CPU": 0}
        provider = _get_node_provider(full["provider"], full["cluster_name"])
        for kind in AWS:
            tags = {"ray-launch-config": "", "ray-node-type": kind, "ray-node-status": "", "ray-node-name": kind}
            provider.create_node(full["available_node_types"][kind]["node_config"], tags, 1)
        there = [each for group in ec2.describe_instances()["Reservations"] for each in group["Instances"]]
    assert [each["InstanceType"] for each in there] == used
    assert [each.get("InstanceLifecycle") for each in there] == [None, "spot", "spot"]
    assert [each["IamInstanceProfile"]["Arn"].rpartition("/")[2] for each in there] == [
        "cvdd-ray-head", "cvdd-ray-worker", "cvdd-ray-worker",
    ]  # fmt: skip


# ---- Google Cloud


def google_schemas() -> dict:
    package = resources.files("googleapiclient") / "discovery_cache" / "documents" / "compute.v1.json"
    return json.loads(package.read_text())["schemas"]


GOOGLE = google_schemas()


def google_faults(value, schema=GOOGLE["Instance"], path="") -> list[str]:
    """What Compute Engine would refuse: keys, types and values that its discovery document does not have."""
    schema = GOOGLE[schema["$ref"]] if "$ref" in schema else schema
    kind = {"object": dict, "array": list, "boolean": bool, "integer": int, "string": str, "number": (int, float)}[
        schema["type"]
    ]
    if schema.get("format") in ("int64", "uint64"):
        kind = (int, str)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return [f"{path}: {value!r} is no {schema['type']}"]
    if isinstance(value, list):
        return [fault for each in value for fault in google_faults(each, schema["items"], path)]
    if isinstance(value, dict):
        known, other = schema.get("properties", {}), schema.get("additionalProperties")
        faults = [f"{path}.{key}: unknown" for key in value if key not in known and not other]
        return faults + [
            f for k, v in value.items() if (s := known.get(k, other)) for f in google_faults(v, s, f"{path}.{k}")
        ]
    return [f"{path}: {value!r}"] if "enum" in schema and value not in schema["enum"] else []


GCP = FILES["gcp.yaml"]["available_node_types"]
GCP_TYPOS = [
    {"machineTyp": "g2-standard-8"},
    {"scheduling": {"provisioningModel": "SPOTTY"}},
    {"scheduling": [{"preemptible": True}]},
    {"disks": [{"boot": "yes"}]},
    {"disks": [{"initializeParams": {"diskSizeGB": 200}}]},
    {"serviceAccounts": [{"email": "x", "scope": []}]},
]


@pytest.mark.parametrize("kind", GCP)
def test_compute_engine_takes_the_machines(kind):
    config = GCP[kind]["node_config"]
    assert google_faults(config) == []
    zone = FILES["gcp.yaml"]["provider"]["availability_zone"]
    assert config["disks"][0]["initializeParams"]["diskType"].startswith(f"zones/{zone}/")


@pytest.mark.parametrize("typo", GCP_TYPOS, ids=str)
def test_typos_in_google_machines_are_caught(typo):
    assert google_faults({**GCP["gpu24"]["node_config"], **typo})


def test_google_workers_use_the_project_and_account_that_ray_makes():
    project = FILES["gcp.yaml"]["provider"]["project_id"]
    emails = {each["email"] for kind in GCP.values() for each in kind["node_config"].get("serviceAccounts", [])}
    assert emails == {f"ray-autoscaler-sa-v1@{project}.iam.gserviceaccount.com"}


# ---- Kubernetes: the pods by Kubernetes' schemas, what is around them by the fields of KubeRay's ray.io/v1 used here


def _of(required: str, **properties) -> dict:
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": properties}


TEXT, NUMBER, FLAG, POD = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {"type": "object"}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$"}
START = {"type": "object", "additionalProperties": TEXT}  # `ray start` takes words: a number here is refused
RAY_CLUSTER = _of(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=_of("mode", mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=_of("", version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=NUMBER),
    headGroupSpec=_of("rayStartParams template", rayStartParams=START, template=POD),
    workerGroupSpecs={
        "type": "array",
        "minItems": 1,
        "items": _of(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=NAME, replicas=NUMBER, minReplicas=NUMBER, maxReplicas=NUMBER, rayStartParams=START, template=POD,
        ),
    },
)  # fmt: skip
RAY_JOB = _of(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=NUMBER,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=NUMBER,
    activeDeadlineSeconds=NUMBER,
    rayClusterSpec=RAY_CLUSTER,
)
KINDS = {
    kind: _of(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"}, kind=TEXT, metadata=_of("name", name=NAME), spec=spec,
    )
    for kind, spec in {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}.items()
}  # fmt: skip


def groups_of(content: dict) -> list[dict]:
    spec = content["spec"].get("rayClusterSpec", content["spec"])
    return [group for group in (spec.get("headGroupSpec"), *spec.get("workerGroupSpecs", [])) if group]


def kubernetes_faults(content: dict) -> list[str]:
    """What Kubernetes or the KubeRay operator would refuse."""
    if content.get("kind") not in KINDS:
        return [f"kind: {content.get('kind')}"]
    faults = [
        f"{e.json_path}: {e.message}"
        for e in jsonschema.Draft202012Validator(KINDS[content["kind"]]).iter_errors(content)
    ]
    for group in groups_of(content):
        template = group.get("template") or {}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x", **template.get("metadata", {})},
            "spec": template.get("spec"),
        }
        try:
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            faults.append(f"pod: {error.message}")
    return faults


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_takes_it(name):
    assert kubernetes_faults(KUBERNETES[name]) == []


def test_the_job_starts_the_cluster_that_also_stands_alone():
    assert FILES["rayjob.yaml"]["spec"]["rayClusterSpec"] == FILES["raycluster.yaml"]["spec"]


@pytest.mark.parametrize("name", KUBERNETES)
def test_pods_get_credentials_by_reference_and_gpus_start_from_zero(name):
    head, gpu = groups_of(KUBERNETES[name])
    for group in (head, gpu):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "cvdd-s3"}}]
        assert "env" not in container
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert (gpu["replicas"], gpu["minReplicas"]) == (0, 0)
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert not [word for word in ("AKIA", "SECRET_ACCESS_KEY: ") if word in (CLUSTER / name).read_text()]


def first_container(content):
    return groups_of(content)[0]["template"]["spec"]["containers"][0]


KUBERNETES_TYPOS = {
    "key of the cluster": lambda c: groups_of(c)[0].update(rayStartParameters={}),
    "number for ray start": lambda c: groups_of(c)[0].update(rayStartParams={"num-cpus": 0}),
    "replicas as text": lambda c: groups_of(c)[1].update(replicas="0"),
    "group without a name": lambda c: groups_of(c)[1].pop("groupName"),
    "key of a container": lambda c: first_container(c).update(imagee="x"),
    "container without a name": lambda c: first_container(c).pop("name"),
    "a secret's key": lambda c: first_container(c).update(envFrom=[{"secretReference": {"name": "x"}}]),
    "a quantity": lambda c: first_container(c)["resources"]["limits"].update(cpu=[4]),
    "restart policy": lambda c: groups_of(c)[1]["template"]["spec"].update(restartPolicies="Never"),
    "old version": lambda c: c.update(apiVersion="ray.io/v1beta1"),
    "other kind": lambda c: c.update(kind="RayJobs"),
    "a name for DNS": lambda c: c["metadata"].update(name="CVDD_run"),
    "key of the spec": lambda c: c["spec"].update(shutdownAfterFinished=True),
    "no head": lambda c: c["spec"].get("rayClusterSpec", c["spec"]).pop("headGroupSpec"),
    "open cluster": lambda c: c["spec"].get("rayClusterSpec", c["spec"]).pop("authOptions"),
}


@pytest.mark.parametrize("typo", KUBERNETES_TYPOS)
@pytest.mark.parametrize("name", KUBERNETES)
def test_typos_in_manifests_are_caught(name, typo):
    wrong = copy.deepcopy(KUBERNETES[name])
    KUBERNETES_TYPOS[typo](wrong)
    assert kubernetes_faults(wrong)


# ---- one version of everything, everywhere


def pins() -> dict[str, set[str]]:
    """Name -> the versions that the cluster files install."""
    found: dict[str, set[str]] = {}
    for path in CLUSTER.iterdir():
        for name, version in re.findall(r"\b(ray|torch|torchvision)(?:\[[a-z,]*\])?==([0-9.]+)", path.read_text()):
            found.setdefault(name, set()).add(version)
    return found


def test_every_file_installs_the_same_versions_and_the_package_allows_them():
    found = pins()
    assert set(found) == {"ray", "torch", "torchvision"}
    assert all(len(versions) == 1 for versions in found.values()), found
    project = (REPOSITORY / "pyproject.toml").read_text()
    for requirement in map(Requirement, re.findall(r'^    "((?:ray|torch|torchvision)\b[^"]*)"', project, re.M)):
        assert requirement.specifier.contains(found.pop(requirement.name).pop())
    assert not found


def test_ray_is_new_enough_for_tokens_and_the_same_in_images_and_manifests():
    (version,) = pins()["ray"]
    assert Version(version) >= Version("2.52")
    for name in KUBERNETES:
        assert f'rayVersion: "{version}"' in (CLUSTER / name).read_text()
    assert f"FROM rayproject/ray:{version}-py312\n" in (CLUSTER / "Dockerfile").read_text()

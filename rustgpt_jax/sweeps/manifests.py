"""Manifests of a sweep for Kubernetes (an indexed Job) and SkyPilot (a task): each pod or node runs one part.

The pods share a volume with the sweep's folder, and with it the ledger and the locks, so a pod that is replaced resumes
its part.
"""

import posixpath
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rustgpt_jax.atomic_io import atomic_folder
from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.process_setup import STOPPED_BY_CLUSTER

NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
# Kubernetes appends the index and a suffix to the names of pods, which have at most 63 characters.
MAX_NAME = 45
# A ConfigMap holds at most 1 MiB.
MAX_CONFIG_BYTES = 2**20 - 2**16
# The name of a file in a ConfigMap.
FILE_NAME = re.compile(r"(?!\.\.)[-._A-Za-z0-9]{1,253}")
DEFAULT_PARTS = 8
# The most that --part accepts.
MAX_PARTS = 99_999
# A pod that fails is replaced this often, apart from those that were preempted.
MAX_RETRIES = 3
# Where the pods find the config file.
CONFIG_FOLDER = "/config"
USAGE_ERROR = 2


@dataclass(frozen=True)
class ManifestOptions:
    """The options of --manifest, with their defaults.

    Attributes:
        name: The name of the job and of the sweep's folder on the volume. Default: the name of the sweep.
        image: The container image, which has rustgpt_jax installed.
        parts: The number of parts, each run by a pod. Default: one per trial, at most 8.
        parallelism: The number of pods at a time, for Kubernetes. Default: all.
        cpus: The CPUs of a pod.
        memory: The memory of a pod in GiB.
        gpus: The GPUs of a pod.
        gpu_resource: The name of the GPU resource in Kubernetes.
        accelerator: The GPU in SkyPilot.
        volume: The name of the persistent volume claim.
        mount: The folder where the pods mount it.
        size: The size of a new volume in GiB.
        storage_class: The storage class of a new volume. Default: the cluster's.
        namespace: The Kubernetes namespace. Default: that of the user's context.
        grace: Seconds that a pod has to save its trials when it is stopped.
    """

    name: str = ""
    image: str = "rustgpt_jax"
    parts: int = 0
    parallelism: int = 0
    cpus: int = 4
    memory: int = 16
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    accelerator: str = "H100"
    volume: str = "rustgpt-sweeps"
    mount: str = "/sweeps"
    size: int = 100
    storage_class: str = ""
    namespace: str = ""
    grace: int = 120


def parse_options(given: Mapping[str, str], sweep: str, n_trials: int) -> ManifestOptions:
    """Parse the options of --manifest for a sweep with some name and number of trials.

    Raises:
        UserError: An option is unknown, or its value is invalid.
    """
    defaults = ManifestOptions()
    values: dict[str, Any] = {}
    for key, text in given.items():
        if not hasattr(defaults, key):
            raise UserError(f"--manifest={key}: unknown option.{suggest_names(key, vars(defaults))}")
        if isinstance(getattr(defaults, key), int):
            least = 0 if key == "gpus" else 1
            if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
                raise UserError(f"--manifest={key}={text}: {text!r} is not a whole number from {least} on.")
            values[key] = int(text)
        else:
            values[key] = text
    name = re.sub(r"[^a-z0-9]+", "-", sweep.lower()).strip("-")[:MAX_NAME].strip("-") or "sweep"
    parts = values.get("parts") or min(n_trials, DEFAULT_PARTS)
    computed: dict[str, Any] = {"name": name, "parts": parts, "parallelism": parts}
    options = ManifestOptions(**computed | values)
    for key in ("name", "volume", "namespace"):
        value = getattr(options, key)
        if value and not (NAME.fullmatch(value) and len(value) <= MAX_NAME):
            raise UserError(
                f"--manifest={key}={value}: use at most {MAX_NAME} lower-case letters, digits and inner hyphens."
            )
    for key in ("mount", "image", "storage_class", "gpu_resource", "accelerator"):
        value = getattr(options, key)
        if any(letter.isspace() or not letter.isprintable() for letter in value):
            raise UserError(f"--manifest={key}={value}: it has a space or a control character.")
    if options.parts > MAX_PARTS:
        raise UserError(f"--manifest=parts={options.parts}: a sweep has at most {MAX_PARTS} parts.")
    if not options.mount.startswith("/"):
        raise UserError(f"--manifest=mount={options.mount}: it is not an absolute path.")
    # Two slashes at the beginning of a path are kept.
    mount = PurePosixPath(posixpath.normpath("/" + options.mount.lstrip("/")))
    if mount.is_relative_to(CONFIG_FOLDER):
        raise UserError(f"--manifest=mount={options.mount}: the config file is in {CONFIG_FOLDER}; use another folder.")
    return options


@dataclass(frozen=True)
class SweepCommand:
    """The command of a sweep, apart from its folder and part.

    Attributes:
        config: The value of --config in a pod: a recipe, or a file in CONFIG_FOLDER.
        files: The contents of the files in CONFIG_FOLDER by name; empty for a recipe.
        arguments: Further flags and overrides.
    """

    config: str
    files: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()

    def words(self, options: ManifestOptions) -> list[str]:
        """Return the command without --part."""
        run = f"{options.mount.rstrip('/')}/{options.name}"
        return ["rustgpt", "sweep", f"--config={self.config}", f"--run={run}", *self.arguments]


def kubernetes_volume(options: ManifestOptions) -> dict[str, Any]:
    """Return the claim of the shared volume."""
    spec: dict[str, Any] = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": f"{options.size}Gi"}},
    }
    if options.storage_class:
        spec["storageClassName"] = options.storage_class
    metadata = _metadata(options.volume, options)
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def kubernetes_job(command: SweepCommand, options: ManifestOptions) -> list[dict[str, Any]]:
    """Return the indexed Job of a sweep, after the ConfigMap with its config file if it has one."""
    mounts = [{"name": "sweeps", "mountPath": options.mount}]
    volumes: list[dict[str, Any]] = [
        {"name": "sweeps", "persistentVolumeClaim": {"claimName": options.volume}},
    ]
    config_map = f"{options.name}-config"
    if command.files:
        mounts.append({"name": "config", "mountPath": CONFIG_FOLDER})
        volumes.append({"name": "config", "configMap": {"name": config_map}})
    # Kubernetes replaces $(NAME) in a command, and $$ by $.
    words = [word.replace("$", "$$") for word in command.words(options)]
    resources = {"cpu": str(options.cpus), "memory": f"{options.memory}Gi"}
    if options.gpus:
        resources[options.gpu_resource] = str(options.gpus)
    container = {
        "name": "sweep",
        "image": options.image,
        "command": [*words, f"--part=$(JOB_COMPLETION_INDEX)/{options.parts}"],
        **({"workingDir": CONFIG_FOLDER} if command.files else {}),
        # Equal requests and limits: exclusive whole cores where the nodes assign cores statically.
        "resources": {"requests": resources, "limits": dict(resources)},
        "volumeMounts": mounts,
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        "containers": [container],
        "volumes": volumes,
    }
    failure_rules = [
        # Preemptions, drained nodes, and stops after which the trials were saved do not count as failures.
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [STOPPED_BY_CLUSTER]}},
        # A usage error occurs again.
        {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [USAGE_ERROR]}},
    ]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(options.name, options),
        "spec": {
            "completionMode": "Indexed",
            "completions": options.parts,
            "parallelism": min(options.parallelism, options.parts),
            "backoffLimitPerIndex": MAX_RETRIES,
            "podFailurePolicy": {"rules": failure_rules},
            "template": {"metadata": {"labels": _labels(options)}, "spec": pod},
        },
    }
    if not command.files:
        return [job]
    metadata = _metadata(config_map, options)
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": dict(command.files)}, job]


def _labels(options: ManifestOptions) -> dict[str, str]:
    return {"app.kubernetes.io/name": "rustgpt-jax", "app.kubernetes.io/instance": options.name}


def _metadata(name: str, options: ManifestOptions) -> dict[str, Any]:
    namespace = {"namespace": options.namespace} if options.namespace else {}
    return {"name": name, **namespace, "labels": _labels(options)}


def skypilot_volume(options: ManifestOptions) -> dict[str, Any]:
    """Return SkyPilot's description of the shared volume, on Kubernetes."""
    config = {"access_mode": "ReadWriteMany"}
    if options.namespace:
        config["namespace"] = options.namespace
    if options.storage_class:
        config["storage_class_name"] = options.storage_class
    return {
        "name": options.volume,
        "type": "k8s-pvc",
        "infra": "kubernetes",
        "size": f"{options.size}Gi",
        "config": config,
    }


def skypilot_task(command: SweepCommand, options: ManifestOptions) -> dict[str, Any]:
    """Return a SkyPilot task whose nodes run the parts of a sweep, all at the same time."""
    resources: dict[str, Any] = {
        "infra": "kubernetes",
        "image_id": f"docker:{options.image}",
        "cpus": f"{options.cpus}+",
        "memory": f"{options.memory}+",
    }
    if options.gpus:
        resources["accelerators"] = f"{options.accelerator}:{options.gpus}"
    resources["job_recovery"] = {
        "max_restarts_on_errors": MAX_RETRIES,
        "recover_on_exit_codes": [STOPPED_BY_CLUSTER],
    }
    return {
        "name": options.name,
        "num_nodes": options.parts,
        "resources": resources,
        "volumes": {options.mount: options.volume},
        **({"workdir": "config"} if command.files else {}),
        "run": f'{shlex.join(command.words(options))} --part="$SKYPILOT_NODE_RANK/$SKYPILOT_NUM_NODES"\n',
    }


def write_manifests(folder: Path, command: SweepCommand, options: ManifestOptions) -> dict[str, list[str]]:
    """Write the manifests of a sweep into a new folder.

    Returns:
        The commands that apply them, for Kubernetes and for SkyPilot.

    Raises:
        UserError: The folder exists and is not empty, or cannot be written, or a ConfigMap cannot hold the files.
    """
    for name in command.files:
        if name == "." or not FILE_NAME.fullmatch(name):
            raise UserError(
                f"{name}: the name of a file in a ConfigMap has only letters, digits and -_. of ASCII: rename it."
            )
    if sum(len(text.encode()) for text in command.files.values()) > MAX_CONFIG_BYTES:
        raise UserError(f"{command.config} is larger than a ConfigMap of Kubernetes: install it in the image instead.")
    volume, job = folder / "kubernetes-volume.yaml", folder / "kubernetes.yaml"
    commands = {
        "kubernetes": [f"kubectl apply -f {shlex.quote(str(file))}" for file in (volume, job)],
        # Paths in a task are relative to the current folder.
        "skypilot": [
            f"cd {shlex.quote(str(folder))}",
            "sky volumes apply skypilot-volume.yaml",
            "sky jobs launch skypilot.yaml",
        ],
    }
    documents = {
        volume.name: [kubernetes_volume(options)],
        job.name: kubernetes_job(command, options),
        "skypilot-volume.yaml": [skypilot_volume(options)],
        "skypilot.yaml": [skypilot_task(command, options)],
    }
    with atomic_folder(folder) as temporary:
        for name, content in documents.items():
            (temporary / name).write_text(_to_yaml(content), encoding="utf-8")
        if command.files:
            (temporary / "config").mkdir()
        for name, text in command.files.items():
            (temporary / "config" / name).write_text(text, encoding="utf-8")
    return commands


class _Dumper(yaml.SafeDumper):
    """Writes strings of several lines as blocks, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: a list that occurs twice is written twice."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _to_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)

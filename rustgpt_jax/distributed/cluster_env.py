"""Whether a cluster has started this process as one of several that belong together."""

import re
from collections.abc import Mapping


def detected(environment: Mapping[str, str]) -> str | None:
    """What has started this process as one of several: Slurm, Open MPI, Kubernetes, a pod of TPUs; or None."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "Slurm"
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "a pod of TPUs"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def own_devices(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of a process that a cluster has started as the only one of its node: all; None leaves it to JAX.

    JAX would give a process of Slurm or Open MPI one GPU.
    """
    on_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or ""
    if not re.fullmatch(r"1(\(x\d+\))?", on_node):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    return list(range(count)) or None

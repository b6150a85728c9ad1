"""Whether a cluster has started this process as one of several that belong together."""

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

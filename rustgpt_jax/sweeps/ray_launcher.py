"""Ray: the launcher of sweeps on a Ray cluster, or on a local Ray that ends with the sweep, with one task per chunk.

A task runs its chunk in a separate process, as --launcher=processes does, with the copy of the code taken at launch:
Ray's workers would import the driver's modules instead. The outcomes of trials are read from the ledger, so a task
only returns how its process ended.
"""

import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rustgpt_jax.errors import UserError, suggest_names
from rustgpt_jax.sharding.hardware_specs import count_cores
from rustgpt_jax.sweeps.local_launchers import MAX_DEATHS, ChunkRetries, Launch, find_visible_gpus
from rustgpt_jax.sweeps.trial_batching import Chunk
from rustgpt_jax.workdir.run_dir import check_no_symlinks

POLL_SECONDS = 0.5
LOCAL = "local"
# Options of a task with whole values, by the name of the resource on a node.
COUNTS = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
CUSTOM = "resources."
OPTIONS = ("address", *COUNTS, "accelerator_type", f"{CUSTOM}NAME")
# Ray's object store, which a sweep hardly uses; about the least that Ray accepts.
OBJECT_STORE_BYTES = 100 * 1024**2
# Variables of the driver that tasks on other nodes need, too.
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "NCCL_", "RUSTGPT_JAX_")


def check_options(options: Mapping[str, str]) -> None:
    """Raise UserError if an option of --ray is unknown or its value is invalid."""
    for key, value in options.items():
        if key in COUNTS:
            if not (value.isascii() and value.isdigit()):
                hint = " To share a GPU among trials, use --mode=fused." if key == "num_gpus" else ""
                raise UserError(f"--ray={key}={value}: {value!r} is not a whole number.{hint}")
        elif key.startswith(CUSTOM):
            if not (value.isascii() and value.replace(".", "", 1).isdigit()):
                raise UserError(f"--ray={key}={value}: {value!r} is not a number.")
        elif key not in OPTIONS:
            raise UserError(f"--ray={key}: unknown option.{suggest_names(key, OPTIONS)}")
    if options.get("address", "").startswith("ray://"):
        raise UserError(
            "--ray=address: Ray Client (ray://) is not supported. Run the sweep on a node of the cluster, for example "
            "with `ray job submit`."
        )


@contextmanager
def connect(options: Mapping[str, str], message: Callable[[str], None]) -> Iterator[None]:
    """Connect to a Ray cluster, or start a local one, for the duration of the block.

    Args:
        options: The options of --ray.
        message: Prints a message to the user.

    Raises:
        UserError: Ray is not installed, the cluster does not respond, or this machine cannot run a task.
    """
    ray = _import_ray()
    # A process that uses Ray already, such as a notebook, keeps its connection.
    if ray.is_initialized():
        yield
        return
    address = options.get("address") or os.environ.get("RAY_ADDRESS") or LOCAL
    local: dict[str, Any] = {}
    if address == LOCAL:
        local = {"num_cpus": count_cores(), "num_gpus": len(find_visible_gpus()), "include_dashboard": False}
        local["object_store_memory"] = OBJECT_STORE_BYTES
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--launcher=ray: there is no connection to a Ray cluster at {address}: {reason}") from error
    try:
        if count_tasks(options)[0] == 0:
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in _requested_resources(options).items())
            if address == LOCAL:
                raise UserError(f"--launcher=ray: this machine does not have what a task requests: {wanted}.")
            message(f"No node of the Ray cluster has what a task requests ({wanted}); the trials wait for one.")
        yield
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    """Return the module `ray`. It reports no usage statistics."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("--launcher=ray needs Ray: python -m pip install 'rustgpt_jax[ray]'.") from None
    return ray


def count_tasks(options: Mapping[str, str]) -> tuple[int, int]:
    """Return how many tasks the cluster has room for, apart from those of other jobs, and the GPUs of each task."""
    requested = _requested_resources(options)
    needed = {name: amount for name, amount in requested.items() if amount}
    if not needed:
        raise UserError("--ray=num_cpus=0: a task must request something, such as a CPU or a GPU.")
    rooms = [min(int(node.get(name, 0) // amount) for name, amount in needed.items()) for node in _nodes()]
    return sum(rooms), int(requested["GPU"])


def _nodes() -> list[dict[str, float]]:
    """Return the resources of each node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _requested_resources(options: Mapping[str, str]) -> dict[str, float]:
    """Return the resources of a task: by default, one core, and one GPU if the cluster has any."""
    has_gpus = any(node.get("GPU", 0) for node in _nodes())
    requested = {"CPU": 1.0, "GPU": float(has_gpus)}
    requested |= {COUNTS[key]: float(options[key]) for key in COUNTS if key in options}
    requested |= {key.removeprefix(CUSTOM): float(options[key]) for key in options if key.startswith(CUSTOM)}
    if "accelerator_type" in options:
        # Ray's name and amount for it.
        requested[f"accelerator_type:{options['accelerator_type']}"] = 0.001
    return requested


def run_on_ray(launch: Launch, chunks: Sequence[Chunk]) -> None:
    """Run each chunk as a Ray task, at most `n_workers` at a time, and wait until all have ended.

    A chunk whose process, worker or node died is run again; after MAX_DEATHS such deaths in a row without progress, its
    trials fail. A stop cancels the tasks, whose processes save their trials.
    """
    import ray

    requested, retries = _requested_resources(launch.options), ChunkRetries(launch.folder)
    waiting, running = deque(chunks), dict[Any, Chunk]()
    while (waiting or running) and not launch.is_stop_requested():
        while waiting and len(running) < launch.n_workers:
            chunk = waiting.popleft()
            running[_submit(launch, chunk, requested)] = chunk
        ended, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        for task in ended:
            chunk, death = running.pop(task), _get_death(task)
            if death and retries.unfinished(chunk):
                if retries.should_retry(chunk):
                    waiting.append(chunk)
                else:
                    error = f"its worker died {MAX_DEATHS} times before the trial was done, most recently with {death}"
                    retries.record_failure(chunk, error, _log_file(launch, chunk))
    for task in running:
        ray.cancel(task)
    if running:
        ray.wait(list(running), num_returns=len(running))


def _log_file(launch: Launch, chunk: Chunk) -> Path:
    return launch.folder.path.absolute() / "workers" / f"{chunk.trials[0]}.log"


def _submit(launch: Launch, chunk: Chunk, requested: Mapping[str, float]) -> Any:
    """Submit the task of a chunk, and return the reference to its result."""
    import ray

    log = _log_file(launch, chunk)
    log.parent.mkdir(exist_ok=True)
    check_no_symlinks([log])
    amounts = dict(requested)
    n_gpus = int(amounts.pop("GPU"))
    if n_gpus:
        n_gpus = max(n_gpus, chunk.devices or 0)
    n_cores = int(amounts.pop("CPU"))
    variables = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    # A node may have GPUs that were not requested.
    variables |= {} if n_gpus or amounts.keys() - {"memory"} else {"JAX_PLATFORMS": "cpu"}
    path = os.pathsep.join(filter(None, [str(launch.code), os.environ.get("PYTHONPATH")]))
    task = ray.remote(_pickled_by_value(run_chunk_in_process)).options(
        name=f"{launch.folder.path.absolute().name} {chunk.trials[0]}",
        num_cpus=n_cores,
        num_gpus=n_gpus,
        memory=amounts.pop("memory", None),
        resources=amounts,
        # The launcher decides whether to run a chunk again.
        max_retries=0,
    )
    return task.remote(
        str(launch.folder.path.absolute()),
        launch.code.name,
        chunk.to_json(),
        str(log),
        0 if n_gpus else n_cores,
        variables | {"PYTHONPATH": path},
    )


def _pickled_by_value(function: Any) -> Any:
    """Return a function of this module, which nodes receive as code instead of importing the module."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return function


def _get_death(task: Any) -> str:
    """Return how the process, worker or node of a task died, or '' if the task processed its chunk."""
    import ray

    try:
        return str(ray.get(task))
    except ray.exceptions.RayError as error:
        first, *_ = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {first}" if first else type(error).__name__


# The functions of a task, which run on the nodes. They use only the standard library.


def run_chunk_in_process(folder: str, code: str, chunk: str, log: str, n_cores: int, variables: dict[str, str]) -> str:
    """Run a chunk in a separate process, which saves its trials when the task is canceled or its worker dies.

    Args:
        folder: The folder of the sweep.
        code: The hash of the code.
        chunk: The chunk as JSON.
        log: The file to append the log of the process to.
        n_cores: The number of cores to pin the process to; 0 for all.
        variables: Environment variables of the process.

    Returns:
        How the process died, or '' if it processed the chunk.
    """
    if not os.path.isdir(folder):
        return f"no folder {folder} on the node {socket.gethostname()}: all nodes must share the sweep's folder"
    # Ray limits the threads of OpenMP, and JAX records the variable as part of a run's environment.
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with ExitStack() as stack:
        output = stack.enter_context(open(log, "ab"))
        cores = reserve_cores(n_cores, stack)
        pin = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
        process = subprocess.Popen(
            [*pin, sys.executable, "-P", "-m", "rustgpt_jax.sweeps.worker", folder, code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=inherited | variables,
            text=True,
            # The process keeps its cores until it ends, even if the task ends before.
            pass_fds=list(cores.values()),
            start_new_session=True,
        )
        assert process.stdin and process.stdout
        answer = ""
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(chunk + "\n")
                process.stdin.flush()
            # A cancellation raises KeyboardInterrupt between two polls.
            while not select.select([process.stdout], [], [], 0.2)[0]:
                pass
            answer = process.stdout.readline()
        finally:
            # At the end of its input, the process saves its trials and exits.
            with suppress(BrokenPipeError):
                process.stdin.close()
            status = process.wait()
    if answer == "done\n":
        return ""
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def reserve_cores(count: int, stack: ExitStack) -> dict[int, int]:
    """Reserve cores of this machine that no other task of the user has, until `stack` ends.

    Ray counts cores but assigns none, and XLA uses all that it may use.

    Returns:
        The cores, each with the file descriptor of its lock. Empty if all cores are wanted, or too few are free.
    """
    available = sorted(os.sched_getaffinity(0))
    if not 0 < count < len(available) or not shutil.which("taskset"):
        return {}
    locks = Path(tempfile.gettempdir()) / f"rustgpt_jax_cores_{os.getuid()}"
    reserved: dict[int, int] = {}
    with ExitStack() as held:
        for core in available:
            try:
                locks.mkdir(mode=0o700, exist_ok=True)
                lock = os.open(locks / str(core), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            except OSError:
                return {}
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            held.callback(os.close, lock)
            reserved[core] = lock
            if len(reserved) == count:
                stack.push(held.pop_all())
                return reserved
    return {}

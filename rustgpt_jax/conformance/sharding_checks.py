"""A batch that is shared by eight devices gives what it gives on one.

Where a process has fewer devices, the check runs in a child process,
`python -m rustgpt_jax.conformance.sharding_checks`.
"""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rustgpt_jax.conformance import fixtures
from rustgpt_jax.conformance.assertions import Broken, crash
from rustgpt_jax.conformance.targets import Subject, subjects
from rustgpt_jax.conformance.tiny_config import SMALL
from rustgpt_jax.conformance.transform_checks import require_close_results

DEVICES = 8


def eight_devices_are_one(subject: Subject) -> str:
    """Logits and gradients with the rows of the batch over eight devices, against those of one device."""
    if len(jax.devices()) < DEVICES:
        return _in_a_child(subject)
    model = subject.small_model
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
    cut, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    params = fixtures.random_params(model)
    rows = fixtures.rows_of(fixtures.random_tokens(model), model)
    shared = rows._replace(**{name: jax.device_put(getattr(rows, name), cut) for name in rows._fields[:-1]})
    found = fixtures.run(jax.device_put(params, whole), shared, model)
    largest = require_close_results(found, fixtures.ordinary(model), "eight devices are not one")
    return f"within {largest:.0e}"


def _in_a_child(subject: Subject) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    changes = {
        field: value for field, value in dataclasses.asdict(subject.small_model).items() if value != SMALL[field]
    }
    command = [sys.executable, "-m", "rustgpt_jax.conformance.sharding_checks", subject.title, json.dumps(changes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rsplit("\n", 1)[-1])
    answer = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    if "broken" in answer:
        raise Broken(*answer["broken"])
    return answer["note"]


def main(title: str, changes: str) -> None:
    """Run the check on eight virtual devices of the CPU, and print what came of it as a line of JSON."""
    use_eight_cpu_devices()
    (subject,) = subjects(title, json.loads(changes))
    answer: dict[str, Any]
    try:
        with fixtures.conditions():
            answer = {"note": eight_devices_are_one(subject)}
    except Broken as broken:
        answer = {"broken": broken.args}
    except Exception as error:
        answer = {"broken": ("the part fails on eight devices", "its forward or backward pass", crash(error))}
    print(json.dumps(answer))


def use_eight_cpu_devices() -> None:
    """Make eight devices of a CPU. To be called before JAX is used; an accelerator is left as it is."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", DEVICES)


if __name__ == "__main__":
    main(*sys.argv[1:])

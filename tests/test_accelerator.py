"""The accelerator benchmark: its arithmetic, batch search and PyTorch model, and a whole run with tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_params
from hypothesis import given
from hypothesis import strategies as st

from experiments.benchmarks import accelerator_report as report
from experiments.benchmarks.best_batch import GAIN, SIZES, Best, Failure, Knobs, best_batch, make_config, run_task
from experiments.benchmarks.gpt2_jax import attention_task, cost, synthetic
from rustgpt_jax.config.schema import Config, partition, replace_paths
from rustgpt_jax.model import transformer
from rustgpt_jax.model.flops import parameter_shapes, total_size
from rustgpt_jax.model.kernels.verify import TOLERANCES, largest_difference
from rustgpt_jax.sharding.hardware_specs import CHIPS
from rustgpt_jax.training.train_step import compiled_train_steps, init_state_from_params

pytestmark = pytest.mark.usefixtures("quick_codegen")

ROOT = Path(__file__).parent.parent
PARAMETERS = {"124m": 124_475_904, "350m": 354_871_296, "1.5b": 1_557_686_400}


# Shares of peak, computed by hand.


@pytest.mark.parametrize("size", PARAMETERS)
def test_training_flops_per_token_match_the_closed_form(size: str) -> None:
    model = make_config(size).model
    found = cost(replace_paths(model, {"attention.kernel": "cudnn", "remat": "full"}))
    width, window = model.d_model, model.context_length
    assert found["parameters"] == PARAMETERS[size]
    weights = 50304 * width + 12 * model.n_layers * width**2
    assert found["flops_per_token"] == 6 * weights + 12 * model.n_layers * width * window


def test_shares_of_peak_flops_and_bandwidth() -> None:
    h100 = report.find_chip("NVIDIA H100 80GB HBM3")
    assert h100 is CHIPS["h100"]
    # 989 TFLOP/s at one TFLOP a token are 989 tokens a second; 3.35 TB/s read 3.35 GB in a millisecond.
    assert report.share_of_peak(1e12, 494.5, h100) == pytest.approx(0.5)
    assert report.share_of_bandwidth(3.35e9, 2e-3, h100) == pytest.approx(0.5)
    assert report.find_chip("TPU v5 lite") is CHIPS["v5e"] and report.find_chip("TPU v5") is CHIPS["v5p"]
    assert report.find_chip("cpu") is None
    assert report.share_of_peak(1e12, 1.0, None) is None and report.share_of_bandwidth(1.0, 1.0, None) is None


def training_row(framework: str, batch: int, seconds: float, size: str = "350m", **knobs: Any) -> dict[str, Any]:
    return {
        **{"framework": framework, "size": size, "batch": batch, "knobs": knobs, "tokens": 1024 * batch},
        **{"seconds": [0.9 * seconds, seconds, 5 * seconds], "memory": 10**9, "first_call": 1.0, "kernel": "cudnn"},
    }


def results(**sections: Any) -> dict[str, Any]:
    environment = {"packages": {}, "python": {"version": "3"}, "machine": {"processor": "", "cores": 1}}
    environment |= {"devices": {"driver": None, "platform_version": ""}, "variables": {}}
    costs = {"350m": {"parameters": 355e6, "flops_per_token": 2.4e9}}
    machine = {"kind": "NVIDIA H100", "platform": "gpu", "memory": 8e10, "costs": costs, "environment": environment}
    machine |= {"date": "", "command": ""}
    return {"machine": machine, "torch": None} | {name: [] for name in report.LISTS} | sections


def test_goals_use_the_best_of_each_framework() -> None:
    rows = [
        training_row("rustgpt_jax", 8, 0.050),
        training_row("rustgpt_jax", 16, 0.070),  # The best: 234,057 tokens a second.
        training_row("PyTorch", 16, 0.077),  # 1.1 times as long.
        training_row("PyTorch", 32, 0.147),  # Its best.
    ]
    decoded = {"size": "350m", "batch": 1, "parameter_bytes": 600e6, "cache_bytes": 70e6, "memory": None}
    decoding = [decoded | {"scan_layers": True, "seconds": [1e-3]}, decoded | {"scan_layers": False, "seconds": [4e-4]}]
    sweep = [{"trials": 16, "one_after_another": [0.016], "fused": [0.002], "difference": 0.0, "memory": None}]
    repeated = [{"size": "350m", "batch": 8, "steps": 10, "repeated": True, "resumed": True}]
    found = results(training=rows, decoding=decoding, sweep=sweep, reproduction=repeated)
    measured_goals = [goal.measured for goal in report.goals(found)]
    assert measured_goals == pytest.approx(
        [2.4e9 * 16384 / 0.070 / 989e12, 147 / 140, 670e6 / 4e-4 / 3.35e12, 8.0, True]
    )
    assert report.ratios(found, "350m")[1] == pytest.approx(1.1)
    page = report.markdown(found)
    assert "| training 350m: share of peak FLOPs | 50.0% | 56.8% | met |" in page
    assert "| decoding 350m at batch 1: share of bandwidth | 60.0% | 50.0% | missed |" in page
    alone = results(training=rows[:2])
    assert [goal.measured for goal in report.goals(alone)][1:] == [None]
    assert "| training 350m: against PyTorch | 1.00x | - | not measured |" in report.markdown(alone)


def test_repeated_measurements_are_merged() -> None:
    first, again = training_row("PyTorch", 8, 1.0), training_row("PyTorch", 8, 3.0)
    other = training_row("PyTorch", 8, 1.0, remat="full")
    (same, apart) = report.merge_rows([first, other, again | {"memory": 10**8}])
    assert same["seconds"] == first["seconds"] + again["seconds"] and same["memory"] == 10**8
    assert apart == other


def test_partial_results_are_read_and_collected(tmp_path: Path) -> None:
    machine = {"section": "machine", "kind": "NVIDIA H100"}
    rows = [machine | {"costs": {"124m": 1}}, {"section": "sweep", "trials": 16}, machine | {"costs": {"350m": 2}}]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"section": "sw')
    found = report.collect(report.read_rows(file))
    assert found["machine"] == machine | {"costs": {"124m": 1, "350m": 2}}
    assert found["sweep"] == [rows[1]] and found["training"] == [] and found["torch"] is None


def test_failures_are_reported_and_rejections_are_not_failures() -> None:
    check = {"size": "350m", "kernel": "cudnn", "dtype": "bfloat16"}
    right, wrong = ({"difference": each, "tolerance": 3e-2} for each in (1e-2, float("nan")))
    assert not report.has_failed(results(checks=[check | right, check | {"refuses": "it is slow"}]))
    assert report.has_failed(results(checks=[check | wrong]))
    assert report.has_failed(results(checks=[check | {"failed": "[/bold] no | such kernel"}]))
    told = report.markdown(results(checks=[check | wrong], torch={"absent": "PyTorch is not there"}))
    assert "WRONG" in told and "PyTorch is not there" in told
    assert report.has_failed(results(reproduction=[{"repeated": True, "resumed": False}]))
    missed = {"what": "batch 8", "reason": "out of memory"}
    assert not report.has_failed(results(unmeasured=[missed | {"is_expected": True}]))
    assert report.has_failed(results(unmeasured=[missed | {"is_expected": False}]))


# The search for the best batch.

SAVINGS: tuple[Knobs, ...] = ({}, {"remat": "some"}, {"remat": "full"})


@given(
    room=st.floats(0.5, 3000),
    half=st.floats(0.1, 200),
    first=st.sampled_from([1, 2, 8, 32]),
    cost_of=st.tuples(st.floats(0.3, 1), st.floats(0.3, 1)),
)
def test_batch_search_finds_the_best_that_fits(
    room: float, half: float, first: int, cost_of: tuple[float, float]
) -> None:
    """A device with memory for `room` rows (savings need 1/2 and 1/4 of it) and half its peak rate at `half` rows."""
    tried: list[tuple[int, int]] = []

    def rate(batch: int, knobs: Knobs) -> float:
        saving = SAVINGS.index(knobs)
        tried.append((batch, saving))
        if batch / 2**saving > room:
            raise Failure("RESOURCE_EXHAUSTED: Out of memory")
        return speed(batch, saving)

    def speed(batch: int, saving: int) -> float:
        return (1.0, cost_of[0], cost_of[0] * cost_of[1])[saving] * batch / (batch + half)

    if room < 0.25:
        with pytest.raises(Failure):
            best_batch(rate, first, 512, SAVINGS)
        return
    found = best_batch(rate, first, 512, SAVINGS)
    fitting = [(batch, saving) for batch, saving in tried if batch / 2**saving <= room]
    assert found.rate == max(speed(*each) for each in fitting)
    assert len(set(tried)) == len(tried)
    # Without savings, another doubling would not fit, gain too little, or exceed the limit.
    plain = [batch for batch, saving in fitting if saving == 0]
    if plain:
        last = max(plain)
        gained = speed(2 * last, 0) >= GAIN * speed(last, 0)
        before = last == first or speed(last, 0) >= GAIN * speed(last // 2, 0)
        assert 2 * last > min(room, 512) or not before or not gained


def test_batch_search_stops_at_other_failures() -> None:
    def rate(batch: int, knobs: Knobs) -> float:
        if batch > 4:
            raise Failure("the driver is gone")
        return float(batch)

    assert best_batch(rate, 2, 512, SAVINGS) == Best(4.0, 4, {})
    with pytest.raises(Failure, match="driver"):
        best_batch(rate, 8, 512, SAVINGS)


@pytest.mark.parametrize("reason", ["RESOURCE_EXHAUSTED: Out of memory", "OutOfMemoryError: CUDA out of memory."])
def test_batch_search_fails_if_nothing_fits(reason: str) -> None:
    def rate(batch: int, knobs: Knobs) -> float:
        tried.append(batch)
        raise Failure(reason)

    tried: list[int] = []
    with pytest.raises(Failure):
        best_batch(rate, 8, 512, SAVINGS)
    assert tried == [8, 8, 8, 4, 2, 1]


def test_failed_process_reports_the_reason_and_leaves_a_log(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="KeyError: 'cook'"):
        run_task("gpt2_torch", {"what": "cook"}, 60, tmp_path / "out" / "log.txt")
    assert "Traceback" in (tmp_path / "out" / "log.txt").read_text()
    with pytest.raises(Failure, match="status 1: .*No module named"):
        run_task("gpt3", {"what": "cook"}, 60, tmp_path / "log.txt")
    with pytest.raises(Failure, match="more than 0 seconds"):
        run_task("gpt2_torch", {"what": "cook"}, 0.01, tmp_path / "log.txt")


# The PyTorch model.


def smoke(**knobs: Any) -> Config:
    return make_config("smoke", {"model.dtype": "float32", "schedule.name": "constant"} | knobs)


def load(layers: Any, params: Any) -> None:
    """Copies our parameters to the PyTorch model."""
    import torch

    def fill(layer: Any, **arrays: Any) -> None:
        layer.load_state_dict({name: torch.tensor(np.asarray(array)) for name, array in arrays.items()})

    def linear(layer: Any, *parts: Any) -> None:
        kernel = np.concatenate([np.asarray(part["kernel"]) for part in parts], axis=1)
        fill(layer, weight=kernel.T, bias=np.concatenate([np.asarray(part["bias"]) for part in parts]))

    def norm(layer: Any, part: Any) -> None:
        fill(layer, weight=part["scale"], bias=part["bias"])

    for index, layer in enumerate(layers["blocks"]):
        block = jax.tree.map(lambda leaf, index=index: leaf[index], params["blocks"]["0"])
        mixer = block["mixer"]
        norm(layer["mixer_norm"], block["mixer_norm"])
        linear(layer["query_key_value"], mixer["query"], mixer["key"], mixer["value"])
        linear(layer["output"], mixer["output"])
        norm(layer["feedforward_norm"], block["feedforward_norm"])
        linear(layer["up"], block["feedforward"]["up"])
        linear(layer["down"], block["feedforward"]["down"])
    fill(layers["embedding"], weight=params["embedding"]["table"])
    fill(layers["positions"], weight=params["positions"]["table"])
    norm(layers["norm"], params["norm"])


@pytest.mark.oracle
@pytest.mark.parametrize("size", SIZES)
def test_the_pytorch_model_has_the_same_parameters(size: str) -> None:
    torch = pytest.importorskip("torch")
    from experiments.benchmarks.gpt2_torch import gpt2

    model = make_config(size).model
    with torch.device("meta"):
        layers = gpt2(model)
    assert sum(parameter.numel() for parameter in layers.parameters()) == total_size(parameter_shapes(model))


@pytest.mark.oracle
def test_the_pytorch_model_has_the_same_logits() -> None:
    torch = pytest.importorskip("torch")
    from experiments.benchmarks.gpt2_torch import gpt2, logits

    model = smoke().model
    params = random_params(model)
    layers = gpt2(model)
    load(layers, params)
    tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size, (3, 40), np.int32)
    with torch.no_grad():
        theirs = logits(layers, torch.tensor(tokens_BT), model).numpy()
    ours = np.asarray(transformer.apply(params, tokens_BT, model)[0])
    assert np.std(ours) > 1
    np.testing.assert_allclose(theirs, ours, atol=2e-5 * np.max(np.abs(ours)), rtol=0)


@pytest.mark.oracle
def test_the_pytorch_model_trains_identically() -> None:
    """Losses of several steps cover gradients, clipping, AdamW and weight-decay groups."""
    torch = pytest.importorskip("torch")
    from experiments.benchmarks.gpt2_torch import gpt2, make_step

    n_steps = 6
    config = smoke(
        **{"optimizer.learning_rate": 1e-2, "optimizer.weight_decay": 3.0, "schedule.warmup_steps": 0},
        **{"training.steps_per_jit_call": n_steps},
    )
    static, arguments = partition(config)
    params, batches = random_params(config.model), synthetic(config, (n_steps, 2))
    state, zero = init_state_from_params(static, arguments, params), np.zeros((), np.int32)
    ours = compiled_train_steps(static, state, batches, np.int32(n_steps), arguments, zero)[1].loss
    assert ours[0] - ours[-1] > 0.5
    layers = gpt2(config.model)
    load(layers, params)
    step = make_step(config, layers, compiled=False)
    windows = zip(*(torch.tensor(leaf).long() for leaf in batches[:2]), strict=True)
    np.testing.assert_allclose([step(*window).item() for window in windows], ours, rtol=2e-4)


@pytest.mark.oracle
def test_the_pytorch_model_compiles_to_one_graph() -> None:
    """torch.compile has no graph breaks, with or without checkpointing."""
    torch = pytest.importorskip("torch")
    from experiments.benchmarks.gpt2_torch import gpt2, make_loss

    tokens_BT = torch.zeros((2, 64), dtype=torch.int64)
    for remat in ("none", "full"):
        model = smoke(**{"model.remat": remat}).model
        loss = make_loss(gpt2(model), model)
        torch.compile(loss, backend="eager", fullgraph=True)(tokens_BT, tokens_BT).backward()


# Checks of kernels.


def test_kernels_are_checked_on_full_rows_with_documents_and_padding() -> None:
    block = smoke().model.block(0)
    task, cotangent_BTHC = attention_task(block)
    assert (
        task.q_BTHC.shape
        == cotangent_BTHC.shape
        == (2, block.context_length, block.attention.n_heads, block.head_width)
    )
    assert set(np.unique(task.block_inputs.segments_BT[1])) == {0, 1, 2}
    assert largest_difference("blockwise", task, cotangent_BTHC) <= TOLERANCES["float32"]


# The whole benchmark.


def command(out: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OMP_NUM_THREADS": "1"}
    file = ROOT / "experiments" / "benchmarks" / "accelerator.py"
    return subprocess.run(
        [sys.executable, file, f"--out={out}", *words],
        cwd=out.parent,
        env=environment | variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.long
def test_benchmark_runs_with_tiny_models(tmp_path: Path) -> None:
    out, bare = tmp_path / "out", {"PYTHONPATH": str(tmp_path / "stub")}
    (tmp_path / "stub").mkdir()
    for absent in ("grain", "jinja2", "matplotlib", "safetensors", "tensorboardX", "tokenizers"):
        (tmp_path / "stub" / f"{absent}.py").write_text("raise ImportError('not in a bare image')")
    done = command(out, "--smoke", **bare)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    page = (out / "report.md").read_text()
    found = report.collect(report.read_rows(out / "results.jsonl"))
    titles = ("Training", "Decoding", "A sweep of small trials", "Reproduction", "Attention kernels")
    for title in (*titles, "Goals for one GPU"):
        assert f"\n## {title}" in page and title in done.stdout
    assert found["unmeasured"] == [] and not (out / "log.txt").exists()
    ours = [row for row in found["training"] if row["framework"] == "rustgpt_jax"]
    assert {row["batch"] for row in ours} == {1, 2} and len(ours) == 3
    for row in found["training"] + found["decoding"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
    (sweep,) = found["sweep"]
    assert sweep["trials"] == 4 and sweep["difference"] < 1e-2
    assert {row["kernel"]: "refuses" in row for row in found["checks"]}["cudnn"]
    if "absent" not in found["torch"]:
        assert "our tokens a second over PyTorch's" in page

    # Results are appended, and a PyTorch that cannot be imported is reported.
    (tmp_path / "stub" / "torch.py").write_text("raise ImportError('not here')")
    done = command(out, "--smoke", "--add", "--only=torch", **bare)
    assert done.returncode == 0, done.stdout + done.stderr
    again = report.collect(report.read_rows(out / "results.jsonl"))
    assert again["training"] == found["training"] and "not here" in again["torch"]["absent"]
    assert "not here" in (out / "report.md").read_text()

    # What was measured before the time is over is reported.
    done = command(out, "--smoke", "--minutes=0.2", **bare)
    assert done.returncode == 0 and "the 0.2 minutes of --minutes are over" in done.stdout, done.stdout + done.stderr
    assert "are over" in (out / "report.md").read_text()


@pytest.mark.slow
def test_cpu_is_rejected(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, sentence in (
        (["--sizes=124m"], "error: This needs an accelerator, and JAX finds only a CPU here; --smoke tries it"),
        (["--only=training,decodnig"], "error: --only: unknown 'decodnig'. Did you mean 'decoding'?"),
        (["--smoke", "--add"], "error: --add: there is no"),
    ):
        done = command(out, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(sentence) and done.stderr.count("\n") == 1
    assert not out.exists()

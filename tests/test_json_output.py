"""`--json`: one document on standard output, described by the schemas that ship with the package; and AGENTS.md."""

import csv
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import check_result
from test_cli import LAUNCH, TINY, environment, run_all, start_training

from rustgpt_jax.cli import arguments, main
from rustgpt_jax.cli.main import VERBS, parse_args
from rustgpt_jax.cli.output import DOCUMENT, SCHEMAS, load_schema, to_json
from rustgpt_jax.sweeps import slurm
from rustgpt_jax.training.load_model import load_model

# The schemas.


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every part of a schema that describes an object with named fields."""
    if isinstance(schema, dict):
        if "properties" in schema:
            yield schema
        for part in schema.values():
            yield from objects(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part)


def test_every_verb_has_a_schema() -> None:
    assert {file.stem for file in SCHEMAS.glob("*.json")} == {*VERBS, "document"}


@pytest.mark.parametrize("verb", VERBS)
def test_schemas_are_strict_and_describe_each_field(verb: str) -> None:
    schema = load_schema(verb)
    jsonschema.Draft202012Validator.check_schema(schema)
    for each in objects(schema):
        fields = each["properties"]
        assert all(field.get("description", "").endswith(".") for field in fields.values()), fields
        # The fields of metrics are open, and a document has a result or an error.
        is_open = "step" in fields and "stage" in fields and "additionalProperties" in each
        if not is_open and "schema_version" not in fields:
            assert each["additionalProperties"] is False and each["required"] == list(fields)


# Values.


def test_values_become_json() -> None:
    values = {"path": Path("a/b"), "pair": (1, 2.5), "numpy": np.float32(0.5), "count": np.int64(3), 5: None}
    assert to_json(values) == {"path": "a/b", "pair": [1, 2.5], "numpy": 0.5, "count": 3, "5": None}
    assert to_json([math.nan, math.inf, -math.inf, np.float32("nan")]) == ["NaN", "Infinity", "-Infinity", "NaN"]
    with pytest.raises(TypeError, match="cannot hold"):
        to_json({"array": np.zeros(2)})


# Errors.


def parse(text: str, verb: str | None) -> dict[str, Any]:
    """Return the only document on standard output, which must match the schema of the verb."""
    assert text.count("\n") == 1
    document = json.loads(text)
    schema = json.loads((SCHEMAS / "document.json").read_text()) if verb is None else load_schema(verb)
    jsonschema.validate(document, schema, jsonschema.Draft202012Validator)
    assert document["verb"] == verb
    return document


MISTAKES = {
    "verb": (["tarin", "--json"], None),
    "no verb": (["--json"], None),
    "flag": (["train", "--json", "--confg=x"], "train"),
    "verbosity": (["configs", "--verbosity=bogus", "--json"], "configs"),
    "not UTF-8": (["generate", "--prompt=a\udcff", "-json"], "generate"),
    "config": (["--json=true", "explain", "--config=nowhere.py"], "explain"),
    "run": (["evaluate", "nowhere", "--json"], "evaluate"),
    "schema": (["schema", "tarin", "--json"], "schema"),
    "knob": (["train", TINY, "--config.model.dropout=2", "--json"], "train"),
}


def test_mistakes_are_documents_too(tmp_path: Path) -> None:
    lines = {name: words for name, (words, _) in MISTAKES.items()}
    lines["quiet"] = ["explain", "--json", "--nojson"]
    lines["help"] = ["explain", "--json", "--help"]
    results = run_all(lines, tmp_path)
    status, out, error = results.pop("quiet")
    assert (status, out) == (2, "") and error
    status, out, error = results.pop("help")
    assert status == 0 and "usage" in out and error == ""
    for name, (status, out, error) in results.items():
        document = parse(out, MISTAKES[name][1])
        assert status == document["status"] == 2
        assert error == f"error: {document['error']}\n"


FULL = "error: Cannot write to standard output"


@pytest.mark.parametrize(
    ("words", "status", "n_documents", "message"),
    [
        ("train --json 2>&-", 0, 1, ""),
        ("train --json >&-", 2, 0, ""),
        ("train --json >/dev/full", 2, 0, f"{FULL}: No space left on device."),
        ("train >/dev/full", 2, 0, f"{FULL} or a file: No space left on device."),
    ],
)
def test_standard_streams_may_be_closed_or_full(
    words: str, status: int, n_documents: int, message: str, tmp_path: Path
) -> None:
    command = f"{shlex.join([sys.executable, LAUNCH])} schema {words}"
    environ = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert (done.stderr.splitlines() or [""])[-1] == message
    assert [parse(line + "\n", "schema")["status"] for line in done.stdout.splitlines()] == [status] * n_documents


def test_a_bug_is_a_document_and_a_traceback(tmp_path: Path) -> None:
    code = """
import sys
from rustgpt_jax.cli import main
def run(args):
    print("text")
    raise {}
main.VERBS["doctor"] = main.VERBS["doctor"]._replace(run=run)
sys.exit(main.main(main.parse_args(["launch.py", "doctor", "--json"])))
"""
    for error, status, message in (
        ("RuntimeError('broken')", 1, "RuntimeError: broken"),
        ("OSError('of no file')", 1, "OSError: of no file"),
        ("KeyboardInterrupt", 130, "The command was interrupted."),
    ):
        command = [sys.executable, "-c", code.format(error)]
        done = subprocess.run(command, cwd=Path(LAUNCH).parent, capture_output=True, text=True)
        document = parse(done.stdout, "doctor")
        assert (document["status"], document["error"]) == (done.returncode, message) == (status, message)
        assert done.stderr.startswith("text\n") and ("Traceback" in done.stderr) == (status == 1)


# The result of every verb.

# A very small run that takes few seconds, most of them to compile.
SMALL = (
    "--config.model.d_model=16",
    "--config.model.n_layers=1",
    "--config.model.attention.n_kv_heads=None",
    "--config.model.context_length=16",
    "--config.training.steps=8",
    "--config.schedule.warmup_steps=2",
    "--config.logging.log_every=1",
    "--config.logging.eval_every=4",
    "--config.logging.checkpoint_every=4",
    "--config.sampling.max_tokens=4",
)
RATES = """
from configs import tiny
from rustgpt_jax.sweeps import values

get_config = tiny.get_config

def sweep():
    return values("optimizer.learning_rate", 1e-3, 1e30)
"""


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that was run: its exit status, document and human text."""

    status: int
    document: dict[str, Any]
    text: str

    @property
    def result(self) -> dict[str, Any]:
        return self.document["result"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """The results of one command line for each verb, by name."""
    folder = tmp_path_factory.mktemp("json")
    (folder / "rates.py").write_text(RATES)
    lines = {
        "train": ["train", TINY, *SMALL, "--run=run"],
        "train diverged": ["train", TINY, *SMALL, "--config.optimizer.learning_rate=1e30", "--run=diverged"],
        "sweep": ["sweep", "--config=rates.py", *SMALL, "--run=rates", "--mode=exact", "--width=2"],
        "sweep dry": ["sweep", "--config=rates.py", *SMALL, "--dry_run"],
        "report": ["report", "rates"],
        "explain": ["explain", "run"],
        "explain program": ["explain", TINY, *SMALL, "--program"],
        "configs": ["configs"],
        "components": ["components"],
        "data": ["data", "run"],
        "runs": ["runs", "run", "rates"],
        "plan": [
            "plan",
            TINY,
            *SMALL,
            "--config.model.vocab_size=2000000000",
            "--config.training.batch_size=1",
            "--devices=1",
            "--chip=h100",
        ],
        "evaluate": ["evaluate", "run", "--config.sampling.weight_dtype=int8"],
        "generate": ["generate", "run", "--prompt=The", "--prompt=A", "--num_samples=2", "--checkpoint=best"],
        "replay": ["replay", "run", "--step=5", "--intermediates"],
        "rerun": ["rerun", "run"],
        "diff": ["diff", "run", "run.rerun"],
        "doctor": ["doctor", "diverged"],
        "check": ["check", "samplers/top_k", "schedules/cosine"],
        "export": ["export", "run", "--to=exported"],
        "export stablehlo": ["export", "run", "--to=stablehlo", "--batch=1"],
        "import": ["import", "--from=exported", "--run=imported"],
        "schema": ["schema", "train"],
    }
    results = run_all({name: [*words, "--json"] for name, words in lines.items()}, folder)
    command = [sys.executable, LAUNCH, "chat", "run", "--json"]
    chat = subprocess.run(command, cwd=folder, input="Hi\n/set x\n", env=environment(), capture_output=True, text=True)
    results["chat"] = [chat.returncode, chat.stdout, chat.stderr]
    found = {}
    for name, (status, out, text) in results.items():
        assert out.count("\n") == 1, (name, status, text)
        found[name] = Done(status, json.loads(out), text)
    return found


@pytest.mark.slow
def test_the_document_of_every_verb_matches_its_schema(done: dict[str, Done]) -> None:
    assert {name.split()[0] for name in done} == set(VERBS)
    for name, each in done.items():
        verb = name.split()[0]
        jsonschema.validate(each.document, load_schema(verb), jsonschema.Draft202012Validator)
        assert ("result" in each.document) != (name == "train diverged"), (name, each.document)
        assert each.document["status"] == each.status
    failed = {name: each.status for name, each in done.items() if each.status}
    assert failed == {"train diverged": 2, "plan": 1}
    # In the same test, because another worker would run all commands again.
    assert_documents_hold_what_the_verbs_found(done)
    assert_text_goes_to_standard_error_also_from_child_processes(done)


def assert_documents_hold_what_the_verbs_found(done: dict[str, Done]) -> None:
    train = done["train"].result
    assert (train["run"], train["step"], train["total_steps"], train["is_complete"]) == ("run", 8, 8, True)
    assert train["last"]["step"] == 8 and train["checkpoints"]["steps"] == [4, 8]
    assert train["best"]["valid/loss"] <= train["last"]["valid/loss"] and train["tokens_per_second"] > 0
    for name in ("sweep", "report"):
        sweep = done[name].result
        assert sweep["counts"] == {"finished": 1, "diverged": 1} and len(sweep["trials"]) == 2
        assert sweep["best"]["knobs"]["optimizer.learning_rate"] == 1e-3
        losses = [trial["final_loss"] for trial in sweep["trials"]]
        assert sweep["best"]["final_loss"] == min(loss for loss in losses if loss is not None)
        assert losses.count(None) == 1 and [setting["n_finished"] for setting in sweep["settings"]] == [1]
    assert len(done["sweep dry"].result["shape_classes"][0]["trials"]) == 2
    assert done["explain"].result["config"]["training.steps"] == {"value": 8, "origin": "command line"}
    assert "tiny" in {each["name"] for each in done["configs"].result["configs"]}
    assert "attention" in {each["name"] for each in done["components"].result["registries"]["mixers"]}
    assert done["data"].result["stages"][0]["seq_len"] == len(done["data"].result["stages"][0]["rows"][0]["tokens"])
    assert {each["status"] for each in done["runs"].result["runs"]} == {"finished", "diverged"}
    program = done["explain program"].result["program"]
    assert program["train_step"]["total"]["flops"]["forward"] == pytest.approx(program["model_flops"] / 3)
    assert not done["plan"].result["fits"] and done["plan"].result["suggestions"]
    assert [each["weight_dtype"] for each in done["evaluate"].result["evaluations"]] == [None, "int8"]
    assert done["evaluate"].result["evaluations"][0]["metrics"]["loss"] == pytest.approx(train["last"]["valid/loss"])
    samples = done["generate"].result["samples"]
    assert [(each["prompt"], each["seed"]) for each in samples] == [("The", 0), ("The", 1), ("A", 0), ("A", 1)]
    assert all(0 < len(each["tokens"]) <= 4 for each in samples)
    good, bad = done["chat"].result["turns"]
    assert good["message"] == "Hi" and good["n_tokens"] and bad["error"].startswith("Unknown setting 'x'.")
    assert done["replay"].result["is_same"] and done["replay"].result["tensors"]
    assert done["rerun"].result["is_same"] and done["rerun"].result["comparison"]["metrics"]["last_step"] == 8
    assert done["diff"].result["is_same"] and done["doctor"].result["step"] == 1
    assert {each["survived"] for each in done["doctor"].result["interventions"]} >= {False}
    assert done["check"].result["n_failed"] == 0 and len(done["check"].result["checks"]) > 3
    assert "exported/config.json" in {file["path"] for file in done["export"].result["files"]}
    assert "run.stablehlo/manifest.json" in {file["path"] for file in done["export stablehlo"].result["files"]}
    assert done["import"].result["architecture"] == done["export"].result["architecture"]
    assert done["schema"].result["schema"] == load_schema("train")


def test_a_submitted_job_is_a_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(slurm, "submit", lambda script: "123")
    args = parse_args(["launch.py", "train", TINY, f"--run={tmp_path}/run", "--launcher=slurm"])
    status, result = VERBS["train"].run(args)
    check_result("train", result)
    assert status == 0 and to_json(result) == {
        "run": f"{tmp_path}/run",
        "job": "123",
        "log": f"{tmp_path}/run.slurm-123.log",
    }


def assert_text_goes_to_standard_error_also_from_child_processes(done: dict[str, Done]) -> None:
    assert "Done in" in done["train"].text and "Report:" in done["sweep"].text
    # The rerun trains in a child process, which inherits the file descriptors.
    assert "Done in" in done["rerun"].text and "bit-identical for 8 steps" in done["rerun"].text


@pytest.mark.slow
def test_a_preempted_run_has_a_result(tmp_path: Path) -> None:
    process = start_training(tmp_path / "run", "--json")
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate()
    document = parse(stdout, "train")
    assert document["status"] == process.returncode == 75
    assert not document["result"]["is_complete"]
    assert document["result"]["checkpoints"]["last"] == document["result"]["step"] > 0


# AGENTS.md.

RATE = "optimizer.learning_rate"


ROOT = Path(LAUNCH).parent


def install_commands(folder: Path) -> dict[str, str]:
    """Write the commands `rustgpt` and `python` to a folder, and return variables in which they are found."""
    for name, command in {"rustgpt": f"{sys.executable} {LAUNCH}", "python": sys.executable}.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return environment() | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def code_blocks(page: str) -> list[tuple[str, str]]:
    """Return the language and the code of each block of a page that can be run."""
    return re.findall(r"```(bash|python)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run_page(folder: Path) -> dict[str, dict[str, Any]]:
    """Run the code blocks of AGENTS.md in a folder, and return the results by the names of their files."""
    variables = install_commands(folder)
    for language, code in code_blocks("AGENTS.md"):
        if language == "python":
            (folder / "rates.py").write_text(code)
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    texts = {file.stem: file.read_text() for file in folder.glob("*.json")}
    return {name: parse(text, "sweep" if name == "plan" else name)["result"] for name, text in texts.items()}


def test_the_commands_of_the_page_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(message: str) -> None:
        raise AssertionError(message)

    monkeypatch.setattr(main, "fail", refuse)
    monkeypatch.setattr(arguments, "fail", refuse)
    commands = re.findall(r"`rustgpt ([^`]+)`", (ROOT / "AGENTS.md").read_text())
    verbs = {
        parse_args(["rustgpt", *shlex.split(command.replace("=K", "=3"))]).verb
        for command in commands
        if "VERB" not in command
    }
    assert verbs >= {"explain", "report", "configs", "components", "data", "runs", "plan", "replay", "diff", "check"}
    DOCUMENT.configure(None, is_requested=False)


@pytest.mark.slow
def test_an_agent_trains_sweeps_decides_and_exports_with_the_commands_of_the_page(tmp_path: Path) -> None:
    results = run_page(tmp_path)
    assert results["train"]["is_complete"] and results["train"]["step"] == 60
    losses: dict[float, list[float]] = {}
    for trial in results["sweep"]["trials"]:
        losses.setdefault(trial["knobs"][RATE], []).append(trial["final_loss"])
    better = min(losses, key=lambda rate: fmean(losses[rate]))
    assert better == 1e-2 == results["sweep"]["best"]["knobs"][RATE] == results["sweep"]["settings"][0]["knobs"][RATE]
    rows = csv.DictReader((tmp_path / "runs/rates/results.csv").read_text().splitlines())
    final_losses = {trial["id"]: trial["final_loss"] for trial in results["sweep"]["trials"]}
    assert {row["trial"]: float(row["valid_loss"]) for row in rows} == final_losses
    assert results["plan"]["n_trials"] == 4
    assert results["evaluate"]["evaluations"][0]["metrics"]["loss"] == results["sweep"]["best"]["final_loss"]
    assert results["generate"]["samples"][0]["text"]
    assert {file["path"] for file in results["export"]["files"]} >= {"winner/config.json", "winner/model.safetensors"}
    trained = load_model(tmp_path / results["sweep"]["best"]["run"]).generator.params["embedding"]["table"]
    exported = load_file(tmp_path / "winner/model.safetensors")
    assert any(array.shape == trained.shape and (array == trained).all() for array in exported.values())


@pytest.mark.slow
def test_the_code_of_the_reference_runs(tmp_path: Path) -> None:
    [(language, code)] = code_blocks("docs/reference/json.md")
    assert language == "python"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=install_commands(tmp_path), check=True)

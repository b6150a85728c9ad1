"""The verbs that list and explain: `explain` with and without --program, `configs`, `runs`, `components` and `data`."""

import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config
from rich.console import Console

from rustgpt_jax.cli import listings
from rustgpt_jax.cli.batch_preview import StagePreview, load_first_batches, print_batches, split_row, token_texts
from rustgpt_jax.cli.main import parse_args
from rustgpt_jax.config.config_files import list_recipes, load_config
from rustgpt_jax.config.schema import TokenizerConfig, flatten
from rustgpt_jax.config.validation import resolve
from rustgpt_jax.conformance.components import REGISTRIES
from rustgpt_jax.errors import UserError
from rustgpt_jax.model.flops import training_flops_per_token
from rustgpt_jax.planning.program_costs import (
    BACKWARD,
    FORWARD,
    RECOMPUTED,
    count_program_costs,
    lower_decode_step,
    lower_train_step,
    parse_scopes,
)
from rustgpt_jax.planning.report import print_config_summary, summarize_config
from rustgpt_jax.registry import import_object
from rustgpt_jax.sweeps.sweep_dir import Ledger, SweepDir, write_sweep_info
from rustgpt_jax.tokenizers import ASSISTANT, END, USER, encode, train_tokenizer
from rustgpt_jax.tracking.metric_writer import RunWriter
from rustgpt_jax.workdir.event_log import EventLog
from rustgpt_jax.workdir.run_dir import create_run_dir, lock_run_dir

# explain --program.

SCOPES = {
    "jit(train_step)/jvp(embedding)": ("embedding", FORWARD),
    "jit(train_step)/jvp(embedding)/positions/LearnedPositions": ("positions/LearnedPositions", FORWARD),
    "jit(train_step)/transpose(jvp(blocks))/while/body/closed_call/0/Block/mixer/query": (
        "blocks/0/mixer/query",
        BACKWARD,
    ),
    "jit(train_step)/jvp(blocks)/3/Block/Block._norm/mixer_norm/3/Block/Block._norm/mixer_norm/checkpoint": (
        "blocks/3/mixer_norm",
        FORWARD,
    ),
    "jit(f)/transpose(jvp(blocks))/while/body/checkpoint/rematted_computation/0/Block/feedforward/up/jit(silu)": (
        "blocks/0/feedforward/up",
        RECOMPUTED,
    ),
    "jit(train_step)/0/Block/mixer/norm": ("blocks/0/mixer/norm", FORWARD),
    "jit(train_step)/jvp(loss)/while/body/transpose(jvp(logits))/BTD,DV->BTV": ("logits", BACKWARD),
    "jit(train_step)/jvp()": ("other", FORWARD),
}


@pytest.mark.parametrize("scopes", SCOPES)
def test_scopes_name_a_module_and_a_pass(scopes: str) -> None:
    assert parse_scopes(scopes.split("/")) == SCOPES[scopes]


PROGRAMS: dict[str, dict[str, Any]] = {
    # A chunked loss, gradient accumulation, and matrix products in the optimizer.
    "plain": {"training.loss_chunk_size": 32, "training.grad_accum_steps": 2, "optimizer.name": "muon"},
    "remat": {"model.n_layers": 3, "model.mixers": ("rg_lru", "attention"), "model.remat": "full"},
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_costs_by_module_agree_with_the_model_and_with_xla(name: str) -> None:
    config = small_config(**PROGRAMS[name])
    lowered = lower_train_step(config)
    costs, xla = count_program_costs(lowered), lowered.cost_analysis()
    tokens = config.training.batch_size * config.seq_len
    flops = costs.total().flops
    assert flops[FORWARD] + flops[BACKWARD] == tokens * training_flops_per_token(config.model, config.seq_len)
    assert flops[BACKWARD] == 2 * flops[FORWARD]
    assert (flops["update"] > 0) == (name == "plain") and (flops[RECOMPUTED] > 0) == (name == "remat")
    # XLA counts the body of each loop once.
    assert costs.once.total_flops + costs.once.other_flops == pytest.approx(xla["flops"], rel=0.004)
    assert costs.once.bytes == pytest.approx(xla["bytes accessed"], rel=0.05)
    # Almost everything belongs to a module, and the parts of a module are in it.
    assert costs.total("other").operations < 0.1 * costs.total().operations
    groups = 3 if name == "remat" else 1
    assert costs.total("blocks").total_flops == sum(costs.total(f"blocks/{i}").total_flops for i in range(groups))
    assert [path for path in costs.paths(1) if path != "other"] == [
        *("embedding", "blocks", "norm", "logits", "loss", "optimizer")
    ]


def test_costs_of_a_decoding_step_are_those_of_one_token_and_the_whole_cache() -> None:
    config = small_config()
    found = count_program_costs(lower_decode_step(config.model)).total()
    whole = training_flops_per_token(config.model, config.model.context_length) / 3
    assert found.total_flops == found.flops[FORWARD] == whole


def test_program_is_lowered_for_a_chip_that_is_not_here() -> None:
    lowered = lower_train_step(small_config(), "cuda")
    assert (
        count_program_costs(lowered).total().flops
        == count_program_costs(lower_train_step(small_config())).total().flops
    )


# explain.


def test_explain_shows_what_differs_from_the_defaults() -> None:
    config = small_config(**{"optimizer.b1": 0.8})
    for shows_all in (False, True):
        console = Console(file=StringIO(), width=200)
        summary = summarize_config(config, {"optimizer.b1": "mine.py", "optimizer.b2": "base"}, console)
        print_config_summary(summary, console, shows_all)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        fields = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("config.")}
        assert fields["config.optimizer.b1"] == ["0.8", "mine.py"] and "config.model.d_model" in fields
        assert ("config.optimizer.b2" in fields) == shows_all
        n_rest = len(flatten(config)) - len(fields)
        assert any(f"{n_rest} other fields have their defaults" in line for line in lines) == (not shows_all)
        assert (n_rest == 0) == shows_all


# configs and components.


def test_configs_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    listed = {each["name"]: each for each in listings.run_configs(Namespace()).document["configs"]}
    assert list(listed) == list(list_recipes())
    printed = " ".join(capsys.readouterr().out.split())
    for name, each in listed.items():
        assert f"{name} {each['tokenizer']} " in printed and each["description"].endswith((".", "?"))
    assert listed["rustgpt"]["corpora"] == ["facts", "chat"] and listed["rustgpt"]["kind"] == "recipe"
    assert (listed["learning_rate"]["kind"], listed["learning_rate"]["sweeps"]) == ("experiment", ["sweep"])


def test_components_describes_every_entry_of_every_registry(capsys: pytest.CaptureFixture[str]) -> None:
    found = listings.run_components(Namespace(registries=[])).document["registries"]
    assert set(REGISTRIES) < set(found) and set(found) <= set(listings.SELECTED_BY)
    printed = " ".join(capsys.readouterr().out.split())
    for kind, components in found.items():
        assert f"{kind} ({listings.SELECTED_BY[kind]})" in printed
        for each in components:
            assert len(each["description"]) > 5 and f"{each['name']} {each['description']}" in printed, each
            assert each["import_path"] is None or callable(import_object(each["import_path"], kind))
    with pytest.raises(UserError, match="unknown registry 'mixer'. Did you mean 'mixers'?"):
        listings.run_components(Namespace(registries=["mixer"]))
    one = listings.run_components(Namespace(registries=["mixers/attention"])).document["registries"]
    assert one == {"mixers": [each for each in found["mixers"] if each["name"] == "attention"]}
    with pytest.raises(UserError, match="mixers has no 'atention'. Did you mean 'attention'?"):
        listings.run_components(Namespace(registries=["mixers/atention"]))


# data.


@pytest.fixture(scope="module")
def batches() -> tuple[Any, Any]:
    """The tokenizer and the first batches of RustGPT's recipe."""
    return load_first_batches(resolve(load_config("rustgpt")), None, Console(file=StringIO()))


def test_spans_of_a_row_are_its_tokens_by_document_and_loss(batches: tuple[Any, Any]) -> None:
    tokenizer, previews = batches
    for data, batch in previews:
        for row in range(4):
            spans = split_row(tokenizer, batch, row)
            ids = [index for span in spans for index in span.ids]
            assert ids == [*batch.tokens_BT[row], batch.targets_BT[row, -1]]
            has_loss = [span.has_loss for span in spans for _ in span.ids]
            assert has_loss == [False, *(batch.weights_BT[row] > 0)]
            documents = [span.document for span in spans for _ in span.ids]
            assert documents == [*batch.segments_BT[row], batch.segments_BT[row, -1]]
            # Whole documents end where the assistant's reply does, and users' questions have no loss.
            if data.stage.name == "instruct":
                questions = [span.text for span in spans[1:] if span.text.endswith(ASSISTANT)]
                assert len(questions) > 1 and all(text.startswith(USER) and "?" in text for text in questions)
                assert not any(span.has_loss for span in spans if span.text.endswith(ASSISTANT))


def test_token_texts_join_to_the_text_also_of_characters_of_several_tokens() -> None:
    tokenizer = train_tokenizer(TokenizerConfig("byte", None), ["a"])
    texts = token_texts(tokenizer, [tokenizer.end_id, *encode(tokenizer, "né 🙂")])
    assert texts == [END, "n", "", "é", " ", "", "", "", "🙂"]


@pytest.mark.parametrize("colors", [False, True])
def test_batches_are_printed_with_marks_or_colors(batches: tuple[Any, Any], colors: bool) -> None:
    tokenizer, (_, (data, batch)) = batches
    console = Console(file=StringIO(), width=200, force_terminal=colors, color_system="standard" if colors else None)
    print_batches(tokenizer, [StagePreview(data, batch)], 1, 2, True, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    reply = next(span.text for span in split_row(tokenizer, batch, 0) if span.has_loss and " " in span.text)
    question = next(span.text for span in split_row(tokenizer, batch, 0) if span.text.startswith(USER))
    question = question.removeprefix(USER).removesuffix(ASSISTANT)
    assert (f"\x1b[32m{reply}\x1b[0m" if colors else f"[[{reply}]]") in text
    assert (f"\x1b[2m{question}\x1b[0m" if colors else f"{USER}{question}{ASSISTANT}") in text
    assert "row 0, document 2" in text and " ".join(map(str, batch.tokens_BT[0, :3].tolist())) in text


@pytest.mark.parametrize(
    ("word", "name"), [("rustgpt", "config"), ("lab/mine.py", "config"), ("runs/a", "run"), ("here", "run")]
)
def test_data_takes_a_config_or_a_run(word: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "here", {})
    monkeypatch.chdir(tmp_path)
    args = parse_args(["rustgpt", "data", word])
    assert {"config": args.config, "run": args.run} == {"config": None, "run": None} | {name: word}


# runs.


def write_run(folder: Path, losses: dict[int, float], **changes: Any) -> Path:
    """Write a run with validation losses by step."""
    config = small_config(**changes)
    run = create_run_dir(folder, config, {"model.d_model": "mine.py", "seed": "base", "optimizer.b1": "command line"})
    EventLog(run.events_file).append("launch")
    with RunWriter(folder, 0) as metrics:
        for step, loss in losses.items():
            metrics.write(step, {"stage": "train", "train/loss": loss + 0.5})
            metrics.write(step, {"stage": "train", "valid/loss": loss})
    return folder


def make_namespace(folders: list[Path], **values: Any) -> Namespace:
    return Namespace(folders=list(map(str, folders)), **({"sort": "name", "plot": None} | values))


def test_runs_lists_runs_and_damaged_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "a", {4: 3.0, 8: 2.0})
    write_run(runs / "b", {4: 1.5, 6: math.nan})
    write_run(runs / "c", {})
    for name, file, content in (
        ("d", "metrics.jsonl", "{}\n"),
        ("e", "config.json", '{"config": 1}'),
        ("f", "events.jsonl", None),
    ):
        target = write_run(runs / name, {4: 9.0}) / file
        target.unlink()
        os.mkfifo(target) if content is None else target.write_text(content)
    (runs / "g" / "checkpoints").mkdir(parents=True)
    # A run of another version, or whose config was changed.
    other = write_run(runs / "h", {8: 4.0}) / "config.json"
    other.write_text(other.read_text().replace('"seed": 0', '"speed": 0'))
    (runs / "not a run").mkdir()
    with lock_run_dir(runs / "b"):
        listed = listings.run_runs(make_namespace([runs], plot=str(tmp_path / "all.png"))).document["runs"]
    rows = {row["folder"].name: row for row in listed}
    assert list(rows) == [*"abcdefgh"]
    assert [row["status"] for row in rows.values()] == ["finished", "running", "stopped", *["damaged"] * 4, "finished"]
    values = ("step", "steps", "valid_loss", "best_valid_loss", "best_step", "config")
    assert [rows["a"][name] for name in values] == [8, 8, 2.0, 2.0, 8, "mine.py"]
    assert [rows["b"][name] for name in values] == [6, 8, pytest.approx(math.nan, nan_ok=True), 1.5, 4, "mine.py"]
    assert [rows["c"][name] for name in values] == [0, 8, None, None, None, "mine.py"]
    assert all(row["problem"] and row["folder"].name in row["problem"] for row in listed[3:])
    printed = capsys.readouterr().out
    assert all(row["problem"] in printed for row in listed[3:])
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_runs_sorts_and_lists_the_trials_of_a_sweep(tmp_path: Path) -> None:
    sweep = tmp_path / "runs" / "sweep"
    for name, loss in (("x", 3.0), ("y", 1.0), ("z", 2.0)):
        write_run(sweep / "trials" / name, {8: loss})
    folder = SweepDir(sweep)
    write_sweep_info(folder, {"name": "sweep", "config_file": "mine.py", "sweep": "sweep", "command": "sweep"})
    ledger = Ledger(folder.ledger_file)
    ledger.append_all([(name, "planned", {"overrides": {"seed": 1}}) for name in "wxyz"])
    ledger.append_all([("x", "finished", {}), ("y", "diverged", {}), ("z", "began", {})])
    listed = listings.run_runs(make_namespace([sweep], sort="best_valid_loss")).document["runs"]
    assert [(row["folder"].name, row["status"]) for row in listed] == [
        *(("y", "diverged"), ("z", "finished"), ("x", "finished"))
    ]
    latest = listings.run_runs(make_namespace([sweep], sort="launched")).document["runs"]
    assert [row["folder"].name for row in latest] == ["z", "y", "x"]
    (row,) = listings.run_runs(make_namespace([tmp_path / "runs"])).document["runs"]
    assert (row["kind"], row["config"], row["step"], row["steps"]) == ("sweep", "mine.py", 2, 4)
    assert (row["status"], row["best_valid_loss"], row["problem"]) == ("stopped", 1.0, None)
    with pytest.raises(UserError, match="Did you mean 'runs'?"):
        listings.run_runs(make_namespace([tmp_path / "run"]))


def test_runs_reads_files_without_jax(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", {8: 2.0})
    code = "import sys\nfrom rustgpt_jax.cli.main import main, parse_args\nmain(parse_args(['rustgpt', 'runs']))\n"
    code += "assert not {'jax', 'matplotlib'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"a +mine.py +8/8 +2.0000 +2.0000 +8 +finished", done.stdout)

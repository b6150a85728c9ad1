"""The command line: help, spellings of flags, a one-sentence error for each mistake, whole runs, and signals."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rustgpt_jax.cli.main import VERBS, parse_args
from rustgpt_jax.tracking.metric_writer import read_metrics

ROOT = Path(__file__).parent.parent
LAUNCH = str(ROOT / "launch.py")
TINY = f"--config={ROOT}/configs/tiny.py"


def environment() -> dict[str, str]:
    # Compiling takes most of the time, and no test depends on optimizations.
    return os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def launch(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run launch.py, which must exit with status `code`."""
    command = [sys.executable, LAUNCH, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


# Runs several command lines. Slow imports are done once, and each command line runs in a forked process.
RUN_ALL = """
import json, os, runpy, sys, traceback, warnings
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import rustgpt_jax.sweeps.sweep_command, rustgpt_jax.training.run_training, rustgpt_jax.training.load_model
# JAX warns of forks in general; here it has not started threads yet.
warnings.simplefilter("ignore", RuntimeWarning)

def run(arguments, files):
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    warnings.resetwarnings()
    sys.argv[1:] = arguments
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

results, sys.argv[0] = {}, sys.argv[1]
for name, arguments in json.load(sys.stdin).items():
    files = [f"out {name}", f"err {name}"]
    child = os.fork()
    if child == 0:
        code = run(arguments, files)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results[name] = [code, *(open(file).read() for file in files)]
print(json.dumps(results))
"""


def run_all(lines: dict[str, list[str]], cwd: Path) -> dict[str, list]:
    """Run command lines and return their exit status, stdout and stderr by name."""
    command = [sys.executable, "-c", RUN_ALL, LAUNCH]
    done = subprocess.run(command, cwd=cwd, input=json.dumps(lines), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Help.


def test_help_lists_the_verbs_and_imports_no_jax(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", LAUNCH, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert f"\n    {verb} " in done.stdout
    names = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "absl" in names
    assert not names & {"jax", "numpy", "flax", "tokenizers", "rich"}
    assert launch(cwd=tmp_path).stdout == done.stdout


# Mistakes: a command line, and a part of the error message. RUN is a folder that does not exist.

FILES = "--config.data.corpus=files"
SWEEP = ["sweep", "--config=swept.py"]
MISTAKES = {
    "verb": (["tarin"], "Unknown verb 'tarin'. Did you mean 'train'?"),
    "argument": (["train", "configs/tiny.py"], "the argument 'configs/tiny.py'. Did you mean --config=configs/"),
    "recipe": (
        ["explain", "rustgtp", "tiny"],
        "explain does not take the argument 'tiny'. Did you mean --config=tiny?",
    ),
    "no such verb": (["status"], "Unknown verb 'status'. `python launch.py --help` lists the verbs."),
    "knob without config": ([TINY, "--steps=3"], "Unknown flag --steps. Did you mean --config.training.steps?"),
    "flag": (["train", "--confg=x"], "Unknown flag --confg. Did you mean --config?"),
    "flag without a value": (["train", "--config"], "config"),
    "flag of another verb": (["check", TINY], "check does not read --config; verbs that do: train, sweep, "),
    "knob where none is read": (["replay", "RUN", "--config.seed=1"], "replay does not read --config.seed: the config"),
    "two runs": (["evaluate", "RUN", "--run=other"], "Two runs are given, RUN and --run=other; give only one."),
    "too many runs": (["diff", "a", "b", "c"], "diff compares two runs"),
    "one run to compare": (["diff", "a"], "diff compares two runs"),
    "no step": (["replay", "other"], "No step given: add --step=K"),
    "initial run": ([TINY, "--init_from=other@3"], "other is not the folder of a run"),
    "no config": (["train"], "No config given"),
    "no run": (["evaluate"], "No run given"),
    "config missing": (["train", f"--config={ROOT}/configs/tny.py"], f"Did you mean '{ROOT}/configs/tiny.py'?"),
    "config broken": (["train", "--config=broken.py"], "broken.py cannot be read as a config: ZeroDivisionError"),
    "config not Python": (["train", "--config=empty.txt"], "empty.txt"),
    "config of nothing": (["train", "--config=nothing.py"], "nothing.py"),
    "run missing": (["generate", "--run=RUN"], "There is no run RUN."),
    "run without config": (["evaluate", "--run=other"], "other is not the folder of a run"),
    "checkpoint": (["generate", "--run=RUN", "--checkpoint=first"], "checkpoint"),
    "key": (["--config.optimizer.learning_rat=1"], "Did you mean config.optimizer.learning_rate?"),
    "key without value": (["--config.training.steps="], "config.training.steps must be a whole number, got ''."),
    "word for a number": (["--config.training.steps=ten"], "config.training.steps must be a whole number, got 'ten'."),
    "heads": (
        ["--config.model.attention.n_heads=5"],
        "config.model.d_model=32 is not divisible by config.model.attention.n_heads=5",
    ),
    "stage": (["--config.stages.one.training.steps=3"], "unknown stage 'one'"),
    "optimizer": (["--config.optimizer.name=adamww"], "optimizer.name: unknown 'adamww'. Did you mean 'adamw'?"),
    "mixer": (["--config.model.mixers=atention"], "config.model.mixers: unknown 'atention'. Did you mean 'attention'?"),
    "no files": ([FILES], "config.data.corpus='files' needs files"),
    "file missing": ([FILES, "--config.data.paths=nowhere.txt"], "'nowhere.txt' matches no file"),
    "file not UTF-8": ([FILES, "--config.data.paths=latin.txt"], "latin.txt: not UTF-8 at byte 3 (0xe9)."),
    "file too short": (
        [FILES, "--config.data.paths=short.txt", "--config.data.split=tail"],
        "The training split has 47 tokens and one batch needs 257",
    ),
    "one document": ([FILES, "--config.data.paths=short.txt"], "the split"),
    "vocabulary": (["--config.model.vocab_size=10"], "config.model.vocab_size=10 is too small"),
    "decay groups": (["--config.optimizer.weight_decay_groups=(('blocks',1),)"], "no expression matches the parameter"),
    "folder in use": (["--run=other"], "other holds files but no run"),
    "folder is a file": (["--run=short.txt"], "short.txt"),
    "cyclic config": (["explain", "--config=cyclic.py"], "nested too deeply; does the config contain itself?"),
    "config that fails when read": (["explain", "--config=odd.py"], "odd.py cannot be read as a config: OSError: no."),
    "config that leaves": (["explain", "--config=leaves.py"], "leaves.py cannot be read as a config: SystemExit: 0."),
    "config is a pipe": (["explain", "--config=pipe"], "pipe cannot be read as a config: it is a pipe, a device or a"),
    "text is a pipe": ([FILES, "--config.data.paths=pipe"], "pipe: this is not a regular file"),
    "file of a run is a pipe": (["explain", "piped"], "piped/config.json is a pipe, a device or a socket, not a file."),
    "file of a model is a pipe": (["import", "--from=piped", "--run=RUN"], "piped/config.json is a pipe, a device"),
    "config too long": (["train", f"--config={'x' * 5000}"], ": File name too long."),
    "runs too long": (["diff", "x" * 5000, "other"], ": File name too long."),
    "prompt not UTF-8": (["generate", "other", "--prompt=a\udcffb"], "The argument --prompt=a\\udcffb is not UTF-8."),
    "vocabulary too large": (["--config.tokenizer.vocab_size=2147483647"], "vocab_size must be at most"),
    "no sweep": (["sweep"], "No sweep given: add --config=NAME or --config=FILE"),
    "config without sweep": (["sweep", TINY], "tiny.py has no sweep(), a function that yields overrides"),
    "sweep that is not there": ([*SWEEP, "--sweep=rate"], "swept.py has no sweep 'rate'. Did you mean 'rates'?"),
    "sweep that fails": ([*SWEEP, "--sweep=broken"], "swept.py: sweep_broken() fails: ZeroDivisionError"),
    "sweep that fails late": ([*SWEEP, "--sweep=broken_later"], "sweep_broken_later() fails: KeyError: 'depth'."),
    "sweep without trials": ([*SWEEP, "--sweep=empty"], "The sweep has no trials."),
    "sweep of no mapping": ([*SWEEP, "--sweep=words"], "A sweep yields mappings of knobs to values, not 'seed'."),
    "swept knob": ([*SWEEP, "--sweep=typo"], "The trial optimizer.learning_rat=1 is invalid"),
    "swept twice": ([*SWEEP, "--sweep=twice"], "Two trials have the same config: seed=1 and seed=1."),
    "swept and given": ([*SWEEP, "--config.seed=1"], "config.seed is both set on the command line and swept"),
    "swept text": ([*SWEEP, "--config.model.context_length=32768", "--config.data.split=tail"], "one batch needs"),
    "rung": ([*SWEEP, "--sweep=halving"], "no evaluation at step 30"),
    "mode": ([*SWEEP, "--mode=fuse"], "--mode: unknown 'fuse'. Did you mean 'fused'?"),
    "launcher": ([*SWEEP, "--launcher=process"], "--launcher: unknown 'process'. Did you mean 'processes'?"),
    "width": ([*SWEEP, "--width=0"], "argument --width: '0' is not a whole number from 1 to 65536."),
    "slurm": ([*SWEEP, "--launcher=slurm", "--slurm=gpu"], "argument --slurm: 'gpu' is not KEY=VALUE"),
    "ray": ([*SWEEP, "--launcher=ray", "--ray=num_gpu=1"], "--ray=num_gpu: unknown option. Did you mean 'num_gpus'?"),
    "another launcher's option": ([*SWEEP, "--ray=num_gpus=1"], "--ray is for --launcher=ray, not --launcher=inline."),
    "part": ([*SWEEP, "--part=2/2"], "argument --part: '2/2' is not I/N, with I from 0 to N - 1."),
    "part of a search": ([*SWEEP, "--sweep=halving", "--part=0/2"], "but sweep_halving() returns a search"),
    "manifests nowhere": ([*SWEEP, "--launcher=manifest"], "--launcher=manifest: add --to=DIR"),
    "manifests of a run": (
        [*SWEEP, "--launcher=manifest", "--to=jobs", "--run=r"],
        "does not take --run: the pods write",
    ),
    "sweep in use": ([*SWEEP, "--run=other"], "other holds files but no sweep"),
    "sweep in a run": ([*SWEEP, "--run=trained"], "trained is the folder of a run, not of a sweep"),
    "sweep in a file": ([*SWEEP, "--run=short.txt"], "The sweep's folder short.txt cannot be created: File exists."),
    "another sweep": ([*SWEEP, "--run=halves"], "halves holds another sweep"),
    "no report": (["report"], "No sweep given: add the folder"),
    "report of nothing": (["report", "--run=RUN"], "RUN is not the folder of a sweep"),
    "superscript checkpoint": (["generate", "--run=trained", "--checkpoint=²"], "'²' is not last, best or a step."),
    "coordinator": (["--coordinator_address=nope", "--num_processes=2", "--process_id=0"], "=nope is not HOST:PORT"),
    "workers": ([*SWEEP, "--workers=99999999999999999999"], "argument --workers: '9999"),
    "late step": (["replay", "trained", "--step=99999999999999999999"], "argument --step: '9999"),
    "no folder": (["diff", "trained", ""], "is not the folder of a run: it has no config.json."),
    "verbosity": (["explain", TINY, "--verbosity=inof"], "--verbosity: unknown level 'inof'. Did you mean 'info'?"),
    "flagfile": (["--flagfile=empty.txt"], "Unknown flag --flagfile: give the flags themselves."),
    "report of a run": (["report", "--run=trained"], "trained is not the folder of a sweep"),
}

SWEPT = """
from configs import tiny
from rustgpt_jax.sweeps import seeds, successive_halving, values

RATES = values("optimizer.learning_rate", 1e-3, 1e-2)
get_config = tiny.get_config

def sweep(): return seeds(2)
def sweep_rates(): return RATES
def sweep_broken(): return 1 / 0
def sweep_empty(): return []
def sweep_words(): return {"seed": 1}
def sweep_typo(): return [{"optimizer.learning_rat": 1}]
def sweep_twice(): return [*values("seed", 1, 2), {"seed": 1}]
def sweep_halving(): return successive_halving(RATES, rungs=(30,))
def sweep_broken_later():
    yield {"seed": 1}
    yield {"seed": {}["depth"]}
"""

FILES_OF_MISTAKES = {
    "broken.py": "def get_config():\n    return 1 / 0\n",
    "nothing.py": "def get_config():\n    pass\n",
    "cyclic.py": "tree = {}\ntree['model'] = tree\ndef get_config():\n    return tree\n",
    "odd.py": "class Odd:\n    def items(self):\n        raise OSError('no')\ndef get_config():\n    return Odd()\n",
    "leaves.py": "def get_config():\n    raise SystemExit(0)\n",
    "empty.txt": "",
    "latin.txt": "caf\xe9 au lait",
    "short.txt": "Too short to fill a batch of eight windows, is it?",
    "other/thesis.txt": "Not a run.",
    "swept.py": SWEPT,
    "trained/config.json": "{}",
    "halves/sweep.json": '{"name": "swept", "command": "", "config_file": "swept.py", "sweep": "sweep_halving"}',
}


def test_mistakes_are_reported_in_one_sentence_and_write_no_files(tmp_path: Path) -> None:
    """One test, since all command lines run in forks of one process."""
    for name, text in FILES_OF_MISTAKES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "piped" / "config.json")
    lines = {}
    for name, (arguments, _) in MISTAKES.items():
        if arguments[0].startswith("--"):
            arguments = ["train", TINY, *arguments]
        needs_run = TINY in arguments and not any(word.startswith("--run") for word in arguments)
        lines[name] = [*arguments, "--run=RUN"] if needs_run else arguments
    wrong = {}
    for name, (code, _, stderr) in run_all(lines, tmp_path).items():
        is_sentence = stderr.startswith("error: ") and stderr.endswith("\n") and stderr.count("\n") == 1
        if code != 2 or not is_sentence or MISTAKES[name][1] not in stderr:
            wrong[name] = code, stderr
    assert not wrong
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    written = {name for name in files if not name.startswith(("out ", "err "))}
    assert written == {*FILES_OF_MISTAKES, "pipe", "piped/config.json"}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"piped", "other", "trained", "halves"}
    assert list(Path(os.environ["RUSTGPT_JAX_CACHE"]).glob("stores/.*")) == []


# Whole runs.

STEPS = 2000
TRAIN = (
    "train",
    TINY,
    "--config.model.d_model=16",
    "--config.model.n_layers=1",
    "--config.model.attention.n_kv_heads=None",
    "--config.model.context_length=16",
    f"--config.training.steps={STEPS}",
    "--config.logging.log_every=100",
    "--config.logging.eval_every=100000",
    "--config.logging.checkpoint_every=100000",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("launch") / "uninterrupted"
    done = launch(*TRAIN, f"--run={folder}", cwd=folder.parent)
    assert done.stderr == ""
    assert "Loss curves: " in done.stdout
    return folder


def test_training_writes_a_run_folder_that_can_be_evaluated(uninterrupted: Path) -> None:
    files = {"config.json", "tokenizer.json", "data.json", "metrics.jsonl", "checkpoints", "tensorboard", "loss.png"}
    assert files <= {path.name for path in uninterrupted.iterdir()}
    origins = json.loads((uninterrupted / "config.json").read_text())["origins"]
    assert (origins["model.attention.n_kv_heads"], origins["training.batch_size"], origins["seed"]) == (
        "command line",
        TINY.removeprefix("--config="),
        "base",
    )
    metrics = read_metrics(uninterrupted)
    losses = [line["train/loss"] for line in metrics if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    evaluated = launch("evaluate", f"--run={uninterrupted}", cwd=uninterrupted.parent)
    assert f"step {STEPS}" in evaluated.stdout and f"{metrics[-1]['valid/loss']:.4f}" in evaluated.stdout


# Signals.


def untimed_metrics(folder: Path) -> list[dict]:
    """Return the metrics of a run without those that depend on the clock."""
    timed = ("time", "train/tokens_per_second", "train/flops_share")
    return [{name: value for name, value in line.items() if name not in timed} for line in read_metrics(folder)]


def start_training(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start training and return when its first metrics are written."""
    process = subprocess.Popen(
        [sys.executable, LAUNCH, *TRAIN, f"--run={folder}", *arguments],
        cwd=folder.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "metrics.jsonl"
    before = metrics.read_bytes() if metrics.exists() else b""
    while process.poll() is None and (not metrics.exists() or len(metrics.read_bytes()) <= len(before)):
        time.sleep(0.01)
    return process


def check_generation(folder: Path) -> None:
    """Check that samples are deterministic, and that the end of the context is reported."""
    generate = ["generate", f"--run={folder}", "--prompt=The sun"]
    full = [*generate, "--config.sampling.max_tokens=300", "--config.sampling.temperature=1e-30"]
    lines = {
        "first": generate,
        # The only evaluation was at the last step.
        "best": [*generate, "--checkpoint=best"],
        "second": [*generate, "--config.sampling.seed=1"],
        "both": [*generate, "--num_samples=2"],
        "full": full,
        "slide": [*full, "--config.sampling.past_context=slide"],
    }
    results = run_all(lines, folder.parent)
    assert {code for code, _, _ in results.values()} == {0}
    texts = {name: stdout for name, (_, stdout, _) in results.items()}
    assert texts["first"].startswith("The sun") and len(texts["first"].strip()) > len("The sun")
    assert texts["best"] == texts["first"] != texts["second"]
    assert texts["both"] == texts["first"] + texts["second"]
    assert "tokens because the model's context of" in results["full"][2] and "context" not in results["slide"][2]
    assert texts["slide"].startswith(texts["full"].rstrip("\n")) and len(texts["slide"]) > len(texts["full"])


@pytest.mark.slow
@pytest.mark.long
def test_interrupted_run_resumes_to_the_same_end_and_generates(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    process = start_training(folder)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (130, "")
    assert "from the start" in stdout
    step = int(stdout.rsplit("Stopped by SIGINT at step ", 1)[1].split(",")[0])
    assert 0 < step < STEPS
    assert (folder / "checkpoints" / str(step)).is_dir()
    assert f"from step {step}" in launch(*TRAIN, f"--run={folder}", cwd=tmp_path).stdout
    assert untimed_metrics(folder) == untimed_metrics(uninterrupted)
    check_generation(folder)


WAIT = {"Python": "while True: pass", "native code": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"}


@pytest.mark.parametrize("where", WAIT)
def test_second_interrupt_ends_the_process(where: str) -> None:
    code = f"""
import hashlib
from rustgpt_jax.process_setup import StopRequest
with StopRequest():
    print("waiting", flush=True)
    {WAIT[where]}
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)
    try:
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) != 0
    finally:
        process.kill()
        process.communicate()


# Spellings of flags.

SPELLINGS = {
    "value after a space": ["generate", "--run", "a", "--prompt", "-5 degrees", "--num_samples", "2"],
    "one dash": ["generate", "-run=a", "-prompt", "-5 degrees", "-num_samples=2"],
    "flags before the verb": ["--prompt", "-5 degrees", "--num_samples=2", "generate", "a"],
    "mixed with the run": ["generate", "--prompt=-5 degrees", "a", "--num_samples=2"],
    "switches": ["generate", "a", "--prompt=-5 degrees", "--num_samples=2", "--noallow_oversubscription"],
    "switches with values": [
        "generate",
        "a",
        "--prompt=-5 degrees",
        "--num_samples=2",
        "--allow_oversubscription=false",
    ],
}


@pytest.mark.parametrize("words", SPELLINGS.values(), ids=list(SPELLINGS))
def test_flags_accept_the_spellings_of_absl(words: list[str]) -> None:
    args = parse_args(["launch.py", *words])
    assert (args.verb, args.run, args.prompt, args.num_samples) == ("generate", "a", ["-5 degrees"], 2)
    assert args.allow_oversubscription is False and args.checkpoint == "last"


def test_overrides_are_kept_in_order_in_any_position() -> None:
    words = ["--config.seed", "1", "explain", "-config.a.b=x=y", "--config=f.py", "--config.stages.one.seed=2"]
    args = parse_args(["launch.py", *words])
    assert args.overrides == [("seed", "1"), ("a.b", "x=y"), ("stages.one.seed", "2")]
    assert (args.verb, args.config) == ("explain", "f.py")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_its_flags_and_a_valid_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_args(["launch.py", verb, "--help"])
    output = capsys.readouterr().out
    assert end.value.code == 0
    assert f"Example:  rustgpt {verb} {VERBS[verb].example}" in output
    assert "--module_path DIR" in output and "%" not in output
    assert ("Default: last." in " ".join(output.split())) == ("--checkpoint" in output)
    assert parse_args(["launch.py", verb, *shlex.split(VERBS[verb].example)]).verb == verb


def test_interrupt_during_an_import_ends_with_a_document(tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    code = (
        "import signal, sys; from rustgpt_jax.cli.main import DOCUMENT, handle_interrupt\n"
        "signal.signal(signal.SIGINT, handle_interrupt); DOCUMENT.configure('train', True)\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import slow_module"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 130 and "Traceback" not in ended.stderr
    assert json.loads(ended.stdout)["status"] == 130

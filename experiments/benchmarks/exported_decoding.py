"""How fast do exported models (JAX, IREE) start and decode, compared with `generate` and llama.cpp?

python -m experiments.benchmarks.exported_decoding

A random Llama in float32 with 34M parameters decodes one row greedily on the CPU, after a prompt of 16 tokens: with
this package (`generate`), with the scripts of docs/how_to/stablehlo.md (JAX) and docs/how_to/iree.md (IREE), and with
llama.cpp from a GGUF file of the same weights. Needs the extras `iree` and `bench`; --only=generate,jax selects some.
Contenders take turns, each in a new process; after the first turn, JAX finds its programs in the
compilation cache. They measure the time from the start of the process to the first token, the peak of resident memory,
and each decode step including the choice of the token. The table has the lowest values of all turns. --smoke measures a
tiny model.

FINDING (AMD EPYC, Zen 4, two virtual cores; JAX 0.10.2, IREE 3.13, llama-cpp-python 0.3.36; other programs were
running, with a load of 5 to 7, so times vary by a factor of two): the exported model starts in 2.2 s with JAX and in
0.8 s with IREE; `generate` takes 2.4 s, llama.cpp 1.3 s. A step takes 11.8 ms with JAX, 28 ms with IREE, 11.0 ms with
`generate` and 6.9 ms with llama.cpp. JAX and IREE give the same 220 tokens as `generate`; llama.cpp, whose cache is
float16 by default, agrees on 167.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
PROMPT, TOKENS = 16, 220
# Steps that are not counted, after the first token.
WARMUP = 5
SIZES = {
    "vocab_size": 8192,
    "d_model": 512,
    "n_layers": 8,
    "attention.n_heads": 8,
    "attention.n_kv_heads": 8,
    "d_ff": 1408,
    "context_length": 256,
    "dtype": "float32",
}
SMOKE = {"vocab_size": 96, "d_model": 32, "n_layers": 1, "attention.n_heads": 2, "attention.n_kv_heads": 2, "d_ff": 64}

FLAGS = flags.FLAGS
GGUF, RUN, EXPORTED = "model.gguf", "parameters.safetensors", "model.stablehlo"


def get_config(**changes: Any) -> ConfigDict:
    """Return the config of the model."""
    from configs import base
    from rustgpt_jax.model.presets import FAMILIES

    config = base.get_config()
    knobs = FAMILIES["llama2"] | SIZES | changes
    with config.ignore_type():
        config.update_from_flattened_dict({f"model.{name}": value for name, value in knobs.items()})
    return config


def make_model(is_smoke: bool) -> Any:
    """Return the config of the model for inference."""
    from rustgpt_jax.config.schema import for_inference
    from rustgpt_jax.config.validation import resolve

    return for_inference(resolve(get_config(**(SMOKE if is_smoke else {}))).model)


def write_model(folder: Path, is_smoke: bool) -> None:
    """Write the same random weights as parameters, as StableHLO programs for IREE and JAX, and as GGUF."""
    import jax

    from rustgpt_jax.config.schema import TokenizerConfig
    from rustgpt_jax.inference.text_generator import TextGenerator
    from rustgpt_jax.interop.gguf import write_gguf
    from rustgpt_jax.interop.stablehlo import ExportOptions, write_stablehlo
    from rustgpt_jax.model import transformer
    from rustgpt_jax.pytrees import flatten_paths
    from rustgpt_jax.tokenizers import train_tokenizer
    from rustgpt_jax.workdir.params_io import NewTensor, write_parameters

    model = make_model(is_smoke)
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, dtype=np.float32)
        return noise / np.sqrt(np.float32(leaf.shape[-2])) if path[-1].key == "kernel" else 1 + 0.1 * noise

    params = jax.tree_util.tree_map_with_path(fill, shapes)
    tensors = [NewTensor(path, x.dtype, x.shape, lambda x=x: [x]) for path, x in flatten_paths(params).items()]
    write_parameters(folder / RUN, tensors)
    tokenizer = train_tokenizer(TokenizerConfig("char", None), ["text"])
    (folder / EXPORTED).mkdir()
    options = ExportOptions(batch=1, platforms=("cpu",), prefill_lengths=(PROMPT,))
    manifest = write_stablehlo(TextGenerator(params, model, tokenizer, False), folder / EXPORTED, options)
    # A random model may stop at any time.
    manifest["tokens"]["stop_token_ids"] = []
    (folder / EXPORTED / "manifest.json").write_text(json.dumps(manifest))
    write_gguf(params, model, folder / GGUF)


# The contenders: each yields tokens, the first one after the prompt.


def run_script(page: str, name: str) -> Callable[..., Any]:
    """Return the function `generate` of a script on a page of the docs."""
    scripts = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "how_to" / page).read_text(), re.DOTALL)
    script: dict[str, Any] = {"__name__": name}
    exec(next(script for script in scripts if "def generate(" in script), script)
    return script["generate"]


def decode_with_generate(folder: Path, prompt: list[int], is_smoke: bool) -> Iterator[int]:
    """Decode with this package, one token per call of the loop."""
    import jax

    from rustgpt_jax.inference.generate import decode_steps, pad_stop_ids, start_generation
    from rustgpt_jax.inference.sampling import Greedy
    from rustgpt_jax.inference.text_generator import WeightLayout, to_decode_params
    from rustgpt_jax.model.flops import parameter_shapes
    from rustgpt_jax.process_setup import keep_freed_memory
    from rustgpt_jax.sharding.sharding_plan import plan_for_local_devices
    from rustgpt_jax.workdir.params_io import read_parameters

    keep_freed_memory()
    model = make_model(is_smoke)
    shapes = plan_for_local_devices().add_shardings(parameter_shapes(model))
    params = to_decode_params(read_parameters(folder / RUN, shapes), model, WeightLayout(None, "plain", "cpu"))
    state, key, stop_ids = start_generation(params, [prompt], model, TOKENS), jax.random.key(0), pad_stop_ids(())
    for position in range(len(prompt), len(prompt) + TOKENS):
        state = decode_steps(params, state, np.int32(1), (Greedy(),), key, stop_ids, model=model)
        yield int(state.tokens_BS[0, position])


def decode_with_jax(folder: Path, prompt: list[int], is_smoke: bool) -> Iterator[int]:
    """Decode with JAX and NumPy alone."""
    del is_smoke
    for tokens_B, _ in run_script("stablehlo.md", "generate")(folder / EXPORTED, [prompt], TOKENS):
        yield int(tokens_B[0])


def decode_with_iree(folder: Path, prompt: list[int], is_smoke: bool) -> Iterator[int]:
    """Decode with the runtime of IREE."""
    del is_smoke
    for token, _ in run_script("iree.md", "generate_iree")(folder / EXPORTED, prompt, TOKENS):
        yield token


def decode_with_llama_cpp(folder: Path, prompt: list[int], is_smoke: bool) -> Iterator[int]:
    """Decode with llama.cpp."""
    del is_smoke
    from experiments.benchmarks.performance.llama_cpp_peer import Context

    context = Context(folder / GGUF, 1, PROMPT + TOKENS)
    tokens_B1 = context.read(np.array([prompt]), 0)
    for position in range(len(prompt), len(prompt) + TOKENS):
        yield int(tokens_B1[0, 0])
        tokens_B1 = context.read(tokens_B1, position)


CONTENDERS = {
    "generate": decode_with_generate,
    "jax": decode_with_jax,
    "iree": decode_with_iree,
    "llama.cpp": decode_with_llama_cpp,
}


def work(name: str, folder: Path, started: float, is_smoke: bool) -> None:
    """Decode in this process and print what was measured as JSON."""
    prompt = (
        np.random.default_rng(1).integers(0, make_model(is_smoke).vocab_size if is_smoke else 8192, PROMPT).tolist()
    )
    tokens, times = [], []
    for token in CONTENDERS[name](folder, prompt, is_smoke):
        tokens.append(token)
        times.append(time.time())
    steps = np.diff(times)[WARMUP:]
    measured = {
        "startup": times[0] - started,
        "p50": float(np.percentile(steps, 50)),
        "p99": float(np.percentile(steps, 99)),
        # Unlike getrusage, this does not include the parent's memory before exec.
        "memory": 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0]),
        "tokens": tokens,
    }
    print(json.dumps(measured))


def measure(name: str, folder: Path, is_smoke: bool) -> dict[str, Any]:
    """Measure a contender in a new process."""
    command = [sys.executable, "-m", "experiments.benchmarks.exported_decoding", f"--work={name}", f"--folder={folder}"]
    command += [f"--started={time.time()}", *(["--smoke"] if is_smoke else [])]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_for_iree(folder: Path) -> None:
    """Compile the programs with the script of the docs."""
    page = (ROOT / "docs" / "how_to" / "iree.md").read_text()
    script = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "compile_str" in code)
    subprocess.run([sys.executable, "-c", script, str(folder / EXPORTED)], check=True)


def main(argv: list[str]) -> None:
    """Measure all contenders and print a table."""
    del argv
    if FLAGS.work:
        work(FLAGS.work, Path(FLAGS.folder), FLAGS.started, FLAGS.smoke)
        return
    table = Table("contender", "first start s", "start s", "memory MB", "step p50 ms", "step p99 ms", "same tokens")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder, FLAGS.smoke)
        if "iree" in FLAGS.only:
            compile_for_iree(folder)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in FLAGS.only}
        for _ in range(FLAGS.rounds):
            for name, results in found.items():
                results.append(measure(name, folder, FLAGS.smoke))
        reference = found[FLAGS.only[0]][0]["tokens"]
        for name, results in found.items():
            same = sum(a == b for a, b in zip(results[0]["tokens"], reference, strict=True))
            lowest = {key: min(result[key] for result in results) for key in ("startup", "p50", "p99")}
            table.add_row(
                name,
                f"{results[0]['startup']:.2f}",
                f"{lowest['startup']:.2f}",
                f"{max(result['memory'] for result in results) / 1e6:.0f}",
                f"{1e3 * lowest['p50']:.2f}",
                f"{1e3 * lowest['p99']:.2f}",
                f"{same} of {len(reference)}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    flags.DEFINE_list("only", list(CONTENDERS), "The contenders to measure.")
    flags.DEFINE_integer("rounds", 5, "Turns of each contender.", 1)
    flags.DEFINE_bool("smoke", False, "Measure a tiny model, to check that everything works.")
    flags.DEFINE_string("work", None, "For internal use: the contender that this process measures.")
    flags.DEFINE_string("folder", None, "For internal use: the folder with the models.")
    flags.DEFINE_float("started", None, "For internal use: the time when this process was started.")
    app.run(main)

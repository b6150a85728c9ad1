"""A run that begins with parameters of another: what fits is taken, the seed gives the rest, and all of it is said."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rustgpt_jax.config import Config, split, stages
from rustgpt_jax.data.prepare import obtain_tokenizer, with_vocabulary
from rustgpt_jax.errors import UserError
from rustgpt_jax.interop.exporting import appearing_folder
from rustgpt_jax.interop.parameters import write_tensors
from rustgpt_jax.interop.safetensors_files import NewTensor
from rustgpt_jax.model.paths import by_path
from rustgpt_jax.runs.folder import RunFolder, create
from rustgpt_jax.runs.formatting import count
from rustgpt_jax.tokenizers import IMPORTED, save_tokenizer
from rustgpt_jax.training.fingerprints import fingerprints
from rustgpt_jax.training.step import as_arguments, compiled_start
from rustgpt_jax.training.trained import load

# Their rows, or columns, stand for tokens.
OF_TOKENS = ("embedding/", "head/")
MOST_NAMED = 6

Says = Callable[[str], object]


class Taken(NamedTuple):
    """Names of parameters: those taken, those that the seed gives, and those left in the other run, with why."""

    taken: list[str]
    from_seed: dict[str, str]
    left: dict[str, str]


def begin_from(source: str, path: Path, config: Config, origins: Mapping[str, str], says: Says) -> None:
    """Make the folder of a run at step 0 with the parameters of `source`, RUN, RUN@STEP or RUN@best, that fit it.

    A folder that began so already stays as it is. Raises UserError if it began otherwise, if there is no such run or
    step, and if nothing fits.
    """
    run = RunFolder(path)
    if run.config_file.exists():
        began = json.loads(run.import_file.read_bytes()).get("source") if run.import_file.exists() else None
        if began is None or _same(began) != _same(source):
            how = f"with the parameters of {began}" if began else "otherwise"
            raise UserError(f"{path} began {how}, not with those of {source}; choose another --run folder.")
        return
    place, which = run_and_step(source)
    there = load(place, which)
    own = there.writer.tokenizer if config.tokenizer.name == IMPORTED else obtain_tokenizer(config)
    whole = with_vocabulary(config, own)
    structure, numbers = split(stages(whole)[0].config)
    fresh = by_path(compiled_start(structure, as_arguments(numbers)).params)
    given = by_path(there.writer.params)
    chosen = _choose(given, fresh, is_same_tokenizer=own.written == there.writer.tokenizer.written)
    if not chosen.taken:
        raise UserError(f"No parameter of {source} fits the model of this config: {_named(chosen.from_seed)}.")
    params = {name: given[name] if name in chosen.taken else leaf for name, leaf in fresh.items()}
    with appearing_folder(path) as hidden:
        new = create(hidden, config, origins)
        save_tokenizer(own, new.tokenizer_file)
        write_tensors(new.parameters_file, [_tensor(name, leaf) for name, leaf in params.items()])
        about = {"source": source, "step": there.step, **chosen._asdict()}
        about["fingerprints"] = fingerprints({name: given[name] for name in chosen.taken})
        new.import_file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    sizes = [sum(leaf.size for leaf in leaves) for leaves in ([given[name] for name in chosen.taken], fresh.values())]
    says(
        f"{place} at step {there.step}: took {len(chosen.taken)} of {len(fresh)} arrays of parameters "
        f"({count(sizes[0])} of {count(sizes[1])})"
    )
    if chosen.from_seed:
        says(f"  from the seed: {_named(chosen.from_seed)}")
    if chosen.left:
        says(f"  left there: {_named(chosen.left)}; the optimizer's state; the step")
    else:
        says("  left there: the optimizer's state; the step")


def run_and_step(source: str) -> tuple[Path, str]:
    """The folder and the checkpoint that RUN, RUN@STEP or RUN@best names. A folder may have an @ in its own name."""
    place, at, which = source.rpartition("@")
    return (Path(place), which) if at and not Path(source).exists() else (Path(source), "last")


def _same(source: str) -> tuple[Path, str]:
    """What a source names, however it is written."""
    place, which = run_and_step(source)
    return place.resolve(), which


def _choose(given: Mapping[str, Any], wanted: Mapping[str, Any], is_same_tokenizer: bool) -> Taken:
    result = Taken([], {}, {})
    for name, leaf in wanted.items():
        if name not in given:
            result.from_seed[name] = "not there"
        elif given[name].shape != leaf.shape:
            shapes = (" x ".join(map(str, shape)) for shape in (given[name].shape, leaf.shape))
            result.from_seed[name] = "{} there and {} here".format(*shapes)
        elif name.startswith(OF_TOKENS) and not is_same_tokenizer:
            result.from_seed[name] = "its tokens are of another tokenizer"
        else:
            result.taken.append(name)
    for name in given:
        if name not in result.taken:
            result.left[name] = "not in this model" if name not in wanted else result.from_seed[name]
    return result


def _named(reasons: Mapping[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in reasons.items()]
    return ", ".join(shown[:MOST_NAMED]) + (f" and {len(shown) - MOST_NAMED} more" if len(shown) > MOST_NAMED else "")


def _tensor(name: str, leaf: Any) -> NewTensor:
    return NewTensor(name, np.dtype(leaf.dtype), tuple(leaf.shape), lambda: [np.asarray(leaf)])

"""The verbs that list what there is: recipes, runs, components, and the first batches of a config."""

import argparse
import ast
import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rustgpt_jax.cli.arguments import VerbParser, read_config, whole_number
from rustgpt_jax.cli.output import VerbResult
from rustgpt_jax.errors import UserError, suggest_names

SORT_KEYS = ("launched", "name", "config", "step", "valid_loss", "best_valid_loss", "status")
# What selects from each registry.
SELECTED_BY = {
    "mixers": "config.model.mixers",
    "feedforwards": "config.model.feedforwards",
    "norms": "config.model.norm",
    "positions": "config.model.positions",
    "rope_scalings": "config.model.rope.scaling",
    "attention_kernels": "config.model.attention.kernel",
    "families": "presets for config.model: fields that differ from the defaults",
    "optimizers": "config.optimizer.name",
    "schedules": "config.schedule.name",
    "samplers": "config.sampling",
    "tokenizers": "config.tokenizer.name",
    "corpora": "config.data.corpus",
    "launchers": "sweep --launcher",
    "trackers": "config.logging.trackers",
}

# configs.


def add_configs_arguments(parser: VerbParser) -> None:
    """Add the arguments of `configs`: none."""
    del parser


def run_configs(args: argparse.Namespace) -> VerbResult:
    """List the recipes that --config finds by name."""
    del args
    from rustgpt_jax.config.config_files import list_recipes
    from rustgpt_jax.tracking.console import PlainTextConsole

    recipes = [_describe_recipe(file) for file in list_recipes().values()]
    console = PlainTextConsole()
    for kind, title in (("recipe", "Recipes"), ("experiment", "Experiments")):
        table = _make_table("name", "tokenizer", "corpus", "description")
        for each in recipes:
            if each["kind"] == kind:
                table.add_row(each["name"], each["tokenizer"], ", ".join(each["corpora"]), each["description"])
        console.print(title, style="bold")
        console.print(table)
        console.print()
    return VerbResult(0, {"configs": recipes})


def _make_table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for name in columns:
        table.add_column(name, no_wrap=name == "name", style="cyan" if name == "name" else "", overflow="fold")
    return table


def _describe_recipe(file: Path) -> dict[str, Any]:
    """Return the name, docstring and data of a recipe. Raises UserError if its config is invalid."""
    from rustgpt_jax.config.config_files import load_config_file
    from rustgpt_jax.config.schema import stages
    from rustgpt_jax.config.validation import resolve

    config = resolve(load_config_file(str(file))[0])
    tree = ast.parse(file.read_text(encoding="utf-8"))
    sweeps = [
        each.name for each in tree.body if isinstance(each, ast.FunctionDef) and each.name.split("_")[0] == "sweep"
    ]
    return {
        "name": file.stem,
        "file": file,
        "kind": "experiment" if file.parent.name == "experiments" else "recipe",
        "description": (ast.get_docstring(tree) or "").partition("\n")[0],
        "tokenizer": config.tokenizer.name,
        "corpora": list(dict.fromkeys(stage.config.data.corpus for stage in stages(config))),
        "n_layers": config.model.n_layers,
        "d_model": config.model.d_model,
        "context_length": config.model.context_length,
        "sweeps": [name.removeprefix("sweep_") for name in sweeps],
    }


# runs.


def add_runs_arguments(parser: VerbParser) -> None:
    """Add the arguments of `runs`."""
    help = "A run, a sweep, or a folder of runs. Default: runs."
    parser.add_argument("folders", metavar="FOLDER", nargs="*", help=help)
    help = "The column to sort by: the latest launch first, otherwise in ascending order."
    parser.add_argument("--sort", metavar="|".join(SORT_KEYS), default=SORT_KEYS[0], help=help)
    parser.add_argument("--plot", metavar="FILE.png", help="Draw the loss curves of the runs in one figure.")


def run_runs(args: argparse.Namespace) -> VerbResult:
    """List runs with their steps, validation losses and status, and draw their loss curves in one figure."""
    from rustgpt_jax.cli.run_table import print_runs, summarize_folders
    from rustgpt_jax.tracking.console import PlainTextConsole

    if args.sort not in SORT_KEYS:
        raise UserError(f"--sort: unknown {args.sort!r}.{suggest_names(args.sort, SORT_KEYS)}")
    console = PlainTextConsole()
    if args.plot is not None and Path(args.plot).suffix != ".png":
        raise UserError(f"--plot={args.plot}: the figure is a PNG file; give it a name that ends with .png.")
    rows = summarize_folders([Path(folder) for folder in args.folders or ["runs"]], args.sort)
    if rows:
        print_runs(rows, console)
    else:
        console.print(f"No runs in {', '.join(args.folders or ['runs'])}.", highlight=False)
    if args.plot is not None:
        from rustgpt_jax.tracking.plots import MAX_RUNS, draw_runs

        drawn = [row.folder for row in rows if row.kind == "run" and row.status != "damaged"]
        draw_runs(drawn[:MAX_RUNS], Path(args.plot))
        if len(drawn) > MAX_RUNS:
            console.print(f"The figure shows the first {MAX_RUNS} of {len(drawn)} runs.", highlight=False)
        console.print(f"Loss curves: {args.plot}", highlight=False, soft_wrap=True)
    return VerbResult(0, {"runs": [vars(row) for row in rows], "plot": args.plot})


# components.


def add_components_arguments(parser: VerbParser) -> None:
    """Add the arguments of `components`."""
    help = "A registry, such as mixers, or a component, such as mixers/attention. Default: all registries."
    parser.add_argument("registries", metavar="REGISTRY", nargs="*", help=help)


def run_components(args: argparse.Namespace) -> VerbResult:
    """List the components of each registry: mixers, norms, optimizers, tokenizers and others."""
    from rustgpt_jax.conformance.components import REGISTRIES
    from rustgpt_jax.model.kernels.attention import KERNELS
    from rustgpt_jax.tracking.console import PlainTextConsole
    from rustgpt_jax.tracking.trackers import TRACKERS

    registries: dict[str, Mapping[str, Any]] = {**REGISTRIES, "attention_kernels": KERNELS, "trackers": TRACKERS}
    selected: dict[str, Mapping[str, Any]] = {}
    for given in args.registries or registries:
        kind, _, name = given.partition("/")
        if kind not in registries:
            raise UserError(f"components: unknown registry {kind!r}.{suggest_names(kind, registries)}")
        registry = registries[kind]
        if name and name not in registry:
            raise UserError(f"components: {kind} has no {name!r}.{suggest_names(name, registry)}")
        selected[kind] = {**selected.get(kind, {}), name: registry[name]} if name else registry
    found = {
        kind: [{"name": name, **describe_component(value)} for name, value in registry.items()]
        for kind, registry in selected.items()
    }
    console = PlainTextConsole()
    for kind, components in found.items():
        table = _make_table("name", "description")
        console.print(f"{kind} ({SELECTED_BY[kind]})" if kind in SELECTED_BY else kind, style="bold")
        for each in components:
            # Import paths are long, so they are shown for named registries only.
            path = f"\n{each['import_path']}" if args.registries and each["import_path"] else ""
            table.add_row(each["name"], f"{each['description']}{path}")
        console.print(table)
        console.print()
    return VerbResult(0, {"registries": found})


def describe_component(value: Any) -> dict[str, str | None]:
    """Return the import path of a component and a line that describes it: the first line of its docstring.

    The line of a family of models lists the fields that differ from the defaults.
    """
    if isinstance(value, Mapping):
        return {"import_path": None, "description": _describe_family(value)}
    options: Mapping[str, Any] = {}
    if isinstance(value, partial):
        value, options = value.func, value.keywords
    if isinstance(value, tuple):
        # A kernel, a sampler or a position encoding: the first class or function in it.
        value = next((each for each in value if callable(each)), None)
        if value is None:
            return {"import_path": None, "description": "No position encoding."}
    description = (inspect.getdoc(value) or "").partition("\n")[0].rstrip(".")
    given = [f"{name}={getattr(option, '__name__', option)}" for name, option in options.items()]
    return {
        "import_path": f"{value.__module__}:{value.__qualname__}",
        "description": "; ".join(filter(None, [description, *given])) + ".",
    }


def _describe_family(preset: Mapping[str, Any]) -> str:
    from rustgpt_jax.config.schema import ModelConfig, flatten

    defaults = flatten(ModelConfig())
    changed = {path: value for path, value in preset.items() if value != defaults[path]}
    return ", ".join(f"{path}={_format_value(value)}" for path, value in changed.items())


def _format_value(value: Any) -> str:
    """Format a value as on the command line, with a repeated component given once, as in 5 x local_rope."""
    if not isinstance(value, tuple):
        return str(value)
    groups: list[tuple[str, int]] = []
    for each in value:
        same = bool(groups) and groups[-1][0] == each
        groups[-1:] = [(each, groups[-1][1] + 1)] if same else [*groups[-1:], (each, 1)]
    return " + ".join(f"{count} x {name}" if count > 1 else str(name) for name, count in groups)


# data.


class _StoreConfigOrRun(argparse.Action):
    """Stores a positional argument as --run if it is the path of a folder, and otherwise as --config."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        del option_string
        is_run = (Path(values) / "config.json").exists() or ("/" in values and not values.endswith(".py"))
        name = "run" if is_run else "config"
        if namespace.config is not None or namespace.run is not None:
            given = namespace.config if namespace.config is not None else namespace.run
            parser.error(f"Two configs are given, {values} and {given}; give only one.")
        setattr(namespace, name, values)


def add_data_arguments(parser: VerbParser) -> None:
    """Add the arguments of `data`."""
    parser.add_config()
    parser.add_argument("--run", metavar="RUN", help="A run, whose tokenizer and text are read.")
    help = "A config file or recipe, or a run folder."
    parser.add_argument(
        "config_or_run", metavar="CONFIG", nargs="?", action=_StoreConfigOrRun, default=argparse.SUPPRESS, help=help
    )
    help = "The number of sequences to show."
    parser.add_argument("--rows", metavar="N", type=whole_number(1), default=3, help=help)
    help = "The number of positions of the first sequence to list, with what the model sees and predicts."
    parser.add_argument("--tokens", metavar="N", type=whole_number(0), default=8, help=help)
    parser.add_switch("ids", "Show token ids, too.")


def run_data(args: argparse.Namespace) -> VerbResult:
    """Show the first batch of each stage as text: documents, and which tokens count in the loss."""
    from rustgpt_jax.config.validation import resolve

    if args.config is not None and args.run is not None:
        raise UserError("data takes either a config or a run.")
    config = resolve(*read_config(args)[:2])
    from rustgpt_jax.cli.batch_preview import describe_batches, load_first_batches, print_batches
    from rustgpt_jax.tracking.console import PlainTextConsole
    from rustgpt_jax.workdir.run_dir import RunDir

    console = PlainTextConsole()
    tokenizer_file = None if args.run is None else RunDir(Path(args.run)).tokenizer_file
    tokenizer, previews = load_first_batches(config, tokenizer_file, console)
    print_batches(tokenizer, previews, args.rows, args.tokens, args.ids, console)
    return VerbResult(0, {"stages": describe_batches(tokenizer, previews, args.rows)})

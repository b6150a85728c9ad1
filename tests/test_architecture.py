"""Architecture: strict layers, where JAX and Flax are imported, bounded size, documented and typed public names."""

import ast
import graphlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "rustgpt_jax"

# From the bottom up: a package imports only from the packages before it.
LAYERS = (
    *("jax_internals", "errors", "atomic_io", "cache_dir", "process_setup", "registry", "pytrees"),
    *("config", "tokenizers", "data", "model", "sharding", "distributed", "workdir", "tracking", "inference"),
    *("evaluation", "training", "interop", "planning", "sweeps", "reproduce", "conformance", "api", "cli"),
    *("launch", "__main__"),
)
WITHOUT_JAX = ("errors", "atomic_io", "cache_dir", "registry", "config", "tokenizers", "data")
VAGUE_NAMES = ("util", "utils", "common", "helpers", "misc")
# The package stays small: raise these only for a new capability.
MAX_FILES = 165
MAX_FILES_LOADED_BY_THE_LOOP = 53
# File names that two packages share, because each holds its package's part of the same thing.
SHARED_FILE_NAMES = {
    "__init__.py": "packages",
    "attention.py": "the mixer in model/mixers, the kernels' entry point in model/kernels",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(file: Path) -> str:
    """The dotted name of a module by its file."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(ROOT.glob(f"{PACKAGE}/**/*.py"))
TREES = {name_of(file): ast.parse(file.read_text()) for file in [ROOT / "launch.py", *FILES]}


def package_of(module: str) -> str:
    """Return the package of a module: 'training' for rustgpt_jax.training.train_step, '' for the package itself."""
    return module.removeprefix(PACKAGE).removeprefix(".").split(".")[0]


def find_imports(module: str) -> set[str]:
    """Every module that a module imports, at its head or later; `from package import module` gives the module."""
    found: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES else str(node.module) for name in names}
    return found


IMPORTS = {module: find_imports(module) for module in TREES}


def test_every_package_has_a_layer() -> None:
    assert {package_of(module) for module in TREES} <= {"", *LAYERS}


def test_a_package_imports_only_from_lower_layers() -> None:
    for module, imported in IMPORTS.items():
        package = package_of(module)
        allowed = {"", package, *LAYERS[: LAYERS.index(package)]} if package else {""}
        own = {name for name in imported if name.split(".")[0] == PACKAGE}
        assert not {name for name in own if package_of(name) not in allowed}, module
        if module != "launch":
            assert not {name.split(".")[0] for name in imported} & {"configs", "experiments", "launch", "tests"}, module
        if package == "model":
            below = {"config", *LAYERS[: LAYERS.index("config")]}
            assert {package_of(name) for name in own} <= {"model", *below}, module


def test_no_module_imports_itself_in_a_circle() -> None:
    try:
        graphlib.TopologicalSorter({module: IMPORTS[module] & set(TREES) for module in TREES}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_jax_and_flax_are_imported_only_where_allowed() -> None:
    for module, imported in IMPORTS.items():
        libraries = {name.split(".")[0] for name in imported}
        if package_of(module) in (*WITHOUT_JAX, "launch", "__main__"):
            assert not libraries & {"jax", "jaxlib", "flax", "optax", "orbax"}, module
        assert package_of(module) == "model" or "flax" not in libraries, module


def run_python(code: str) -> str:
    """What some code prints in a new process."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_reading_data_and_configs_starts_no_jax() -> None:
    quiet = [module for module in TREES if package_of(module) in WITHOUT_JAX]
    # Grain imports JAX, and is imported only by runs that need it.
    loaded = '[name for name in ("jax", "flax", "grain") if name in sys.modules]'
    assert run_python(f"import sys, {', '.join(quiet)}\nprint({loaded})") == "[]\n"


def test_the_training_loop_loads_a_bounded_part_of_the_package() -> None:
    code = f"import sys, {PACKAGE}.training.loop\nprint(sum(name.split('.')[0] == '{PACKAGE}' for name in sys.modules))"
    assert int(run_python(code)) <= MAX_FILES_LOADED_BY_THE_LOOP


def test_the_package_has_few_files_with_clear_and_distinct_names() -> None:
    assert len(FILES) <= MAX_FILES
    for module in TREES:
        assert not [part for part in module.split(".") if part in VAGUE_NAMES or part.endswith(("_lib", "_utils"))]
    paths = defaultdict(list)
    for file in FILES:
        paths[file.name].append(str(file.relative_to(ROOT)))
    assert not {name: found for name, found in paths.items() if len(found) > 1 and name not in SHARED_FILE_NAMES}


# What is public.


def public(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """The classes and functions whose names do not begin with _, with the methods of the classes, by dotted name."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


def signatures(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """The functions of `public`, and the special methods of its classes."""
    yield from ((name, node) for name, node in public(tree) if isinstance(node, Function))
    for name, node in public(tree):
        if isinstance(node, ast.ClassDef):
            special = (child for child in node.body if isinstance(child, Function) and child.name.startswith("__"))
            yield from ((f"{name}.{child.name}", child) for child in special)


def unannotated(function: Function, is_method: bool) -> list[str]:
    """The arguments of a function that have no type, and 'return' if its result has none."""
    arguments = function.args
    is_static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in function.decorator_list)
    named = [*arguments.posonlyargs, *arguments.args][is_method and not is_static :]
    every = [*named, *arguments.kwonlyargs, *filter(None, (arguments.vararg, arguments.kwarg))]
    bare = [argument.arg for argument in every if argument.annotation is None]
    return bare if function.returns else [*bare, "return"]


def test_every_public_name_has_a_docstring_and_types() -> None:
    for module, tree in TREES.items():
        assert not tree.body or ast.get_docstring(tree), module
        assert [name for name, node in public(tree) if not ast.get_docstring(node)] == [], module
        bare = {name: unannotated(node, "." in name) for name, node in signatures(tree)}
        assert {name: missing for name, missing in bare.items() if missing} == {}, module

"""Architecture: strict layers, few packages that import JAX or Flax, and documented, typed public names."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "rustgpt_jax"

# From the bottom up: a package imports only from the packages before it.
LAYERS = (
    *("jax_internals", "errors", "atomic_io", "cache_dir", "malloc", "registry", "pytrees", "fingerprints", "native"),
    *("config", "tokenizers", "data", "model", "sharding", "distributed", "workdir", "tracking", "inference"),
    *("evaluation", "training", "interop", "planning", "sweeps", "reproduce", "conformance", "cli", "launch"),
)
WITHOUT_JAX = ("errors", "atomic_io", "cache_dir", "registry", "config", "tokenizers", "data")
VAGUE_NAMES = ("util", "utils", "common", "helpers", "misc")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(file: Path) -> str:
    """The dotted name of a module by its file."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(file): ast.parse(file.read_text()) for file in [ROOT / "launch.py", *ROOT.glob(f"{PACKAGE}/**/*.py")]}
MODULES = sorted(TREES)


def package_of(module: str) -> str:
    """Return the package of a module: 'training' for rustgpt_jax.training.train_step, '' for the package itself."""
    return module.removeprefix(PACKAGE).removeprefix(".").split(".")[0]


def imports(module: str) -> set[str]:
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


def libraries(module: str) -> set[str]:
    """The first names of what a module imports: {'jax', 'numpy', ...}."""
    return {name.split(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", MODULES)
def test_a_package_imports_only_from_lower_layers(module: str) -> None:
    package = package_of(module)
    own = [name for name in imports(module) if name.split(".")[0] == PACKAGE and package_of(name)]
    unknown = {package_of(name) for name in [module, *own]} - {"", *LAYERS}
    assert not unknown, f"packages without a layer: {unknown}"
    below = {"", package, *LAYERS[: LAYERS.index(package)]} if package else {""}
    assert [name for name in own if package_of(name) not in below] == []


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: imports(module) & set(TREES) for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("module", MODULES)
def test_libraries_are_imported_only_where_allowed(module: str) -> None:
    used = libraries(module)
    if module != "launch":
        assert not used & {"configs", "experiments", "launch", "tests"}
    if package_of(module) in (*WITHOUT_JAX, "launch"):
        assert not used & {"jax", "jaxlib", "flax", "optax", "orbax"}
    if package_of(module) != "model":
        assert "flax" not in used


@pytest.mark.parametrize("module", [module for module in MODULES if package_of(module) == "model"])
def test_the_model_knows_only_itself_and_its_config(module: str) -> None:
    packages = {package_of(name) for name in imports(module) if name.startswith(PACKAGE)}
    assert packages <= {"model", "config", *LAYERS[: LAYERS.index("config")]}


def test_reading_data_and_configs_starts_no_jax() -> None:
    quiet = [module for module in MODULES if package_of(module) in WITHOUT_JAX]
    # grain brings JAX by itself.
    code = f"""
import sys, types
sys.modules["grain"] = types.ModuleType("grain")
import {", ".join(quiet)}
print([name for name in ("jax", "flax") if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_has_a_vague_name(module: str) -> None:
    assert not [part for part in module.split(".") if part in VAGUE_NAMES or part.endswith(("_lib", "_utils"))]


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


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_is_explained(module: str) -> None:
    assert not TREES[module].body or ast.get_docstring(TREES[module])
    assert [name for name, node in public(TREES[module]) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_has_types(module: str) -> None:
    bare = {name: unannotated(node, "." in name) for name, node in signatures(TREES[module])}
    assert {name: missing for name, missing in bare.items() if missing} == {}

"""Hooks of the docs site: the reference of knobs and verbs, notebooks, and links to files of the repository.

The reference is generated when the site is built: a page has a line `<!-- generated: NAME -->`, which is replaced by
the text that GENERATED[NAME] returns. A page may link to any file of the repository by its relative path, as it would
on a code host; the site then has a page that shows the file. A notebook in docs/ is a page, NAME.md in the nav.
"""

import argparse
import inspect
import json
import posixpath
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
# A relative link, and the part of its page.
LINK = re.compile(r"\]\((?!\w+:|[#/])([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(`{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)
ARXIV = re.compile(r"arXiv\s(\d{4}\.\d{5})")


# The reference of knobs and verbs.


def escape(text: str) -> str:
    """Escape Markdown in plain text, except for code between backticks, and link papers."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [re.sub(r"([*_<>\[\]~])", r"\\\1", part) if index % 2 == 0 else part for index, part in enumerate(parts)]
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", "".join(plain))


def describe_type(hint: Any) -> str:
    """Return a type as in a signature: `int | None`, `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        return " | ".join(describe_type(part) for part in typing.get_args(hint))
    return (
        "None"
        if hint is type(None)
        else hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint)
    )


def describe_range(low: float | None, high: float | None, choices: tuple[str, ...]) -> str:
    """Return the valid values of a knob, or "" if its type is all there is to say."""
    if choices:
        return "one of " + ", ".join(f"`{choice}`" for choice in choices)
    if low is not None and high is not None:
        return f"from {low:g} to {high:.10g}"
    return f"at least {low:g}" if low is not None else f"at most {high:.10g}" if high is not None else ""


def knob_entry(path: str) -> str:
    """Return one knob as an entry of a definition list, which links can address by the knob's path."""
    from rustgpt_jax.config.schema import FIELDS

    field = FIELDS[path]
    metadata = field.metadata
    kind = "traced" if metadata["traced"] else "static"
    if metadata["static_if_zero"]:
        kind += " (0 is static)"
    valid = describe_range(metadata.get("low"), metadata.get("high"), metadata.get("choices", ()))
    facts = [f"`{describe_type(field.type)}`", valid, f"default `{field.default!r}`", kind]
    return f"`{path}`{{ #{path} }}\n:   {', '.join(filter(None, facts))}\n\n    {escape(metadata['doc'])}\n"


def knobs() -> str:
    """Return the reference of every knob, a section for each group of the config."""
    from rustgpt_jax.config.schema import FIELDS, Config, fields_by_path

    stages = fields_by_path(Config)["stages"].metadata["doc"]
    groups: dict[str, list[str]] = {}
    for path in FIELDS:
        groups.setdefault(path.rpartition(".")[0], []).append(path)
    sections = []
    for group, paths in groups.items():
        node: Any = Config()
        for name in filter(None, group.split(".")):
            node = getattr(node, name)
        summary = inspect.cleandoc(type(node).__doc__ or "")
        entries = [knob_entry(path) for path in paths]
        if not group:
            entries.append(f"`stages`{{ #stages }}\n:   {escape(stages)}\n")
        sections.append("\n".join([f"## {group or 'The whole run'}\n", escape(summary) + "\n", *entries]))
    return "\n".join(sections)


def argument_entry(action: argparse.Action) -> str:
    """Return one argument of a verb as an entry of a definition list."""
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else None)
    if isinstance(value, tuple):
        value = " ".join(value)
    name = ", ".join(f"{option}={value}" if value else option for option in action.option_strings) or str(value)
    expanded = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return f"`{name}`\n:   {escape(expanded)}\n"


def verbs() -> str:
    """Return the reference of every verb, from the parser of its command line."""
    from rustgpt_jax.cli.main import VERBS, build_parsers

    _, parsers = build_parsers()
    # argparse has no public way to list a parser's arguments.
    arguments = {
        name: {
            argument_entry(action): bool(action.option_strings)
            for action in parser._actions
            if action.help != argparse.SUPPRESS and action.dest != "help"
        }
        for name, parser in parsers.items()
    }
    shared = [entry for entry in arguments["train"] if all(entry in entries for entries in arguments.values())]
    sections = ["\n".join(["## Flags of every verb\n", *shared])]
    for name, parser in parsers.items():
        own = sorted(set(arguments[name]) - set(shared), key=list(arguments[name]).index)
        # Positional arguments come first.
        own.sort(key=arguments[name].__getitem__)
        summary = escape(parser.description or "")
        if VERBS[name].reads_overrides:
            summary += " Reads `--config.x.y=VALUE`."
        example = f"```\nrustgpt {name} {VERBS[name].example}".rstrip() + "\n```\n"
        sections.append("\n".join([f"## {name}\n", f"{summary}\n", example, *own]))
    return "\n".join(sections)


GENERATED = {"knobs": knobs, "verbs": verbs}


# Links to files of the repository.


def is_in_docs(path: str) -> bool:
    """Return whether a path in the repository is a page, or another file, of docs/."""
    return path.startswith("docs/") and not path.endswith(".py")


def site_path(path: str) -> str:
    """Return the place in the site of a file of the repository."""
    if is_in_docs(path):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def link_target(origin: str, link: str) -> str:
    """Return the path in the repository of a link in the file `origin`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def outside_fences(text: str, change: Any) -> str:
    """Apply a function to the text of a page, but not to its code blocks."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def rewrite_links(text: str, origin: str) -> str:
    """Return a page, written at `origin` in the repository, with its links as the site needs them."""
    here = posixpath.dirname(site_path(origin))

    def rewrite(match: re.Match[str]) -> str:
        target = posixpath.relpath(site_path(link_target(origin, match[1])), here or ".")
        return f"]({target}{match[2] or ''})"

    return outside_fences(text, lambda part: LINK.sub(rewrite, part))


def linked_files(text: str, origin: str) -> set[str]:
    """Return the files of the repository outside docs/ that a page links to."""
    found: set[str] = set()
    outside_fences(
        text, lambda part: found.update(link_target(origin, each[1]) for each in LINK.finditer(part)) or part
    )
    return {path for path in found if not is_in_docs(path)}


def source_page(path: str) -> str:
    """Return the page that shows a file of the repository."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = {".py": "python", ".cc": "cpp", ".json": "json", ".toml": "toml"}.get(Path(path).suffix, "")
    return (
        f"---\nsearch:\n  exclude: true\n---\n\n# {Path(path).name}\n\n`{path}`\n\n``````{language}\n{text}\n``````\n"
    )


def notebook_page(path: str) -> str:
    """Return the page that shows a notebook of docs/, with the outputs that it has."""
    parts = []
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
            elif text := "".join(output.get("text", data.get("text/plain", ()))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    title, *rest = parts
    name = Path(path).name
    return "\n\n".join([title, f'<a href="{name}" download>Download this page as a notebook, {name}</a>', *rest])


def on_files(files: Any, *, config: Any) -> Any:
    """Add a page for each file of the repository that the pages, or the nav, show."""
    from mkdocs.structure.files import File

    for notebook in sorted((ROOT / "docs").rglob("*.ipynb")):
        path = str(notebook.relative_to(ROOT))
        files.append(File.generated(config, site_path(path), content=notebook_page(path)))
    nav = re.findall(r"source/([\w./-]+\.md)", str(config.nav))
    waiting = list(nav)
    for file in files.documentation_pages():
        waiting += linked_files(file.content_string, f"docs/{file.src_uri}")
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in done:
            continue
        done.add(path)
        if not (ROOT / path).is_file():
            # MkDocs reports the link, because the site then has no such page.
            continue
        text = source_page(path)
        files.append(File.generated(config, site_path(path), content=text))
        waiting += linked_files(text, path) if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Fill in the generated parts of a page, and rewrite its links."""
    uri = page.file.src_uri
    markdown = MARKER.sub(lambda match: GENERATED[match[1]](), markdown)
    path = uri.removeprefix("source/")
    origin = f"docs/{uri}" if path == uri else path if (ROOT / path).is_file() else path.removesuffix(".md")
    return rewrite_links(markdown, origin) if origin.endswith(".md") else markdown

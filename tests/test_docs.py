"""What README and docs name exists: linked files and headings, modules, flags, settings, paths."""

import ast
import functools
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from saber_jax.tree import flatten

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
OURS = ("saber_jax", "data_prep", "benchmarks", "configs", "launch", "tests")
FENCED = re.compile(r"^ *```[^`\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:python3? -m (?P<module>[\w.]+)|(?P<script>launch/\w+\.sh))(?P<rest>.*)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text("utf-8"))


def code(page: Path) -> Iterator[str]:
    """Lines of code blocks, those that a backslash continues joined, and inline code."""
    for block in FENCED.findall(page.read_text("utf-8")):
        yield from block.replace("\\\n", " ").splitlines()
    text = prose(page)
    yield from re.findall(r"^ {4}\S.*", text, re.MULTILINE)
    yield from (span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text))


def commands(page: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(module or "", script or "", flags) of every command, those in $(...) too."""
    for line in code(page):
        for part in re.split(r"\$\(|\s#|[|;&]{1,2}\s", line):
            if found := COMMAND.search(part):
                flags = re.findall(r"(?<![\w-])--[a-z][\w.-]*", found["rest"])
                yield found["module"] or "", found["script"] or "", flags


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def source_of(module: str) -> Path | None:
    """The file that `python -m` runs."""
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__main__.py") if p.is_file()), None)


@functools.cache
def flags_of(path: Path) -> set[str]:
    """The flags that a file names, and those that it takes over from files it imports: all if it
    only starts what it imports, else those of absl, which are global."""
    tree = ast.parse(path.read_text("utf-8"))
    texts = {
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is str
    }
    flags = {text for text in texts if re.fullmatch(r"--\w+", text)} | absl_flags(tree)
    wrapper = not any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in tree.body)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(OURS):
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                imported = source_of(name)
                if imported and wrapper:
                    flags |= flags_of(imported)
                elif imported:
                    flags |= absl_flags(ast.parse(imported.read_text("utf-8")))
    return flags | {"--help"}


def absl_flags(tree: ast.Module) -> set[str]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [c for c in calls if getattr(c.func, "attr", "").startswith("DEFINE_")]
    return {f"--{c.args[0].value}" for c in named if isinstance(c.args[0], ast.Constant)}


@functools.cache
def settings_of(config: str) -> set[str]:
    path, _, variant = config.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    return set(flatten(json.loads(module.get_config(variant).to_json()), "."))


@pages
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert not broken


@pages
def test_every_command_exists_and_takes_the_flags_it_is_shown_with(page):
    wrong = []
    launch = "".join(p.read_text("utf-8") for p in ROOT.glob("launch/*") if p.is_file())
    for module, script, flags in commands(page):
        if module and module.split(".")[0] in OURS and "NAME" not in module:
            path = source_of(module)
            wrong += [module] if path is None else []
            known = flags_of(path) if path else set()
        elif module:
            wrong += [] if importlib.util.find_spec(module.split(".")[0]) else [module]
            continue
        else:
            wrong += [] if (ROOT / script).is_file() else [script]
            known = set(re.findall(r"--[a-z][\w-]*", launch))
        others = {flag for flag in flags if not flag.startswith("--config.")} - known
        wrong += [f"{module or script} {flag}" for flag in others]
    assert not wrong


@pages
def test_every_setting_of_a_config_exists(page):
    unknown = []
    for line in code(page):
        configs = re.findall(r"configs/(?:sft|cadpo)\.py:[a-z0-9-]+", line)
        settings = re.findall(r"--config\.([a-z_.]+)=", line)
        for config in configs or ["configs/cadpo.py:tiny"]:
            unknown += [key for key in settings if key not in settings_of(config)]
    assert not unknown


@pages
def test_every_path_of_the_project_that_a_page_names_exists(page):
    named = re.findall(
        rf"`((?:{'|'.join(OURS)}|docs)/[\w/]+\.(?:py|md|sh|toml))`", page.read_text("utf-8")
    )
    assert not [p for p in named if "NAME" not in p and not (ROOT / p).exists()]


def test_the_map_of_the_architecture_names_every_module_and_no_other():
    tree = FENCED.findall((ROOT / "docs/architecture.md").read_text("utf-8"))[0]
    listed = set(re.findall(r"\b(\w+)\.py\b", tree))
    modules = {p.stem for top in OURS[:5] for p in (ROOT / top).rglob("*.py")}
    assert listed <= modules
    # The map names report*.py and the folder aot/ as a whole.
    core = [p for p in (ROOT / "saber_jax").rglob("*.py") if p.parent.name != "aot"]
    names = {p.stem for p in core if not p.stem.startswith(("report_", "__"))}
    assert names - {"report"} <= listed

"""Folder order is data order: a stage imports only earlier stages, plus `errors`, `host` and `target`."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "attntune"

#: What every stage may import.
COMMON = ("errors", "host", "target")

#: The stages in the order data passes them.
ORDER = (
    "ops",
    "search",
    "templates",
    "database",
    "measure",
    "models",
    "interop",
    "runtime",
    "engines",
    "report",
    "cli",
)

#: Modules that join several stages, and the first stage that may import them: artifacts run without either.
JOINERS = {
    "progress": "engines",
    "tuning_request": "engines",
    "tuning_task": "engines",
    "tuner": "engines",
    "compiler": "engines",
    "kernel_cache": "engines",
    "functional": "engines",
}

#: The package's own surface names every stage.
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def stage_of(module: tuple[str, ...]) -> str:
    """`attntune.ops.linear` → `ops`."""
    return module[1] if len(module) > 1 else ""


def imported_modules(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Line and dotted parts of every attntune module that `path` imports, at any depth."""
    found = []
    package = ("attntune", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, tuple(alias.name.split("."))) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            if module == ("attntune",):
                found += [(node.lineno, ("attntune", alias.name)) for alias in node.names]
            else:
                found.append((node.lineno, module))
    return [(line, module) for line, module in found if module[0] == "attntune"]


def allowed(importer: str, imported: str) -> bool:
    """Whether stage `importer` may import stage `imported`."""
    if imported in (*COMMON, importer, "", "__version__"):
        return True
    if importer in COMMON:
        return False
    if importer in JOINERS:
        return imported != "cli"
    if imported in JOINERS:
        return ORDER.index(importer) >= ORDER.index(JOINERS[imported])
    return ORDER.index(imported) < ORDER.index(importer)


def reads_environment(path: Path) -> str:
    """The stage of `path` if it reads a variable of the environment, else an empty string."""
    for node in ast.walk(ast.parse(path.read_text())):
        subscript = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)
        if (subscript and ast.unparse(node.value) == "os.environ") or (
            isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.getenv", "os.environ.get")
        ):
            return path.relative_to(PACKAGE).parts[0]
    return ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_earlier_stages(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    importer = parts[0]
    wrong = [
        f"line {line}: {importer} imports {'.'.join(module)}"
        for line, module in imported_modules(path)
        if not allowed(importer, stage_of(module))
    ]
    assert not wrong


def test_every_module_belongs_to_a_stage():
    names = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in MODULES}
    assert names <= {*COMMON, *ORDER, *JOINERS}


def test_relative_and_function_level_imports_are_seen(tmp_path, monkeypatch):
    folder = tmp_path / "attntune" / "ops"
    folder.mkdir(parents=True)
    module = folder / "x.py"
    module.write_text("from .linear import Linear\nfrom .. import cli\ndef f():\n    import attntune.report.plots\n")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "attntune")
    stages = [stage_of(found) for _, found in imported_modules(module)]
    assert sorted(stages) == ["cli", "ops", "report"]
    assert [allowed("ops", stage) for stage in ("ops", "cli", "report")] == [True, False, False]


def test_environment_is_read_only_at_the_edges():
    """Settings come through arguments; only the command line and the host look at the environment."""
    assert {stage for stage in map(reads_environment, MODULES) if stage} <= {"cli", "host.py"}

"""The sizes of files and functions, the places of the tests, and what these know of each other."""

import ast

from helpers import ROOT

KERNELS = {f"dgc_fastai/ops/backends/triton_{name}.py" for name in ("kernels", "layer", "skipping")}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

PATHS = [ROOT / "app.py", *(ROOT / "dgc_fastai").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PATHS}
TREES = {name: ast.parse(text, name) for name, text in SOURCES.items()}
SHORT = SOURCES.keys() - KERNELS


def imported_by(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def test_no_file_is_long():
    lines = {name: SOURCES[name].count("\n") for name in SHORT}
    assert not {name: count for name, count in lines.items() if count > MAX_FILE_LINES}


def test_no_function_is_long():
    functions = [
        (name, node)
        for name in SHORT
        for node in ast.walk(TREES[name])
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lines = {f"{name}: {node.name}": node.end_lineno - node.lineno + 1 for name, node in functions}
    assert not {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES}


def test_no_test_imports_another():
    found = {
        f"{name}: {module}"
        for name, tree in TREES.items()
        for module in imported_by(tree)
        if any(part.startswith(("test_", "conftest")) for part in module.split("."))
    }
    assert not found


def test_tests_lie_in_the_folders_of_their_packages():
    packages = {name.split("/")[1] for name in SOURCES if name.startswith("dgc_fastai/") and name.count("/") > 1}
    folders = {name.split("/")[1] for name in SOURCES if name.startswith("tests/") and name.count("/") > 1}
    assert folders <= packages | {"helpers", "gpu"}

"""The house rules that a machine can check: budgets, docstrings, names, and imports that do nothing but import."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("noria", "registry", "training", "serving", "monitoring", "flows", "workloads")
FILE_LINES, FUNCTION_LINES, PARAMETERS = 300, 50, 6
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager", "core", "lib", "tools"}
HEAVY = ("torch", "ray", "mlflow", "prefect", "evidently", "sklearn", "pandas", "matplotlib", "scipy")
MODULES_OF_THE_CORE = 650
"""Modules that importing all of noria/ may load, with everything that it needs (numpy, pyarrow, deltalake)."""

SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def _name(path):
    return str(path.relative_to(ROOT))


def _module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _functions(path):
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_rules_look_at_something():
    assert len(SOURCES) > 40


def test_files_are_short():
    long = {_name(path): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > FILE_LINES}
    assert not long, f"more than {FILE_LINES} lines: {long}"


def test_functions_are_short():
    long = {
        f"{_name(path)}:{node.name}": lines
        for path in SOURCES
        for node in _functions(path)
        if (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES
    }
    assert not long, f"more than {FUNCTION_LINES} lines: {long}"


def test_functions_take_few_parameters():
    wide = {
        f"{_name(path)}:{node.name}": count
        for path in SOURCES
        for node in _functions(path)
        if (count := len([a for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ("self", "cls")]))
        > PARAMETERS
    }
    assert not wide, f"more than {PARAMETERS} positional parameters: {wide}"


def test_every_module_says_what_it_is_for():
    bare = [
        _name(path)
        for path in SOURCES
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not bare, f"no module docstring: {bare}"


def test_public_things_are_described():
    bare = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            parts = [node] if not isinstance(node, ast.ClassDef) else [node, *node.body]
            for part in parts:
                public = isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                if public and not part.name.startswith("_") and not ast.get_docstring(part) and not _overloaded(part):
                    bare.append(f"{_name(path)}:{part.name}")
    assert not bare, f"no docstring: {bare}"


def _overloaded(node):
    return any(
        "overload" in ast.unparse(decorator) or ".setter" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def test_no_module_is_a_drawer():
    named = [_name(path) for path in [*SOURCES, *TESTS] if path.stem in DRAWERS or path.parent.name in DRAWERS]
    assert not named


def test_one_file_reads_the_environment():
    readers = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            attribute = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv", "environb")
            imported = (
                isinstance(node, ast.ImportFrom)
                and node.module == "os"
                and {"environ", "getenv"} & {a.name for a in node.names}
            )
            if attribute or imported:
                readers.append(_name(path))
    # The relay passes its environment on, and may import nothing but the standard library.
    assert set(readers) <= {"noria/variables.py", "flows/run_warm.py"}, sorted(set(readers))


def test_rooms_come_from_this_repository():
    """An installed copy comes before an editable checkout on the path, and would be tested instead."""
    for room in ROOMS:
        found = importlib.util.find_spec(room)
        assert found is not None and Path(found.origin).parent == ROOT / room, f"{room} is imported from {found.origin}"


def test_nothing_names_a_machine():
    """Paths of somebody's machine have no place in what others get."""
    marks = ("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/")
    named = [_name(path) for path in [*SOURCES, *TESTS] if any(mark in path.read_text() for mark in marks)]
    assert not named


WATCH = """
import importlib, json, sys
ROOT, MODULES = sys.argv[1], sys.argv[2:]
ACTS = ("open", "socket.bind", "socket.connect", "subprocess.Popen", "os.mkdir", "os.rename", "os.remove", "os.putenv")
seen = []

def ours():
    # Whose import is running: the innermost module body on the stack decides.
    frame = sys._getframe(2)
    while frame:
        if frame.f_code.co_name == "<module>":
            file = frame.f_code.co_filename
            return file if file.startswith(ROOT) and "site-packages" not in file and "/.venv/" not in file else None
        frame = frame.f_back

def hook(event, given):
    if event not in ACTS:
        return
    if event == "open":
        path, mode = given[0], given[1]
        if not isinstance(mode, str) or not set(mode) & set("wax+"):
            return
    file = ours()
    if file:
        seen.append([file, event, str(given[:1])])

sys.addaudithook(hook)
for module in MODULES:
    importlib.import_module(module)
print(json.dumps({"acts": seen, "modules": sorted(sys.modules)}))
"""


def imported(*modules):
    command = [sys.executable, "-B", "-W", "ignore", "-c", WATCH, str(ROOT), *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def modules_of(*rooms):
    return [_module(path) for path in SOURCES if path.relative_to(ROOT).parts[0] in rooms]


def test_the_core_is_light_and_importing_it_does_nothing():
    found = imported(*modules_of("noria"))
    assert found["acts"] == []
    assert not set(HEAVY) & set(found["modules"])
    assert len(found["modules"]) < MODULES_OF_THE_CORE


def test_workloads_are_light_and_importing_them_does_nothing():
    found = imported(*modules_of("workloads"))
    assert found["acts"] == []
    assert not set(HEAVY) & set(found["modules"])


def test_what_holds_the_socket_knows_neither_models_nor_tables():
    """It starts the workers and lives as long as the server: what it does not load cannot end it, nor hold it up."""
    found = imported("flows.cli", "serving.reload")
    assert not {"onnx", "onnxruntime", "pyarrow", "deltalake", "mlflow", "grpc"} & set(found["modules"])


@pytest.mark.parametrize("room", ["serving"])
def test_serving_is_lean(room):
    found = imported(*[module for module in modules_of(room) if module != "serving.cluster"])
    assert found["acts"] == []
    assert not {"torch", "ray", "prefect", "evidently"} & set(found["modules"])

"""The project's own rules: who imports whom, every error on its page, help at once, no heavy imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import headstart
from headstart.errors import CODES

PACKAGE = Path(__file__).parents[2] / "headstart"
# A room may import those to the right of it, and itself.
ORDER = [
    ("__main__",),
    ("cli",),
    ("vote",),
    ("demo", "chat", "show", "doctor", "label", "verify", "benchmark", "trials", "update", "strength"),
    ("verbs", "tune"),
    ("origin", "rate"),
    ("job", "stop", "stall", "track"),
    ("fit",),
    ("dataset",),
    ("lineage",),
    ("begin",),
    ("run",),
    ("report",),
    ("choose",),
    ("evaluate",),
    ("engine",),
    ("objectives",),
    ("models",),
    ("data",),
    ("display",),
    ("config",),
    ("machine", "files", "energy"),
    ("errors", "faults"),
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# demo is a folder whose generator stands alone; the package's face imports for type checkers only.
EXEMPT = {"__init__"}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{a.name}" for a in node.names] if node.module == "headstart" else [node.module]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


MODULES = {".".join(("headstart", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) not in EXEMPT])
def test_rooms_import_downward_only(module: str) -> None:
    own = room(module)
    for other in imports(MODULES[module]):
        if other.startswith("headstart"):
            target = room(other)
            assert target == own or RANK[target] > RANK[own], f"{module} imports {other}"


def test_data_imports_no_torch_and_only_one_file_may_distribute() -> None:
    for module, path in MODULES.items():
        names = imports(path)
        if room(module) in ("data", "config", "errors", "files", "display", "cli"):
            assert not any(
                name.split(".")[0] in ("torch", "transformers") for name in names if module != "headstart.data.render"
            ), module
        assert not any(name.startswith("torch.distributed") for name in names), module


def test_every_error_code_is_on_its_page_and_used() -> None:
    texts = [path.read_text(encoding="utf-8") for path in MODULES.values() if path.name != "errors.py"]
    raised = {code for text in texts for code in re.findall(r'Problem\(\s*"([a-z_.]+)"', text)}
    written = {code for text in texts for code in re.findall(r'"([a-z]+\.[a-z_]+)"', text)}
    assert raised <= set(CODES), raised - set(CODES)
    assert set(CODES) <= written, set(CODES) - written


def test_help_is_there_at_once_and_imports_nothing_heavy() -> None:
    code = "import sys; import headstart.cli; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    command = [str(Path(sys.executable).parent / "headstart"), "--help"]
    taken = []
    for _ in range(5):
        before = os.times()
        subprocess.run(command, capture_output=True, check=True)
        after = os.times()
        # The processor's time, and not the clock's: other work on this machine doesn't count.
        taken.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(taken) < 0.3


def test_the_version_is_told_and_is_that_of_the_package() -> None:
    from typer.testing import CliRunner

    from headstart.cli import app

    assert CliRunner().invoke(app, ["--version"]).stdout == f"headstart {headstart.__version__}\n"


def test_functions_stay_short() -> None:
    long = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 70:
                long.append(f"{module}.{node.name}")
    assert not long


def test_what_the_package_offers_stays_what_it_is() -> None:
    """A module of the same name would hide a function from the second call on."""
    code = (
        "import headstart, headstart.cli, headstart.tune, headstart.label, headstart.verbs\n"
        "for _ in range(2):\n"
        "    for name in headstart.__all__:\n"
        "        assert callable(getattr(headstart, name)), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_task_is_known_in_every_room() -> None:
    from headstart.config import TASKS
    from headstart.data.prepare import FITTING
    from headstart.evaluate.measure import PRIMARY
    from headstart.models.load import AUTO

    assert set(TASKS) == set(AUTO) == set(PRIMARY) == {task for tasks in FITTING.values() for task in tasks}

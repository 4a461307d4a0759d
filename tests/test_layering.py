"""Who may import what, and how large a file may grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fi_backend"

LEAVES = {"errors", "env"}
DATA = {"spec", "batch", "workspace", "checks", "torch_ops", "variants"}
CORE = {
    "planning",
    "attention",
    "attention_op",
    "group_states",
    "outer_levels",
    "shared_prefixes",
}
TOP = {"cli", "prebuilt", "warmup", "__init__"}


def layer_of(module: str) -> str:
    """Name the layer of a module given as a dotted path below fi_backend."""
    head = module.split(".")[0]
    if head in ("jit", "kernels", "integrations"):
        return head
    if head in LEAVES:
        return "leaves"
    if head in DATA:
        return "data"
    if head in CORE:
        return "core"
    return "top" if head in TOP else "ops"


ALLOWED = {
    "leaves": {"leaves"},
    "jit": {"leaves", "jit"},
    "kernels": {"leaves", "jit", "kernels"},
    "data": {"leaves", "data"},
    "core": {"leaves", "data", "kernels", "jit", "core"},
    "ops": {"leaves", "data", "kernels", "jit", "core", "ops"},
    "top": {"leaves", "data", "kernels", "jit", "core", "ops", "top"},
}
ENGINES = {"vllm", "sglang"}


def imports_of(path: Path) -> set[str]:
    """Every module that a source file names in an import, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"{path}: relative import")
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    module = module_name(path)
    layer = layer_of(module)
    for name in imports_of(path):
        top = name.split(".")[0]
        if top in ENGINES:
            assert layer == "integrations", f"{module} imports the engine {top}"
            assert module.split(".")[1] == top, f"{module} imports the other engine {top}"
        if layer == "jit":
            assert top != "torch", f"{module} imports torch"
        if top != "fi_backend" or name == "fi_backend":
            continue
        below = name.split(".", 1)[1]
        if layer == "integrations":
            own = ".".join(module.split(".")[:2])
            is_public = len(below.split(".")) == 1 and not (PACKAGE / f"{below}.py").exists()
            allowed = below.startswith(own) or is_public or below.split(".")[0] in LEAVES
            assert allowed, f"{module} imports {name}; adapters use public names"
        elif (PACKAGE / below.split(".")[0]).is_dir() or (
            PACKAGE / f"{below.split('.')[0]}.py"
        ).exists():
            assert layer_of(below) in ALLOWED[layer], f"{module} ({layer}) imports {name}"


def test_device_headers_are_framework_free() -> None:
    for path in (PACKAGE / "csrc/include").rglob("*.*"):
        text = path.read_text()
        found = re.search(r"#\s*include\s*<(tvm|torch|ATen|c10|cutlass|cute)/", text)
        assert found is None, f"{path} includes {found}"


def test_templates_only_instantiate() -> None:
    for path in (PACKAGE / "csrc/templates").rglob("*.j2"):
        text = path.read_text()
        assert len(text.splitlines()) <= 25, path
        assert "{% if" not in text, path
        assert "{% for" not in text, path


def test_no_source_file_grows_past_400_lines() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    suffixes = {".py", ".h", ".cuh", ".cu", ".cc", ".sh"}
    long = {
        name: lines
        for name in listed
        if Path(name).suffix in suffixes
        and (ROOT / name).exists()
        and (lines := len((ROOT / name).read_text().splitlines())) > 400
    }
    assert not long


def test_import_is_light() -> None:
    """Importing the package loads no engine and no compiler machinery, and touches no GPU."""
    code = (
        "import sys, torch, fi_backend\n"
        "heavy = {'vllm', 'sglang', 'tvm_ffi', 'jinja2', 'subprocess'} & set(sys.modules)\n"
        "assert heavy <= {'subprocess', 'jinja2'}, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
        "import importlib.util\n"
        "print('jinja2' in sys.modules)\n"
    )
    alone = "import sys, torch; print('jinja2' in sys.modules)"
    ours = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    base = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=True)
    assert ours.stdout == base.stdout

"""The rooms of the package: who imports whom, what `import ldm` loads, whether the public names exist."""
import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import ldm

ROOT    = Path(__file__).parent.parent
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "ldm").rglob("*.py"))

# From the top of the house to its cellar. A file imports only from floors below it, or from its own room.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"sampling", "training", "fast"},
    {"run"},
    {"pipeline"},
    {"contracts"},
    {"guidance", "inpainting", "schedulers", "text", "sizes"},
    {"denoiser"},
    {"noise_schedule"},
    {"noise", "weights", "images"},
    {"models", "printable"},
]
FLOOR_OF  = {room: -floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LIBRARIES = {"huggingface_hub", "numpy", "PIL", "safetensors", "torch", "tqdm", "transformers"}
ONLY      = {"models": {"torch"}}                                     # rooms that may use less than that


def room_of(path: Path) -> str:
    """ldm/models/unet.py → models, ldm/text.py → text."""
    return path.parts[1].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Absolute dotted names of everything that a file of the package imports, at any depth."""
    package = path.parent.parts
    names   = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base   = package[:len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_imports_of_reads_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "ldm/models").mkdir(parents=True)
    path = Path("ldm/models/a.py")
    (tmp_path / path).write_text("import torch.nn as nn, os\nfrom . import b\nfrom .c import d\n"
                                 "from ..noise import e\nfrom .. import text\n"
                                 "def f():\n    from ldm.fast import g\n    import ldm")
    assert imports_of(path) == {"torch.nn", "os", "ldm.models.b", "ldm.models.c.d", "ldm.noise.e", "ldm.text",
                                "ldm.fast.g", "ldm"}


@pytest.mark.parametrize("path", [path for path in MODULES if path != Path("ldm/__init__.py")], ids=str)
def test_imports_run_downwards(path):
    room = room_of(path)
    assert room in FLOOR_OF, f"{path}: give the new room {room!r} its floor in FLOORS"
    inside = {name.split(".")[1] for name in imports_of(path) if name.startswith("ldm.")} - {room}
    upward = {name for name in inside if FLOOR_OF.get(name, 1) >= FLOOR_OF[room]}
    assert not upward, f"{path} imports {sorted(upward)} from its own floor or above it"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_libraries_of_pyproject(path):
    used    = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names - {"ldm"}
    allowed = ONLY.get(room_of(path), LIBRARIES)
    assert used <= allowed, f"{path} imports {sorted(used - allowed)}"


def test_importing_ldm_loads_no_heavy_library():
    code   = "import sys, ldm; print(*sorted(LIBRARIES & {name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code.replace("LIBRARIES", repr(LIBRARIES))], cwd=ROOT,
                            capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("name", ldm.__all__)
def test_public_names_exist_and_are_documented(name):
    assert inspect.getdoc(getattr(ldm, name))
    assert name in dir(ldm)
    assert name in (ROOT / "docs/api.md").read_text("utf-8")


@pytest.mark.parametrize("name", [name for name in ldm.__all__ if name not in ldm._MODULE_OF])
def test_public_names_of_the_modules_are_documented(name):
    module = import_module(f"ldm.{name}")
    for public in getattr(module, "__all__", []):
        assert inspect.getdoc(getattr(module, public)), f"ldm.{name}.{public} has no docstring"


def test_type_checkers_and_python_see_the_same_names():
    tree     = ast.parse((ROOT / "ldm/__init__.py").read_text("utf-8"))
    guarded, = (node for node in tree.body if isinstance(node, ast.If))
    seen     = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert seen == {name: ldm._MODULE_OF.get(name) for name in ldm.__all__}


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(AttributeError, match="'sampel'; its public names are Conditioning"):
        getattr(ldm, "sampel")  # noqa: B009


USERS = sorted(path.relative_to(ROOT) for folder in ("scripts", "tests", "docs/lessons")
               for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", USERS, ids=str)
def test_what_is_asked_of_a_module_exists(path):
    """Where nothing runs the line, as on a GPU only: `fast.name` after `from ldm import fast`."""
    tree, modules = ast.parse((ROOT / path).read_text("utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ldm":
            for alias in node.names:
                thing = getattr(import_module(node.module), alias.name, None)
                thing = thing or import_module(f"{node.module}.{alias.name}")
                if inspect.ismodule(thing):
                    modules[alias.asname or alias.name] = thing
    missing = {f"{node.value.id}.{node.attr}" for node in ast.walk(tree)
               if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
               and node.value.id in modules and not hasattr(modules[node.value.id], node.attr)}
    assert not missing


def tracked_files() -> list[Path]:
    """The text files that git knows or would take; outside of a checkout, all that lie in our folders."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                                cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        listed = [str(path.relative_to(ROOT)) for folder in ("ldm", "tests", "scripts", "docs")
                  for path in (ROOT / folder).rglob("*")]
    text = {".py", ".md", ".toml", ".txt", ".json", ".css", ""}
    return [Path(name) for name in listed if Path(name).suffix in text]


def test_no_registry_and_no_machine_is_named():
    """A clone installs from wherever its owner's tools are set to look, and runs wherever it lies."""
    words = ["py" + "pi.org", "python" + "hosted", "download.py" + "torch", "--index" + "-url",
             "--find" + "-links", "/ro" + "ot/", "/wo" + "rk/", "/ho" + "me/", "/op" + "t/", "/tm" + "p/"]
    found = [f"{path}: {word}" for path in tracked_files() if (ROOT / path).is_file()
             for word in words if word in (ROOT / path).read_text("utf-8", errors="ignore")]
    assert found == []

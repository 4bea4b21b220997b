"""No file of the package can run code that it read: no pickle, no torch.load, no eval."""

import ast
from pathlib import Path

import pytest

import manyhands

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    *("torch.load", "torch.save", "torch.distributed.checkpoint", "torch.serialization", "torch.jit.load", "torch.hub"),
    *("torch.package", "builtins.eval", "builtins.exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
}
KEYWORDS = {"trust_remote_code", "allow_pickle"}


def forbidden(source: str) -> list[str]:
    """What `source` may not contain, as `line: name`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            names = [f"{node.func.id}()"]
        elif isinstance(node, ast.keyword | ast.Constant):
            value = node.arg if isinstance(node, ast.keyword) else node.value
            refusal = isinstance(node, ast.keyword) and ast.unparse(node.value) == "False"
            names = [value] if value in KEYWORDS and not refusal else []
        found += [
            f"{getattr(node, 'lineno', 0)}: {name}"
            for name in names
            if name in ATTRIBUTES | KEYWORDS or name.split(".")[0] in MODULES or name.endswith("()")
        ]
    return found


def test_the_package_never_runs_what_it_reads():
    paths = sorted(Path(manyhands.__file__).parent.rglob("*.py"))
    rooms = {path.relative_to(Path(manyhands.__file__).parent).parts[0] for path in paths}
    assert {"checkpoint", "cli", "families", "generate", "hf", "plan", "text", "trace"} <= rooms
    named = {"families/harmless.py"}  # lists the names of fields that are passed over
    package = Path(manyhands.__file__).parent
    paths = [path for path in paths if path.relative_to(package).as_posix() not in named]
    assert {str(path): found for path in paths if (found := forbidden(path.read_text("utf-8")))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load",
        "save = torch.save",
        "import torch.distributed.checkpoint",
        "eval('1')",
        "exec(code)",
        "load(name, trust_remote_code=True)",
        "options['trust_remote_code'] = True",
        "np.load(path, allow_pickle=True)",
        "builtins.exec(code)",
        "from builtins import eval",
        "torch.serialization.load(path)",
        "torch.jit.load(path)",
        "torch.hub.load('x/y', 'z')",
        "import runpy",
        "yaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load",
    ],
)
def test_the_scan_sees(source):
    assert forbidden(source)


def test_the_scan_lets_pass():
    assert not forbidden("'''no pickle'''\nmodel.eval()\nre.compile('x')\ntorch.compile(f)")
    assert not forbidden("np.load(path, allow_pickle=False)\nsafetensors.torch.load_file(path)")
    assert not forbidden("yaml.safe_load(text)\ntorch.jit.script(f)")

"""The house: who may import whom, how long files and functions may be (docs/fork.md)."""

import ast
import statistics
import sys

import pytest
from conftest import ROOT

FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not path.relative_to(ROOT).parts[0].startswith((".", "runs"))
)
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
SCRIPTS = [name for name in TREES if name[0].isdigit()]
TOP = [*SCRIPTS, "quant_ops.py", "models_dit.py"]
RUNTIME = {"torch", "numpy", "PIL", "scipy", "tqdm"}
LIBRARIES = {"quant_ops", "models_dit", "common", "engine", "methods"}
BENCHMARKS = {path.stem for path in FILES if path.parent.name == "benchmarks"}
MAY_IMPORT = {name: LIBRARIES | RUNTIME for name in [*SCRIPTS, "methods", "demo"]} | {
    "quant_ops.py": {"torch"},
    "models_dit.py": {"torch", "numpy"},
    "engine": {"quant_ops", "models_dit", "engine"} | RUNTIME,
    "engine/triton_kernels.py": {"torch", "triton"},  # itself imported inside functions alone
    "engine/triton_loss.py": {"engine", "torch", "triton"},  # so are these
    "engine/triton_hopper.py": {"engine", "torch", "triton"},
    "engine/triton_hopper_tiles.py": {"engine", "triton"},
    "engine/triton_hopper_attention.py": {"engine", "torch", "triton"},
    "engine/triton_norm.py": {"engine", "torch", "triton"},
    "engine/triton_attention.py": {"engine", "torch", "triton"},
    "common": {"quant_ops", "models_dit", "engine", "common"} | RUNTIME,
    "benchmarks": LIBRARIES | BENCHMARKS | RUNTIME | {"matplotlib"},
    "test_quant_ops.py": {"quant_ops", "pytest", "torch"},
    "tests": LIBRARIES | BENCHMARKS | RUNTIME | {"conftest", "int8_layers", "pytest", "matplotlib"},
}
INSIDE_A_FUNCTION = {  # who asks for a package that need not be there, only when it is used
    "common/weight_files.py": {"safetensors"},
    "benchmarks/sampling.py": {"models", "diffusion"},  # the public DiT code of --official
    "benchmarks/openvino_dit.py": {"openvino", "nncf"},
}
LINES = {
    "01_collect_calib.py": 150, "02_grad_cache.py": 150, "03_quantize.py": 250,
    "04_sample.py": 150, "05_eval_fid.py": 250, "quant_ops.py": 350, "models_dit.py": 430,
    "test_quant_ops.py": 300, "common": 200, "engine": 200, "methods": 250, "README.md": 130,
    "Makefile": 40,
}  # fmt: skip


def of(name, table):
    """The entry of a file, or of its folder."""
    return table[name] if name in table else table[name.split("/")[0]]


def imported(nodes):
    """First parts of the names of all modules that these nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", TREES)
def test_imports_go_one_way(name):
    """quant_ops and models_dit stand alone, engine and common on them, everything else on these;
    packages are the five of requirements.txt, matplotlib in benchmarks, pytest in tests."""
    allowed = of(name, MAY_IMPORT) | sys.stdlib_module_names
    assert not {*imported(TREES[name].body)} - allowed
    optional = INSIDE_A_FUNCTION.get(name, set())
    assert not {*imported(ast.walk(TREES[name]))} - allowed - optional


def test_triton_is_asked_for_only_when_it_is_used():
    """It comes with torch for CUDA alone: nobody's import needs the modules of its kernels."""
    others = [name for name in TREES if not name.startswith(("tests/", "engine/triton_"))]
    lines = [x for name in others for x in (ROOT / name).read_text().splitlines()]
    lines = [x for x in lines if "engine.triton_" in x]
    imports = [x for x in lines if x.lstrip().startswith(("import ", "from "))]
    assert imports and all(x.startswith("    ") for x in imports)


def test_runtime_packages_are_those_of_requirements():
    """requirements.txt pins what runtime code imports, and nothing else; -dev.txt adds to it."""
    pinned = [line.split("==") for line in (ROOT / "requirements.txt").read_text().split()]
    assert {package for package, _ in pinned} == {p.lower() for p in RUNTIME - {"PIL"}} | {"pillow"}
    first, *rest = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert first == "-r requirements.txt" and all("==" in line for line in rest if line)


@pytest.mark.parametrize("name", [name for name in TREES if name != "tests/conftest.py"])
def test_nobody_loads_a_script_by_its_path(name):
    """Numbered scripts cannot be imported, and only tests/conftest.py loads one another way."""
    names = {node.attr for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(TREES[name]) if isinstance(node, ast.Name)}
    calls = {"spec_from_file_location", "import_module", "__import__", "run_path", "run_module"}
    assert name == "tests/fake_cuda/fake_cuda.py" or not names & calls


@pytest.mark.parametrize("name", [name for name in [*TREES, "README.md", "Makefile"]
                                  if name in LINES or name.split("/")[0] in LINES])  # fmt: skip
def test_file_is_within_its_budget(name):
    """A file past its number of lines is a design question, not a formatting one."""
    assert len((ROOT / name).read_text().splitlines()) <= of(name, LINES)


def test_functions_are_short():
    """In the seven files of the top level: 40 lines at most, `main` 60, the median 10."""
    found = [node for name in TOP for node in ast.walk(TREES[name])]
    found = [node for node in found if isinstance(node, ast.FunctionDef)]
    lines = {node: node.end_lineno - node.lineno + 1 for node in found}
    assert not [f.name for f in found if lines[f] > (60 if f.name == "main" else 40)]
    assert statistics.median(lines.values()) <= 10


def test_the_top_level_is_seven_files():
    """Five numbered scripts, the quantizers, the network, and their audit."""
    top = [name for name in TREES if "/" not in name and name != "test_quant_ops.py"]
    assert sorted(top) == sorted(TOP) and len(TOP) == 7

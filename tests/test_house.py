"""The shape of the house: layers, lengths, public names, instant help."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import limbeck
from limbeck import checkup

ROOT = Path(limbeck.__file__).parent
LAYERS = (
    {"errors"},
    {
        "recipe", "recipe_data", "recipe_task", "recipe_checks", "recipe_teacher",
        "recipe_teaching", "recipe_measure", "types", "progress", "_startup", "cores", "device",
        "ranks", "losses",
    },
    {"recipe_file"},
    {"run"},
    {"nets", "precision", "attention", "matrices"},
    {"models", "sources", "cache", "archives", "debian", "fast_tokenizer"},
    {"gguf_source"},
    {"heads", "causal"},
    {"observe", "layermap", "vocabulary"},
    {"features"},
    {
        "objective", "balance", "temperature", "signals", "teachers", "architecture",
        "energy", "linear", "report",
    },
    {"family", "shared_adamw", "trimming", "lora", "quantization"},
    {
        "tasks", "step", "statistics", "elastic", "train", "export", "measure", "measure_language",
        "generating", "on_policy", "cross_tokenizer", "judging", "judging_language", "answers",
        "runtime",
        "runtime_worker", "onnx_decoder", "benchmark_worker",
    },
    {"findings", "stages", "teaching", "scaling", "evaluation", "partings", "trying", "texts",
     "benchmarks"},
    {"chatting"},
    {"lazily", "fetching"},
    {"trials"},
    {"members", "sizing"},
    {"pipeline", "planning", "checkup", "keeping", "anatomy"},
    {"_api"},
    {"__init__", "cli", "cli_chat"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("limbeck"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_imports_point_down():
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).with_suffix("").parts[0]
        for there in imports_of(path) & LEVEL.keys():
            assert there == here or LEVEL[there] <= LEVEL[here], f"{path}: imports {there}"


def test_every_module_has_a_layer():
    names = {path.relative_to(ROOT).with_suffix("").parts[0] for path in ROOT.rglob("*.py")}
    assert names == LEVEL.keys()


def test_no_module_is_long():
    lengths = {str(p): len(p.read_text().splitlines()) for p in ROOT.rglob("*.py")}
    assert not {p: n for p, n in lengths.items() if n > 400}


def test_help_imports_neither_torch_nor_pydantic():
    code = (
        "import sys, limbeck.cli\n"
        "try: limbeck.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'pydantic'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_all_is_the_public_surface():
    rooms = {path.stem for path in ROOT.iterdir()}
    public = {name for name in vars(limbeck) if not name.startswith("_")} - rooms
    assert {*limbeck.__all__} == public
    assert not {*limbeck.__all__} & rooms, "importing the room would replace the function"


def test_doctor_knows_every_extra_that_a_user_may_want():
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["project"]
    known = {*project["optional-dependencies"]} - {"all", "test", "peers"}
    assert {*checkup._EXTRAS} == known

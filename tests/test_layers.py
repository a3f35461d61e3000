"""The layers of the package: imports point down only, and the core needs torch and safetensors alone."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "scale_sae"

# From the bottom up; a module may import what stands on a line above its own, or beside it.
LAYERS = [
    {"errors", "seeds", "embedded", "interleave", "progress"},
    {"config_parsing", "collectives", "kernels", "tensorfile", "selection", "profiling", "hook_names"},
    {"activation_scaler", "data_provider", "mixing_buffer"},
    {"config_schema", "saes"},
    {"recipes"},
    {"config"},
    {"topology", "sae_trainer_config"},
    {"activations", "engines", "optim", "zero", "metrics", "checkpoint", "heartbeat", "launched"},
    {"export", "formats", "card", "init_from", "jobs", "engine_settings", "rundir", "training_log"},
    {"job_trainer"},
    {"snapshots"},
    {"trainer"},
    {"sae_trainer"},
    {"held_out", "reconstruction", "evaluation"},
    {"planning"},
    {
        "session",
        "train",
        "pretokenize",
        "splice",
        "cache_activations",
        "runner_config",
        "runners",
        "consolidate",
        "upload",
        "evaluate",
        "plan",
        "cli",
        "bench",
        "report",
    },
]
# A script that trains the model which comes with the package, beside the commands.
EXEMPT = {"embedded.train"}
# SAE.from_pretrained stands where readers look for it, and what it calls makes SAEs: imported when it is called.
INSIDE_A_FUNCTION = {("saes.inference", "saes.pretrained"), ("saes.base", "saes.registry")}
# Modules whose groups of process may be made: the only one.
GROUP_MAKERS = ("init_process_group", "new_group", "init_device_mesh", "DeviceMesh.from_group")


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    found.pop("")
    return found


def project_imports(path: Path) -> set[str]:
    """Modules of this package that ``path`` imports anywhere, functions included, as dotted names below the package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "scale_sae":
            base = node.module.split(".")[1:]
            names |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("scale_sae.") for alias in node.names if alias.name.startswith("scale_sae.")
            }
    return names


def layer(name: str) -> int:
    top = name.split(".")[0]
    found = [index for index, members in enumerate(LAYERS) if top in members]
    assert found, f"{top} has no layer yet: put it into LAYERS"
    return found[0]


def test_imports_point_down() -> None:
    upward = [
        f"{name} imports {imported}"
        for name, path in modules().items()
        if name not in EXEMPT
        for imported in project_imports(path)
        if layer(imported) > layer(name)
    ]
    assert not upward


def test_no_cycle_inside_a_package() -> None:
    """Modules beside each other may import each other, but not in a circle."""
    known = modules()
    for name, imported in INSIDE_A_FUNCTION:
        at_top_level = [n for n in ast.parse(known[name].read_text()).body if isinstance(n, ast.ImportFrom)]
        assert f"scale_sae.{imported}" not in [node.module for node in at_top_level]

    def target(imported: str) -> str | None:
        """The module that an imported name lies in: the longest known prefix."""
        parts = imported.split(".")
        return next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in known), None)

    graph = {name: {target(i) for i in project_imports(path)} - {None} for name, path in known.items()}
    for name, imported in INSIDE_A_FUNCTION:
        graph[name].remove(imported)
    seen: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
        if name not in seen:
            for other in graph[name]:
                assert other is not None
                visit(other, (*trail, name))
            seen[name] = 1

    for name in graph:
        visit(name, ())


def test_only_topology_makes_groups() -> None:
    makers = {name for name, path in modules().items() for word in GROUP_MAKERS if f"{word}(" in path.read_text()}
    assert makers == {"topology"}


def test_core_imports_with_torch_and_safetensors_alone() -> None:
    core = ["", "collectives", "kernels.codes", "saes.registry", "saes.inference", "optim", "checkpoint", "sae_trainer"]
    heavy = ["datasets", "wandb", "deepspeed", "transformers", "accelerate", "fire", "tokenizers", "tqdm"]
    code = (
        "import sys\n"
        f"for name in {heavy}: sys.modules[name] = None\n"  # importing it is then an ImportError
        f"import importlib\nfor name in {core}: importlib.import_module('scale_sae' + ('.' if name else '') + name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

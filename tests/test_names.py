"""The table of SAELens's public names in docs/from_saelens.md: complete, and true of this package."""

import ast
import importlib.util
import re
from pathlib import Path

import scale_sae

TABLE = Path(__file__).parents[1] / "docs" / "from_saelens.md"
# Beside what sae_lens itself exports: what its guides import from modules below.
FROM_MODULES = {
    "mixing_buffer",
    "ActivationScaler",
    "DataProvider",
    "Evaluator",
    "TrainStepInput",
    "TrainStepOutput",
    "TrainCoefficientConfig",
    "SAETrainerConfig",
}


def rows() -> list[tuple[list[str], list[str]]]:
    """(SAELens's names, ours) of each row of the first table; ours are empty where nothing stands for them."""
    lines = TABLE.read_text().split("## Names")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [(re.findall(r"`([^`]+)`", row[0]), re.findall(r"`([^`]+)`", row[1])) for row in cells[2:]]


def exported_by_saelens() -> set[str]:
    """``sae_lens.__all__``, read and not imported: that takes seconds."""
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None and spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("sae_lens has no __all__")


def test_every_public_name_of_saelens_is_there() -> None:
    listed = [name for theirs, _ in rows() for name in theirs]
    assert len(listed) == len(set(listed))
    assert set(listed) == exported_by_saelens() | FROM_MODULES


def test_what_stands_for_them_exists() -> None:
    for _, ours in rows():
        for name in ours:
            if command := re.fullmatch(r"python -m (scale_sae\.\w+)", name):
                assert importlib.util.find_spec(command[1]) is not None, name
            elif name.endswith(":"):  # a section of the config file
                assert name.removesuffix(":") in scale_sae_config_sections(), name
            else:
                found: object = scale_sae
                for part in name.split("."):
                    found = getattr(found, part)


def scale_sae_config_sections() -> set[str]:
    from dataclasses import fields

    from scale_sae.config import RunConfig

    return {field.name for field in fields(RunConfig)}

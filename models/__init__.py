"""What edgepress knows of particular models: recipes and the embedded reference model."""

from pathlib import Path

REFERENCE = Path(__file__).parent / "reference"
RECIPES = Path(__file__).parent / "recipes"
CALIBRATION_TEXT = REFERENCE / "calibration.txt"
EVALUATION_TEXT = REFERENCE / "evaluation.txt"
# Of another kind than the novels: the project's own documentation as prose.
OTHER_TEXT = REFERENCE / "technical.txt"

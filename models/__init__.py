"""What edgepress knows of particular models: recipes and the embedded reference model."""

from pathlib import Path

REFERENCE = Path(__file__).parent / "reference"
RECIPES = Path(__file__).parent / "recipes"
CALIBRATION_TEXT = REFERENCE / "calibration.txt"
EVALUATION_TEXT = REFERENCE / "evaluation.txt"

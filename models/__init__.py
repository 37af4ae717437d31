"""What edgepress knows of particular models: families, configs, recipes and the embedded reference model."""

from pathlib import Path

REFERENCE = Path(__file__).parent / "reference"
RECIPES = Path(__file__).parent / "recipes"
CALIBRATION_TEXT = REFERENCE / "calibration.txt"
EVALUATION_TEXT = REFERENCE / "evaluation.txt"
# A different kind of text than the novels: the project's own documentation as prose.
OTHER_TEXT = REFERENCE / "technical.txt"
# What a chat model is asked when it writes its own calibration text, a prompt a line.
PROMPTS = Path(__file__).parent / "prompts.txt"

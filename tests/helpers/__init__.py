"""What several tests share. No test imports another."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"

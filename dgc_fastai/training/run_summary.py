"""What a run folder says of its run. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from ..recipe.loading import load_recipe
from ..recipe.schema import Recipe
from ..utils.errors import UserError


def read_run(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the summary of a run.

    Raises:
        UserError: it is not the folder of a run that has finished an epoch.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return load_recipe(folder / "recipe.yaml"), summary
    except FileNotFoundError:
        raise UserError(f"{folder}: not the folder of a run, or of one that has not finished an epoch") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot read the run: {' '.join(str(error).split())}") from None

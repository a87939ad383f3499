"""The command about this machine: env."""

import json
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..utils.invocation import program
from .app import START, app, errors, results


@app.command(group=START, help_epilogue=f"Examples:\n  {program()} env\n  {program()} env --json")
def env(*, as_json: Annotated[bool, Parameter(name="--json")] = False) -> None:
    """Print versions, GPU, processor, kernel, precision, memory.

    Parameters
    ----------
    as_json
        Print JSON.
    """
    with errors.status("Starting torch"):
        from ..analysis.environment import describe_environment

        facts = describe_environment()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        show_environment(results, facts)


def show_environment(console: Console, sections: dict[str, dict[str, Any]]) -> None:
    """Print what `describe_environment` returns; unknown facts are left out."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section, facts in sections.items():
        title = section
        for name, value in facts.items():
            if value is None:
                continue
            text = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(title, name, Text(text))
            title = ""
    console.print(table)

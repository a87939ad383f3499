"""The page that a run or a sweep ends with."""

from pathlib import Path

from ..utils.errors import UserError
from ..utils.invocation import display_path, program
from ..utils.text import one_line
from .app import console, errors, results

__all__ = ["write_final_report"]

SECONDS, SHARE = 15.0, 0.05  # of the time of the training


def write_final_report(folder: Path, trained: float) -> None:
    """Write `report.html` about what has just been trained, and say so; what fails is said, and ends nothing.

    The report may take 15 seconds, or a twentieth of the training where that is more. It leaves out what takes longer,
    and says so.

    Args:
        folder: of the run or the sweep.
        trained: seconds of training.
    """
    try:
        with console.status("Writing the report"):
            from ..analysis.report.build import write_report
        path = write_report([folder], console=console, seconds=max(SECONDS, SHARE * trained))
    except KeyboardInterrupt:  # nobody wants to wait for it
        errors.print(
            f"report.html was left out; to write it: {program()} report {folder}", style="yellow", markup=False
        )
        return
    except Exception as error:  # the training has ended well, whatever this is
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        text = f"report.html was not written: {one_line(reason)}; to try again: {program()} report {folder}"
        errors.print(text, style="yellow", soft_wrap=True, highlight=False, markup=False)
        return
    results.print(f"Its report: {display_path(path)}", soft_wrap=True, highlight=False, markup=False)

"""The entry point of the command line: parse, run a command, and report its error in one line."""

import sys
from contextlib import suppress
from typing import Annotated, Any

from cyclopts import CycloptsError, Parameter

from ..utils import launch
from ..utils.errors import Interrupted, LostProcess, UserError, out_of_memory
from ..utils.invocation import program
from ..utils.text import one_line
from . import compress, environment, gates, measure, start, train, use  # noqa: F401  (they add their commands)
from .app import OPTIONS, app, errors, set_quiet

# The options of every command.
app.meta.group_parameters = OPTIONS


@app.meta.default
def _parse(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    quiet: Annotated[bool, Parameter(["--quiet", "-q"], negative="", show_default=False)] = False,
) -> Any:
    """Parse a command.

    Parameters
    ----------
    quiet
        Print only results and errors.
    """
    set_quiet(quiet)
    if tokens and tokens[0] not in app:  # a recipe without a command
        tokens = "train", *tokens
    return app.parse_args(tokens, exit_on_error=False, print_error=False)


@app.command(name="--install-completion", group=OPTIONS)
def _install_completion() -> None:
    """Install completion of `dgc` for the shell in use."""
    if program() != "dgc":
        raise UserError("completion is for the installed command: pip install . and then dgc --install-completion")
    path = app.install_completion()
    errors.print(f"Wrote {path}. Start a new shell to use it.", soft_wrap=True, highlight=False, markup=False)


def main() -> int:
    """Run the command line and return its exit code; a user's error is one line and code 2."""
    try:
        _run_command(sys.argv[1:] or ["--help"])
        sys.stdout.flush()
    except CycloptsError as error:
        code, message = 2, f"{error} Try {program()} --help."
    except UserError as error:
        code, message = 2, str(error)
    except LostProcess as error:
        code, message = 1, str(error)
    except (MemoryError, RuntimeError) as error:
        full = out_of_memory(error)
        if full is None:
            raise
        code, message = 1, full
    except BrokenPipeError:  # the reader of the output has gone
        return 1
    except OSError as error:  # from the output stream, or from what other packages write
        code, message = 2, f"cannot go on: {error}"
    except Interrupted as stop:
        message, signal = stop.args
        if launch.is_main_process():
            errors.print(message, style="bold", highlight=False, markup=False, soft_wrap=True)
        return 128 + signal
    except KeyboardInterrupt:
        errors.print("interrupted", style="bold")
        return 130
    else:
        return 0
    if _reports_errors():
        errors.print("[bold red]error:[/] ", end="")
        errors.print(one_line(message), markup=False, highlight=False, soft_wrap=True)
    return code


def _run_command(tokens: list[str]) -> None:
    command, arguments, _ = app.meta.parse_args(tokens, exit_on_error=False, print_error=False)
    if command is _parse:  # not --help or --version
        command, arguments, _ = command(*arguments.args, **arguments.kwargs)
        if launch.world_size() > 1 and command not in (train.train, use.evaluate):
            raise UserError(f"{command.__name__} runs in one process, and {launch.world_size()} were started")
    command(*arguments.args, **arguments.kwargs)


def _reports_errors() -> bool:
    """Whether this process, of several, is the one that reports the error that stopped them."""
    collectives = sys.modules.get("dgc_fastai.training.collectives")  # not there before torch is
    return collectives.is_first_to_report() if collectives else launch.local_rank() == 0


def run() -> None:
    """Run the command line and exit with its exit code."""
    code = main()
    with suppress(OSError):  # do not try again to print what could not be printed
        sys.stdout.close()
    sys.exit(code)

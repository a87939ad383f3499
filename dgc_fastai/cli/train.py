"""Commands that train: train, which is also the default, and sweep."""

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from ..utils import launch
from ..utils.errors import Interrupted, UserError
from ..utils.invocation import program
from .app import TRAIN, Overrides, RecipeFile, app, console, load, results
from .final_report import write_final_report

if TYPE_CHECKING:
    from ..recipe.schema import Recipe

# Words that other programs use for what is called otherwise here.
OTHER_WORDS = {
    "bench": "benchmark",
    "classify": "predict",
    "cp": "copy",
    "diff": "compare",
    "eval": "evaluate",
    "help": "--help",
    "infer": "predict",
    "ls": "list",
    "recipes": "list",
    "run": "train",
    "test": "evaluate",
    "val": "evaluate",
    "validate": "check",
    "version": "--version",
}


@app.command(
    group=TRAIN,
    help_epilogue=f"""\
Examples:
  {program()} train quickstart
  {program()} train quickstart train.epochs=30 model.gate_factor=0.5
  {program()} train pets.yaml --resume""",
)
def train(
    recipe: RecipeFile,
    /,
    *overrides: Overrides,
    resume: Annotated[bool, Parameter(help="Continue the newest interrupted run of this recipe, if any.")] = False,
) -> None:
    """Train RECIPE into a new run folder."""
    _refuse_words(recipe)
    plan = load(recipe, overrides)
    from ..recipe.machine import check_machine

    check_machine(plan, resume)
    folder = fit(plan, resume)
    from .tables import show_result

    show_result(results, folder)
    if plan.log.report and launch.is_main_process():
        write_final_report(folder, json.loads((folder / "summary.json").read_text())["seconds"])


@app.command(
    group=TRAIN,
    help_epilogue=f"""\
Examples:
  {program()} sweep quickstart model.gate_factor=0.25,0.5,1 train.seed=0,1
  {program()} sweep quickstart mine.yaml train.seed=0,1,2 --resume""",
)
def sweep(
    recipe: RecipeFile,
    /,
    *more: Annotated[str, Parameter(help="More recipes; section.key=value,value,... for all of them.")],
    jobs: Annotated[
        int | None,
        Parameter(
            validator=Number(gte=1),
            help="Runs side by side; by default one on a GPU, and on a CPU one of a single thread for each core.",
        ),
    ] = None,
    resume: Annotated[bool, Parameter(help="Continue the newest sweep of the same runs, if any.")] = False,
) -> None:
    """Train recipes with every combination of several values."""
    recipes = [recipe, *(Path(word) for word in more if "=" not in word)]
    overrides = [word for word in more if "=" in word]
    notes: list[str] = []
    with console.status("Starting torch and fastai, checking every combination"):
        from ..analysis.compare import show_comparison, show_groups
        from ..training.sweep import default_jobs, plan_sweep

        plan = plan_sweep(recipes, overrides, resume, notes)
    jobs = min(jobs or default_jobs(plan.runs[0].recipe), len(plan.runs))
    if resume:
        notes.append(f"Going on with {plan.folder}." if plan.is_resumed else "No such sweep was begun: starting one.")
    if jobs > 1:
        notes.append(f"{len(plan.runs)} runs, {jobs} at a time, into {plan.folder}")
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    plan.train(console, jobs)
    if folders := plan.folders():
        show_comparison(results, folders)
        show_groups(results, plan.rows())
        text = f"The runs, sweep.csv and sweep.png are in {plan.folder}."
        results.print(text, soft_wrap=True, highlight=False, markup=False)
        if plan.runs[0].recipe.log.report:
            write_final_report(plan.folder, sum(row["seconds"] for row in plan.rows()))
    plan.raise_failures()


def fit(plan: "Recipe", resume: bool) -> Path:
    """Train a recipe into a run folder, show what it is and costs, and return the folder."""
    with console.status("Starting torch and fastai, reading the data") as status:
        from ..ops.device import use_device
        from ..training.collectives import destroy_process_group, init_process_group
        from ..training.run import TrainingRun
        from ..training.run_folder import STATE, as_begun, find_resumable_run
        from .tables import show_choice, show_cost, show_recipe

        init_process_group(use_device(plan.device))
        folder, found = find_resumable_run(plan, resume)
        gets_weights = bool(folder and (folder / STATE).exists())
        run = TrainingRun(as_begun(plan, folder), gets_weights, notify=status.update)
        run.learner  # noqa: B018  (reads the data)
    show_recipe(console, run.recipe)
    show_cost(console, run.cost)
    if run.choice:
        show_choice(console, run.choice)
    if run.starts_from:
        console.print(f"Starts from {run.starts_from}.", soft_wrap=True, highlight=False, markup=False)
    if found:
        console.print(found, soft_wrap=True, highlight=False, markup=False)
    try:
        folder = run.fit(console, folder)
    except Interrupted:  # of all processes, which need not end at the same time
        destroy_process_group()
        raise
    destroy_process_group()
    return folder


def _refuse_words(recipe: Path) -> None:
    """Refuse a bare word that is neither a recipe nor a command, with the command that was probably meant.

    Raises:
        UserError: there is neither such a recipe nor such a command.
    """
    from ..recipe.catalogue import find_recipe, recipe_names

    word = str(recipe)
    if find_recipe(recipe).exists() or recipe.suffix or recipe.name != word:
        return  # a path: what is wrong with it is for the reader of recipes to say
    commands = [name for name in app if not name.startswith("-")]
    nearest = difflib.get_close_matches(word.lower(), [*commands, *recipe_names()], n=1, cutoff=0.5)
    meant = OTHER_WORDS.get(word.lower()) or (nearest[0] if nearest else "")
    hint = f"did you mean `{program()} {meant}`?" if meant else f"see `{program()} --help` and `{program()} list`"
    raise UserError(f"there is no command and no recipe {word!r}; {hint}")

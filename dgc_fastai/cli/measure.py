"""Commands that measure: benchmark, compare and report."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from ..utils.invocation import display_path, program
from .app import MEASURE, Overrides, RecipeFile, app, console, load, results


@app.command(
    group=MEASURE,
    help_epilogue=f"""\
Examples:
  {program()} benchmark quickstart
  {program()} benchmark imagenet_r18 device=cuda --only training
  {program()} benchmark imagenet_r18 data.path=~/imagenet --only data""",
)
def benchmark(
    recipe: RecipeFile,
    /,
    *overrides: Overrides,
    rounds: Annotated[int, Parameter(validator=Number(gte=1), show_default=True)] = 7,
    out: Annotated[
        Path | None,
        Parameter(help="Folder for benchmark.json and benchmark.png; by default a new one below the recipe's output."),
    ] = None,
    compile: Annotated[bool, Parameter(negative="--no-compile")] = True,
    only: Annotated[
        Literal["training", "inference", "data"] | None,
        Parameter(
            help="What to time; by default training and inference, which need no data. With data: the images per "
            "second of the data pipeline and of a training step."
        ),
    ] = None,
) -> None:
    """Time RECIPE's network and its baselines, or its data pipeline.

    The baselines are the same network without gates, dense or with static groups, and the authors' method.

    Parameters
    ----------
    rounds
        How often each is timed, in turn.
    compile
        Also time inference with torch.compile, which takes minutes and needs a C++ compiler.
    """
    plan = load(recipe, overrides)
    from ..recipe.machine import check_compiler, check_data, check_device

    check_device(plan)
    check_compiler(plan.train.compile, "train.compile")
    check_compiler(compile and only in (None, "inference"), "--compile")
    if only == "data":
        check_data(plan.data)
    with console.status("Starting torch and timm, building the networks"):
        from ..analysis.benchmark import benchmark as measure
        from ..analysis.benchmark import benchmark_folder, plan_benchmark, plan_data
        from ..analysis.benchmark_report import show_benchmark

        if only == "data":
            measurements, sources = [], plan_data(plan)
        else:
            measurements = [one for one in plan_benchmark(plan, compile) if one.what.startswith(only or "")]
            sources = []
        folder = benchmark_folder(plan, out)
    show_benchmark(results, measure(plan, measurements, folder, rounds, console, sources))
    text = f"benchmark.json and benchmark.png are in {folder}."
    results.print(text, soft_wrap=True, highlight=False, markup=False)


@app.command(group=MEASURE, help_epilogue=f"Example:\n  {program()} compare runs/quickstart-*")
def compare(
    run: Annotated[Path, Parameter(help="A run folder.")],
    /,
    *runs: Annotated[Path, Parameter(help="More run folders.")],
) -> None:
    """Print runs side by side: accuracy, cost, time, and how their recipes differ."""
    from ..analysis.compare import show_comparison

    show_comparison(results, [run, *runs])


@app.command(
    group=MEASURE,
    help_epilogue=f"Examples:\n  {program()} report runs/quickstart-20260101-120000\n"
    f"  {program()} report runs/quickstart-sweep-20260101-120000 --out sweep.html",
)
def report(
    run: Annotated[Path, Parameter(help="A run folder, or a folder of runs, such as a sweep's.")],
    /,
    *runs: Annotated[Path, Parameter(help="More such folders.")],
    out: Annotated[Path | None, Parameter(help="The file to write; by default report.html in RUN's folder.")] = None,
) -> None:
    """Write one HTML page about runs: curves, accuracy against cost and measured latency, classes, mistakes."""
    with console.status("Starting torch and timm"):
        from ..analysis.report.build import write_report
    path = write_report([run, *runs], out, console)
    results.print(f"Wrote {display_path(path)}.", soft_wrap=True, highlight=False, markup=False)

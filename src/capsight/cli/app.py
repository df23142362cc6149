"""The `capsight` command."""

from __future__ import annotations

import sys
from io import TextIOWrapper

import typer
from rich.text import Text

from capsight.cli.ask import ask
from capsight.cli.attention import attention
from capsight.cli.bench import bench_command
from capsight.cli.calibrate import calibrate
from capsight.cli.check_model import check_model
from capsight.cli.demo import demo
from capsight.cli.encapsulate import encapsulate
from capsight.cli.evaluate import evaluate_command
from capsight.cli.examples import examples
from capsight.cli.export import export
from capsight.cli.fit import fit
from capsight.cli.generate import generate
from capsight.cli.inspect import inspect
from capsight.cli.output import console
from capsight.cli.plan import plan
from capsight.cli.report import report
from capsight.cli.serve import serve
from capsight.errors import CapsightError
from capsight.kvcapsule.calibration.processes import ElsewhereError

app = typer.Typer(
    help="Cheaper vision-language models without retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(demo)
app.command()(examples)
app.command()(generate)
app.command()(encapsulate)
app.command()(ask)
app.command()(fit)
app.command()(calibrate)
app.command()(attention)
app.command()(inspect)
app.command("eval")(evaluate_command)
app.command("bench")(bench_command)
app.command()(export)
app.command(context_settings={"allow_extra_args": True})(serve)
app.command()(plan)
app.command()(check_model)
app.command()(report)


def main() -> None:
    """Run the command line; bad input ends in one clear line and exit code 2."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what no encoding has
    try:
        app()
    except (CapsightError, OSError) as error:
        if type(error) is ElsewhereError:  # which has said so itself
            sys.exit(2)
        reason = " ".join(str(error).split()).encode(errors="backslashreplace").decode()
        message = Text.assemble(("capsight:", "bold red"), " ", reason)
        console(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

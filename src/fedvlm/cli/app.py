"""The command line. Heavy imports are inside the commands, so that --help is instant."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvlm import processes
from fedvlm.cli import audit as cli_audit
from fedvlm.cli import auditlog as cli_auditlog
from fedvlm.cli import deploy as cli_deploy
from fedvlm.cli import lists as cli_lists
from fedvlm.cli import playground as cli_playground
from fedvlm.cli import push as cli_push
from fedvlm.cli import report as cli_report
from fedvlm.cli import site as cli_site
from fedvlm.cli.options import QuietOption, SetOption, Words, parse
from fedvlm.cli.report import reported, reported_all, reported_early
from fedvlm.cli.stops import interruptible, say_finished, taken
from fedvlm.errors import ConfigError, FedVLMError, cut, one_record, shown
from fedvlm.version import __version__

if TYPE_CHECKING:
    from fedvlm.settings.sections import Config

app = typer.Typer(
    help="Federated fine-tuning of vision-language models: a personal LoRA adapter for every site.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunFolder = Annotated[str, typer.Argument(metavar="DIR", help="the folder of a finished run")]
ClientOption = Annotated[
    list[str] | None,
    typer.Option("--client", "-c", metavar="NAME", help="this client's model; may be repeated"),
]
GlobalOption = Annotated[bool, typer.Option("--global", help="the global model")]
DataOption = Annotated[
    str, typer.Option("--data", metavar="FILE", help="rows with the run's columns")
]
OutOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="write the results as .jsonl, .json, .csv or .parquet"),
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedvlm {__version__}")
        raise typer.Exit


@app.callback()
def _check_processes(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    if processes.size() > 1 and context.invoked_subcommand != "run":
        raise FedVLMError(
            f"'fedvlm {context.invoked_subcommand}' works in one process, but {processes.size()} "
            "were started: leave out torchrun; only 'fedvlm run' uses several devices"
        )


@app.command()
def run(
    words: Words = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="resume the unfinished run in DIR, or go on to another train.rounds; data.path "
            "and model.name may have moved",
        ),
    ] = None,
    quiet: QuietOption = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print all settings as YAML and exit")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="print the run's steps, bytes sent and memory, and exit"),
    ] = False,
) -> None:
    """Fine-tune one model per client and score every model."""
    from fedvlm import config as configs

    if resume is not None and dry_run:
        raise ConfigError(["--dry-run plans a new run; leave out --resume"])
    source, overrides = parse(words)
    if print_config:
        text = configs.dump(configs.load(source, *overrides))
        if processes.rank() == 0:
            typer.echo(text, nl=False)
        return
    if resume is not None and not resume.strip():
        raise ConfigError(["--resume needs the folder of a run, and got an empty text"])
    settings = None if resume else configs.load(source, *overrides, inputs=True)
    if dry_run and settings:
        if processes.rank() == 0:
            from fedvlm.cli.forecasts import print_forecast
            from fedvlm.planning.forecast import forecast

            print_forecast(forecast(settings))
            if wrong := taken(settings.output):
                typer.echo(f"warning: {wrong}", err=True)
        return

    from fedvlm.cli.live import choose
    from fedvlm.cli.tables import print_run
    from fedvlm.rounds import federate
    from fedvlm.store.run import is_run

    folder = resume or settings.output  # type: ignore[union-attr]
    with interruptible(f"fedvlm run --resume {folder}", partial(is_run, folder)):
        if resume and not words:
            say_finished(resume)
        if resume:
            results = federate.resume(resume, *words or (), progress=choose(quiet))
        else:
            results = federate.run(settings, progress=choose(quiet))
    if processes.rank() == 0:
        print_run(results)
        reported(results.folder)


@app.command()
def compare(
    algorithms: Annotated[str, typer.Argument(help="a list such as plora,lora,local")],
    words: Words = None,
    seeds: Annotated[int, typer.Option(help="number of seeds, starting at `seed`")] = 1,
    jobs: Annotated[int, typer.Option(help="runs in parallel, one process each")] = 1,
    quiet: QuietOption = False,
) -> None:
    """Compare algorithms on the same clients and initial weights."""
    from fedvlm import config as configs

    source, overrides = parse(words)
    tree, problems = configs.read(source, *overrides)
    if problems:
        raise ConfigError(problems)
    names = [a.strip() for a in algorithms.split(",") if a.strip()]
    _compare(names, {"output": "runs/compare"} | tree, seeds, jobs, quiet)


@app.command()
def demo(
    words: Words = None,
    seeds: Annotated[int, typer.Option(help="number of seeds")] = 1,
    jobs: Annotated[int, typer.Option(help="runs in parallel; 0: one per core, at most 4")] = 0,
    quiet: QuietOption = False,
) -> None:
    """Compare personalized LoRA with baselines on eight sites."""
    from fedvlm import config as configs
    from fedvlm.cli.demo import ALGORITHMS, INTRODUCTION, SETTINGS, Picture

    source, overrides = parse(words)
    if source:
        raise ConfigError([f"the demo has its own configuration; leave out '{source}'"])
    settings, problems = configs.read(SETTINGS, *overrides)
    if problems:
        raise ConfigError(problems)
    if not quiet:
        typer.echo(INTRODUCTION)
    began = time.monotonic()
    jobs = jobs or min(4, os.cpu_count() or 1)
    picture = Picture()
    runs = _compare(list(ALGORITHMS), settings, seeds, jobs, quiet, picture.ask_early)
    picture.print(Path(next(iter(runs.values())).output))  # of the first algorithm and seed
    typer.echo(f"the demo took {time.monotonic() - began:.0f} s")


@app.command()
def export(
    folder: RunFolder,
    client: ClientOption = None,
    global_: GlobalOption = False,
    all_: Annotated[
        bool, typer.Option("--all", help="every client's model and the global model")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="write a whole model that loads without PEFT")
    ] = False,
    to: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="the new folder; default DIR/export/NAME")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Export adapters or whole models, with a model card.

    Exports load without fedvlm.
    """
    from fedvlm.after.export import export_many

    named = tuple(client or ())
    for path in export_many(
        folder, *set_ or (), clients=named, global_=global_, every=all_, merge=merge, to=to
    ):
        typer.echo(path)


@app.command()
def predict(
    folder: RunFolder,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="an image, a folder of images, or a data file")
    ],
    question: Annotated[
        str | None, typer.Argument(help="the question; a data file may have its own questions")
    ] = None,
    client: ClientOption = None,
    global_: GlobalOption = False,
    untuned: Annotated[bool, typer.Option("--untuned", help="the model before training")] = False,
    all_: Annotated[bool, typer.Option("--all", help="all of these models")] = False,
    out: OutOption = None,
    set_: SetOption = None,
) -> None:
    """Ask one or more of a run's models about images."""
    from fedvlm.after.predict import predict_many
    from fedvlm.cli.aftertables import print_answers

    answers = predict_many(
        folder,
        source,
        question,
        clients=client or (),
        global_=global_,
        untuned=untuned,
        every=all_,
        out=out,
        overrides=set_ or (),
    )
    print_answers(answers, out)


@app.command()
def evaluate(
    folder: RunFolder,
    data: DataOption,
    client: ClientOption = None,
    global_: GlobalOption = False,
    all_: Annotated[
        bool,
        typer.Option("--all", help="every client's model and the global model; the default"),
    ] = False,
    max_rows: Annotated[
        int | None, typer.Option(help="score a seeded sample of this many rows")
    ] = None,
    out: OutOption = None,
    set_: SetOption = None,
) -> None:
    """Score a run's models and the untuned model on new data."""
    from fedvlm.after.evaluate import evaluate as score
    from fedvlm.cli.aftertables import print_evaluation

    clients = None if all_ or not (client or global_) else client or []
    found = score(
        folder,
        data,
        *set_ or (),
        clients=clients,
        global_=global_ and clients is not None,
        max_rows=max_rows,
        out=out,
    )
    print_evaluation(found, out)


@app.command()
def onboard(
    folder: RunFolder,
    data: DataOption,
    name: Annotated[
        str | None, typer.Option(help="name of the site; default: the data's name")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="local steps; default: as many as each of the run's clients, at most 100"
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate; default: the run's")] = None,
    set_: SetOption = None,
) -> None:
    """Train a model for a new site in a few local steps."""
    from fedvlm.after.onboard import onboard as join
    from fedvlm.cli.aftertables import print_onboarded

    print_onboarded(join(folder, data, *set_ or (), name=name, steps=steps, lr=lr))


app.command()(cli_report.plot)
app.command()(cli_lists.algorithms)
app.command()(cli_lists.config)
app.command()(cli_audit.audit)
app.command()(cli_push.push)
app.command()(cli_report.report)
app.command()(cli_report.watch)
app.command("app")(cli_playground.playground)
app.add_typer(cli_deploy.deploy, name="deploy")
app.add_typer(cli_site.site, name="site")
app.add_typer(cli_auditlog.audit_log, name="audit-log")


def main() -> None:
    """The entry point. A mistake in the input prints one message and exits with code 2."""
    # Two busy thread pools on few cores make each other ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    processes.own()
    log = logging.getLogger("fedvlm")
    log.removeFilter(one_record)
    log.addFilter(one_record)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 loses no message
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_exit_code())


def _exit_code() -> int:
    """Runs the command; 0, or 2 after a mistake in the input, or 1 after a defect of fedvlm."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # the reader of the output has ended
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except FedVLMError as error:
        return _stop(str(error))
    except OSError as error:
        where = f": {shown(error.filename, 200)}" if error.filename else ""
        return _stop(f"{shown(error.strerror or str(error), 1000, quotes=False)}{where}")
    except (MemoryError, RecursionError, UnicodeError) as error:
        return _stop(FedVLMError(f"{type(error).__name__}: {error}".removesuffix(": ")))
    except KeyboardInterrupt:
        return 130
    except typer.Abort:  # a no, Ctrl-C or the end of the input, at a question
        return _stop("the question was not answered with yes; nothing was changed")
    except Exception as error:
        if isinstance(getattr(error, "message", None), str) and hasattr(error, "show"):
            error.message = cut(error.message)  # type: ignore[attr-defined]
            error.show()  # an error of typer: wrong options
            return getattr(error, "exit_code", 2)
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported here
            return _stop(FedVLMError(str(error)))
        traceback.print_exc()
        typer.echo("error: this is a defect of fedvlm; please report it with these lines", err=True)
        return 1


def _stop(message: object) -> int:
    processes.let_first_speak()
    typer.echo(f"error: {message}", err=True)
    return 2


def _compare(
    names: list[str],
    tree: dict[str, Any],
    seeds: int,
    jobs: int,
    quiet: bool,
    idle: Callable[[Sequence[Path]], None] = lambda folders: None,
) -> dict[str, Config]:
    """Runs a comparison and prints it; returns the settings of its runs by name.

    The last runs may leave cores idle: then come the reports of the others, and ``idle``.
    """
    from fedvlm.cli.board import board
    from fedvlm.cli.tables import print_comparison
    from fedvlm.rounds.comparison import compare as run_comparison
    from fedvlm.rounds.contenders import planned

    def ahead(folders: Sequence[Path]) -> None:
        reported_early(folders)
        idle(folders)

    runs = planned(names, tree, seeds=seeds, jobs=jobs)
    again = "the same command"
    with interruptible(again), board(runs, quiet) as tell:
        comparison = run_comparison(names, tree, seeds=seeds, jobs=jobs, tell=tell, idle=ahead)
    print_comparison(comparison)
    reported_all(comparison.folder)
    return runs

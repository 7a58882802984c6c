"""What every command of the command line shares: run the job, print its record or its error, end with an exit code.

The record goes to stdout (tables, or JSON with ``--json``), everything else to stderr. Only click is imported before a
command runs, so that help is instant and works where nothing else is installed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import io
import itertools
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from channelfold.runtime.errors import ChannelfoldError, OutputError, nearest, no_progress
from channelfold.runtime.report.names import one_line, safe
from channelfold.runtime.report.progress import Progress


class Commands(click.Group):
    """A group that names the nearest command for a misspelt one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(f"No such command {args[0]!r}. {nearest(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


class Command(click.Command):
    """A command in which ``--target tensorrt:89`` is short for ``--target tensorrt --sm 89``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        flags = {flag for param in self.params for flag in param.opts}
        return super().parse_args(ctx, _with_sm(args, "--sm" in flags, ctx) if "--target" in flags else args)


def _with_sm(args: Sequence[str], known: bool, ctx: click.Context) -> list[str]:
    """The arguments with the SM of a target as the flag ``--sm``, where the command knows the flag."""
    found: list[str] = []
    for before, text in itertools.pairwise(["", *args]):
        short = re.fullmatch(r"((?:--target=)?tensorrt):(\d+)", text)
        if short is None or "--target" not in (before, text[:8]):
            found.append(text)
        elif known:
            found += [short[1], "--sm", short[2]]
        else:
            wanted = f"Give --target tensorrt; compress and lint take tensorrt:{short[2]}"
            raise click.UsageError(f"{ctx.command.name!r} builds no engine for an SM. {wanted}", ctx)
    return found


def command(group: click.Group, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Makes a command of ``group`` out of a function that returns a record. The help ends with the example.

    The command also has --json, --html, --quiet and --debug, and passes ``jobs`` and ``progress`` to the function.
    """

    def register(function: Callable[..., Any]) -> click.Command:
        @functools.wraps(function)
        def run(as_json: bool, html: str | None, quiet: bool, debug: bool, **options: Any) -> None:
            jobs = importlib.import_module("channelfold.runtime.jobs")
            if html:
                importlib.import_module("channelfold.runtime.io.outputs").check_kind(Path(html), "a web page")
            try:
                with Progress() as shown, contextlib.redirect_stdout(sys.stderr):
                    record = function(jobs, progress=no_progress if quiet else shown, **options)
            except jobs.GateMissed as missed:
                _deliver(_named(missed.record, function), as_json, html, quiet)
                raise
            _deliver(_named(record, function), as_json, html, quiet)

        made = group.command(cls=Command, name=function.__name__, epilog=f"\b\nExample:\n  {example}")(run)
        made.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="Print the report, or the error, as JSON."),
            click.Option(["--html"], metavar="FILE", type=click.Path(), help="Also write the report as a web page."),
            click.Option(["-q", "--quiet"], is_flag=True, help="Print no report, no warnings and no progress."),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        ]
        return made

    return register


def _named(record: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """The record of a command with its command line, where the record does not know it."""
    line = click.get_current_context().obj
    return record | {"line": shlex.join(line)} if line and record.get("command") == function.__name__ else record


def _deliver(record: dict[str, Any], as_json: bool, html: str | None, quiet: bool) -> None:
    """Prints the record, and writes it as a web page."""
    if html:
        importlib.import_module("channelfold.runtime.report.terminal").write_html(record, html)
    if as_json or not quiet:
        _print(record, as_json)
    collapsed = (record.get("accuracy") or {}).get("verdict", {}).get("level") == "collapsed"
    for warning in () if quiet else record["warnings"]:  # a terminal has shown them already
        if as_json or not sys.stdout.isatty() or (collapsed and warning.startswith("THE OUTPUTS")):
            _say("warning:", warning, "yellow")


def _print(record: dict[str, Any], as_json: bool) -> None:
    """Prints the record to stdout."""
    from rich.console import Console

    from channelfold.runtime.report.terminal import render, to_json

    try:
        if as_json:
            click.echo(to_json(record))
        else:
            render(record, Console(width=None if sys.stdout.isatty() else 10_000))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has ended, which click takes quietly
        raise
    except OSError as error:
        with contextlib.suppress(OSError):  # else Python fails again at exit, on the rest of the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"The report cannot be written to stdout ({error.strerror})") from None


def _say(label: str, text: str, color: str) -> None:
    """Prints one line of at most 500 characters, which nothing in ``text`` can break or forge."""
    plain = "NO_COLOR" in os.environ or not sys.stderr.isatty()
    line = one_line(text, 499 - len(label))
    click.echo(f"{label if plain else click.style(label, fg=color, bold=True)} {line}", err=True)


def main(group: click.Group, args: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and ends the process with the exit code of the command, and never with a traceback."""
    for handle in range(
        3
    ):  # a closed one would be given to the next file opened, which the report would then end up in
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show must not end a command
    sys.exit(run(group, list(sys.argv[1:] if args is None else args)))


def run(group: click.Group, args: list[str]) -> int:
    """Runs a command; the exit code."""
    try:
        return group.main(args or ["--help"], prog_name="channelfold", standalone_mode=False, obj=args) or 0
    except (KeyboardInterrupt, click.Abort):
        _say(
            "interrupted:",
            "no file is half written; repeat a compress command, and it continues where it stopped",
            "red",
        )
        return 130
    except Exception as error:
        if "--debug" in args:
            # indented, so that no line of a message looks like a line of this program
            click.echo("\n  ".join(map(safe, traceback.format_exc().splitlines())), err=True)
        message, code = _explained(error, args)
        if "--json" in args and not hasattr(error, "record"):  # else the report is printed already
            with contextlib.suppress(OSError):
                click.echo(json.dumps({"schema": 1, "error": one_line(message, 499), "exit_code": code}, indent=2))
        _say("error:", message, "red")
        return code


def _explained(error: Exception, args: list[str]) -> tuple[str, int]:
    """The message for the user about an error, and the exit code."""
    match error:
        case ChannelfoldError():
            return str(error), error.exit_code
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else "channelfold"
            message = error.format_message()
            return f"{message if message[-1] in '.?)' else message + '.'} See: {path} --help", error.exit_code
        case click.ClickException():
            return error.format_message(), error.exit_code
        case ImportError():
            return f"channelfold is not fully installed ({error}). In its folder, run: pip install '.[cpu]'", 1
        case MemoryError():
            return "There is not enough memory. Close other programs, or use a machine with more", 1
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            full = ". Free some space, or set TMPDIR to a larger disk" if error.errno == errno.ENOSPC else ""
            return f"{where}{error.strerror or error}{full}", 1
    hint = (
        "Report it with the traceback above"
        if "--debug" in args
        else "Run again with --debug, and report what it shows"
    )
    return f"{type(error).__name__}: {error}. This is a bug in channelfold. {hint}", 1

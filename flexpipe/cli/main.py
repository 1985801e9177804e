"""The command `flexpipe` and how it ends.

Every way out is decided here: an error of the user's making is one text on stderr and its exit
code, Ctrl-C is one line and 130, a closed pipe is silent and 141. Only a bug shows a traceback,
unless `--debug` or FLEXPIPE_DEBUG asks for it. What the rooms log is told on stderr, line by line.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import click

from flexpipe import __version__
from flexpipe.cli.bench import bench
from flexpipe.cli.demo import demo
from flexpipe.cli.doctor import doctor
from flexpipe.cli.plan import plan
from flexpipe.cli.profile import profile
from flexpipe.cli.run import run
from flexpipe.cli.simulate import simulate
from flexpipe.cli.sweep import sweep
from flexpipe.errors import FlexpipeError

INTERRUPTED = 130  # 128 + SIGINT, as shells count
PIPE_CLOSED = 141  # 128 + SIGPIPE
_ALLOCATIONS = 50_000  # between two searches for cycles: plans and ops are many and have none


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="FLEXPIPE_DEBUG=1 is the same as --debug.",
)
@click.version_option(__version__, prog_name="flexpipe")
@click.option("--debug", is_flag=True, help="Show the traceback of every error.")
def cli(debug: bool) -> None:
    """Batch inference for language models that are bigger than the accelerator."""
    if debug:
        os.environ["FLEXPIPE_DEBUG"] = "1"


cli.add_command(run)
cli.add_command(demo)
cli.add_command(bench)
cli.add_command(simulate)
cli.add_command(sweep)
cli.add_command(doctor)
cli.add_command(plan)
cli.add_command(profile)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; `arguments` default to the process's."""
    gc.set_threshold(_ALLOCATIONS)
    sys.exit(_exit_code(sys.argv[1:] if arguments is None else list(arguments)))


def _exit_code(arguments: list[str]) -> int:
    try:
        given = tuple(arguments)  # for a command that starts itself again
        with _told_on_stderr(), cli.make_context("flexpipe", arguments, obj=given) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as exit:
        return exit.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _refuse(error, _usage(error), error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _refuse_quietly(f"flexpipe: interrupted{_go_on(arguments)}", INTERRUPTED)
    except BrokenPipeError:
        _forget_output()
        return PIPE_CLOSED
    except FlexpipeError as error:
        return _refuse(error, "", str(error), error.exit_code)
    except OSError as error:  # files come and go; the text names the one
        return _refuse(error, "", str(error), FlexpipeError.exit_code)
    return 0


@contextlib.contextmanager
def _told_on_stderr() -> Iterator[None]:
    """What the rooms log for people, from INFO on, goes to stderr meanwhile."""
    log, lines = logging.getLogger("flexpipe"), _Lines()
    level = log.level
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(lines)


class _Lines(logging.Handler):
    """One line per record, above the progress bar where one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # not needed for --help

        kind = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        text = " ".join(record.getMessage().split())
        with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more
            tqdm.write(f"flexpipe: {kind}{text}", file=sys.stderr)


def _go_on(arguments: Sequence[str]) -> str:
    """How to resume: the same command, which keeps what is there."""
    if not arguments or arguments[0] not in ("run", "sweep"):
        return ""
    again = shlex.join(["flexpipe", *(word for word in arguments if word != "--overwrite")])
    return f"; what is done is kept, go on with: {again}"


def _refuse(error: Exception, usage: str, text: str, exit_code: int) -> int:
    if os.environ.get("FLEXPIPE_DEBUG", "0") not in ("", "0"):
        raise error
    return _refuse_quietly(f"{usage}flexpipe: error: {text}", exit_code)


def _refuse_quietly(text: str, exit_code: int) -> int:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    return exit_code


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return "" if context is None else f"{context.get_usage()}\n"


def _forget_output() -> None:
    """Point what is left in the buffers at nothing, or the interpreter complains at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())

"""How every command ends: one readable paragraph instead of a traceback, and an exit code."""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence

from esr_train.errors import InputError, RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What writing to a full disk raises, without a file's name."""


def prepare() -> None:
    """What must be set before torch is imported; every entry point calls it first.

    Threads that spin while they wait make a forward pass many times slower where cores are shared.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Give a parser the `--debug` flag that `guarded` wants."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def add_recipe(
    parser: argparse.ArgumentParser, example: str, what: str = "recipe file (YAML), or a shipped name"
) -> None:
    """Give a parser a recipe and overrides of it, of which `example` is one."""
    parser.add_argument("recipe", help=what)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"such as {example}")


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    act: Callable[[argparse.Namespace], None],
    purpose: str,
) -> argparse.ArgumentParser:
    """Add a sub-command that calls `act` with its options; `purpose` is its help, without the full stop."""
    parser = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
    parser.set_defaults(act=act)
    add_debug(parser)
    return parser


def parse_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command with sub-commands; overrides of a recipe (`key=value`) may stand behind options, too."""
    options, others = parser.parse_known_args(arguments)
    known = getattr(options, "overrides", None)
    if others and (known is None or not all("=" in word and word[0] != "-" for word in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        options.overrides = [*(known or ()), *others]
    return options


def guarded(run: Callable[[], None], debug: bool) -> int:
    """Run a command; returns 0, 2 for bad input, 1 for a failed run, 130 when interrupted."""
    try:
        run()
    except (InputError, RunError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        if debug or (error.filename is None and error.errno not in _FULL):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {where}{error.strerror}. Check the path and the space left there.", file=sys.stderr)
        return 1
    return 0

"""What a run says: printed, and kept with the time and every warning in `run.log` in the run directory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "run.log"
_LOG = logging.getLogger("esr")
_LIBRARIES = ("", "transformers", "py.warnings")
"""Loggers whose warnings are kept, too; of all but some libraries the root's is enough."""


def say(text: str) -> None:
    """Print a line, and note it in the log of the run that is open."""
    print(text, flush=True)
    _LOG.info(text)


@contextmanager
def logged(directory: Path) -> Iterator[None]:
    """Keep what is said, and all warnings, in a run's log until the block ends; also with what error it ended."""
    handler = logging.FileHandler(directory / FILE, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
    warnings = [logging.getLogger(name) for name in _LIBRARIES]
    level, _LOG.propagate = _LOG.level, False
    _LOG.setLevel(logging.INFO)
    for logger in (_LOG, *warnings):
        logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    except BaseException as error:
        _LOG.error("ended with %s: %s", type(error).__name__, error)
        raise
    finally:
        logging.captureWarnings(False)
        for logger in (_LOG, *warnings):
            logger.removeHandler(handler)
        _LOG.setLevel(level)
        handler.close()

"""Making rows: sources of transcripts, mixtures, and what their files hold.

    from data_gen import generate_rows, mix, describe

The names below are imported when they are first used: importing this package loads nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_gen.collect import generate_rows
    from data_gen.description import describe
    from data_gen.mixture import mix
    from data_gen.sources import Context, Outcome, SteerableLatent, read_cues, register_source

_MODULES = {
    "Context": "sources",
    "Outcome": "sources",
    "SteerableLatent": "sources",
    "describe": "description",
    "generate_rows": "collect",
    "mix": "mixture",
    "read_cues": "sources",
    "register_source": "sources",
}
__all__ = [
    "Context",
    "Outcome",
    "SteerableLatent",
    "describe",
    "generate_rows",
    "mix",
    "read_cues",
    "register_source",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

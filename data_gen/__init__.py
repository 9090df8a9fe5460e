"""Making rows: sources of transcripts, filters, mixtures, and what their files hold.

    from data_gen import generate_rows, mix, describe

The names below are loaded when they are first used: importing this package loads nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_gen.collect import generate_rows
    from data_gen.description import describe
    from data_gen.mixture import mix, mix_sized
    from data_gen.sources import Context, Cues, Make, Outcome, SteerableLatent, read_cues, register_source

__all__ = [
    "Context",
    "Cues",
    "Make",
    "Outcome",
    "SteerableLatent",
    "describe",
    "generate_rows",
    "mix",
    "mix_sized",
    "read_cues",
    "register_source",
]

_MODULES = {
    "data_gen.collect": ("generate_rows",),
    "data_gen.description": ("describe",),
    "data_gen.mixture": ("mix", "mix_sized"),
    "data_gen.sources": ("Context", "Cues", "Make", "Outcome", "SteerableLatent", "read_cues", "register_source"),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

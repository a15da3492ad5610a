"""The callbacks of a parsed config, as entries ``{class_path, init_args}``."""

from __future__ import annotations

from importlib import import_module

from jsonargparse import Namespace


def loaded_class(entry: Namespace) -> type:
    """Return the class that an entry ``{class_path, init_args}`` names."""
    module, name = entry.class_path.rsplit(".", 1)
    return getattr(import_module(module), name)


def callback_entries(config: Namespace) -> list[Namespace]:
    """Return the entries of ``trainer.callbacks``; a single entry counts as a list of one."""
    return entries(config.trainer.callbacks)


def entries(value: Namespace | list[Namespace] | None) -> list[Namespace]:
    """Return entries as a list: of none, of one, of many."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]

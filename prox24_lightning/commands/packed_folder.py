"""Alias of :mod:`prox24_lightning.io.packed_folder`, for older model cards."""

from prox24_lightning.io.packed_folder import is_packed_folder, load_folder, save_folder

__all__ = ["is_packed_folder", "load_folder", "save_folder"]

"""``prox24_lightning.io.packed_folder`` under the name that older model cards give it."""

from prox24_lightning.io.packed_folder import is_packed_folder, load_folder, save_folder

__all__ = ["is_packed_folder", "load_folder", "save_folder"]

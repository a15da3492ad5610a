"""Pretrained models, packed folders and texts. Public and stable: model cards name ``io.packed_folder``."""

"""Runnable examples: thin LightningModules and LightningDataModules, each started by one YAML in ``configs/``."""

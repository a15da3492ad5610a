"""Losses and teacher of a distillation step."""

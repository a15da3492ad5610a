"""Pretrained models, packed folders and texts: public, since users' model cards name it."""

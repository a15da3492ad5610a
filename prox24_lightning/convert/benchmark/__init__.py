"""Dense against converted, timed: layers, whole models, language models."""

"""Time dense against converted: layers, whole models, language models."""

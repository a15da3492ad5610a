"""Run a module beside its training: nothing of the module or of the random state changes."""

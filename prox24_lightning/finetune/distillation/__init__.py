"""Learn from a frozen teacher: losses, comparison with the teacher, time that it takes."""

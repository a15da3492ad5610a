"""Other hosts than Lightning."""

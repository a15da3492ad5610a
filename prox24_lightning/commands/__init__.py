"""What each ``prox24`` command runs. Like the callbacks, these modules may import Lightning."""

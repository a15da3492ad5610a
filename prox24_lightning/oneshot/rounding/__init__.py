"""Round a 2:4 model to 8 bits so that it loses least: smoothed inputs, and layers that keep 16 bits."""

"""Everything about the inputs of layers: capturing them, running them again, Hessians, the dense reference."""

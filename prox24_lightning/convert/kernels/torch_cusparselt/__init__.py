"""torch's operator on cuSPARSELt, for where the library cannot be bound directly."""

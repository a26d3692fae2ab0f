"""Plain numpy forward passes of the models: the specification the engine is tested against."""

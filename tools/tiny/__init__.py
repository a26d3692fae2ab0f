"""Train and export the tiny target and draft that ship with pydflash."""

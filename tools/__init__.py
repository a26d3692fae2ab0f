"""Programs that make what the package is tested and measured with. None of them is needed to use it."""

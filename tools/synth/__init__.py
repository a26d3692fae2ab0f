"""Random GGUF files with the exact shapes, types and sizes of real models: same bytes to read, same cost to run."""

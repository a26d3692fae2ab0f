"""Measuring: speed by llama-bench's definitions, and one configuration against another."""

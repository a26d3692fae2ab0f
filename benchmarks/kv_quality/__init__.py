"""What a quantised K/V cache costs in quality, against f16: see __main__.py."""

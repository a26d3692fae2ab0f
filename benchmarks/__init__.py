"""One command per question; see README.md for the protocol."""

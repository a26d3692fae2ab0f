"""The tests. What they promise is in their names; CONTRIBUTING.md says where a new one goes."""

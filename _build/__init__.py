"""The build: the PEP 517 backend, and how each kernel is compiled."""

"""Training of the zoo: small models on the source text of Python's standard library."""

"""The front door: validation, tokens to text and back, and the choice of a replica. Protobuf messages end here."""

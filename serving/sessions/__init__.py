"""Sessions: conversations whose state is kept in a store, and so across restarts."""

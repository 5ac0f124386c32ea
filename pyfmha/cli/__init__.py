"""The commands: they parse, call the room that does the work, and print. Those that compile need the extra ``aot``."""

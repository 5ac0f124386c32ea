"""The commands: they parse, call the room that does the work, and print. Needs what the extra ``aot`` brings."""

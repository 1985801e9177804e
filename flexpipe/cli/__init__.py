"""The command line: parses, calls, prints. Nothing here imports torch before a job starts."""

"""The command line, pat: one module per family of commands."""

"""The command line: what each command takes, how it is read, and how a failure is told."""

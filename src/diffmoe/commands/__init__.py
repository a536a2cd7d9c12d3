"""The commands, a file each, named as it is: `main(argv)` parses, runs, prints, and returns the exit code.

Whatever is heavy (torch above all) is imported once the flags are known to be right.
"""

"""One module per command: ``SUMMARY``, ``add_arguments(parser)`` and ``run(args, output) -> exit code``."""

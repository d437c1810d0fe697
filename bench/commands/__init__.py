"""One short file a command, each with ``add_arguments(parser)`` and ``run(args)``."""

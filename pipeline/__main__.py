"""``python -m pipeline``: the ``featuremaps`` command where its script is not on the path."""

from pipeline.cli.commands import main

if __name__ == "__main__":
    main()

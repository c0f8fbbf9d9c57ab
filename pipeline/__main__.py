"""``python -m pipeline`` and the script ``featuremaps``. Worker processes import this module again, so it imports nothing."""


def main() -> None:
    """Run the command."""
    from pipeline.cli.commands import main as command  # noqa: PLC0415 (as above)

    command()


if __name__ == "__main__":
    main()

"""The command ``featuremaps``: its options, what it prints, and its exit codes."""

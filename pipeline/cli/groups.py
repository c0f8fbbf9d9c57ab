"""The first page of help, with commands grouped by purpose."""

from __future__ import annotations

import click

GROUPS = {
    "Run": ("run", "submit"),
    "Look": ("plan", "status", "show", "report"),
    "Check and repair": ("verify", "vacuum", "doctor"),
    "Clusters": ("cluster",),
}


class GroupedCommands(click.Group):
    """A group whose help lists its commands under headings, in the order of `GROUPS`; commands without a group come last."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """All commands, in the order of the help."""
        named = [name for names in GROUPS.values() for name in names]
        return [*(name for name in named if name in self.commands), *sorted(self.commands.keys() - set(named))]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the headings with their commands."""
        commands = {name: self.commands[name] for name in self.list_commands(ctx) if not self.commands[name].hidden}
        width = formatter.width - 6 - max(map(len, commands), default=0)
        named = {name for names in GROUPS.values() for name in names}
        for heading, names in {**GROUPS, "More": tuple(commands.keys() - named)}.items():
            rows = [(name, commands[name].get_short_help_str(width)) for name in names if name in commands]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)

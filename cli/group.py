"""The group of all commands: imports them when they are asked for, and shows errors of the library as one line."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import click

from cuattn.errors import CuattnError, CuattnWarning

from .commands import Entry


class LazyGroup(click.Group):
    """A group whose commands are modules that are imported when needed, never for the group's own ``--help``."""

    def __init__(self, *arguments: Any, entries: Mapping[str, Entry], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._entries = entries

    def list_commands(self, context: click.Context) -> list[str]:
        """The names of the commands, in the order of the list."""
        return [*self._entries, *super().list_commands(context)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import the command of that name; None where there is none."""
        entry = self._entries.get(name)
        if entry is None:
            return super().get_command(context, name)
        command: click.Command = getattr(importlib.import_module(f".{entry.module}", __package__), entry.attribute)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with the summaries of the list."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in self._entries.items()])


class Group(LazyGroup):
    """A group whose commands turn `CuattnError` into a message and exit code 1, and warnings into lines."""

    def invoke(self, context: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("always", CuattnWarning)
            try:
                return super().invoke(context)
            except CuattnError as error:
                raise click.ClickException(str(error)) from error
            except KeyboardInterrupt:
                click.echo("interrupted", err=True)
                raise click.exceptions.Exit(130) from None


def _show_warning(message: Warning | str, category: type[Warning], *position: Any, **more: Any) -> None:
    click.echo(f"Warning: {message}", err=True)

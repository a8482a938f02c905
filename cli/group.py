"""Errors of the library as one line on the terminal."""

from __future__ import annotations

import warnings
from typing import Any

import click

from cuattn.errors import CuattnError, CuattnWarning


class Group(click.Group):
    """A group whose commands turn `CuattnError` into a message and exit code 1, and warnings into lines."""

    def invoke(self, context: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("always", CuattnWarning)
            try:
                return super().invoke(context)
            except CuattnError as error:
                raise click.ClickException(str(error)) from error


def _show_warning(message: Warning | str, category: type[Warning], *position: Any, **more: Any) -> None:
    click.echo(f"Warning: {message}", err=True)

"""The program: what is here, and the commands below it."""

from __future__ import annotations

import click

from cuattn.version import __version__

from .commands import COMMANDS
from .group import Group


@click.group(
    cls=Group,
    entries=COMMANDS,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, "-V", "--version", prog_name="cuattn-bench")
@click.pass_context
def main(context: click.Context) -> None:
    """Measure the attention kernels of cuattn, on a GPU or, without one, on the host executor.

    Alone, it says what is here and runs a suite of less than a minute.

    \b
    Examples:
      cuattn-bench                                    what is here, and the one-minute suite
      cuattn-bench run attention --seqlen 1024        one suite, one sequence length
      cuattn-bench run figures --json figures.json    all that can be measured without a GPU
      cuattn-bench list rows                          the kernel shapes that can be chosen
      cuattn-bench inspect attention_forward          instructions of a kernel, and the bound that follows from them
      cuattn-bench cache warmup --head-dim 64         compile ahead of time
    """
    if context.invoked_subcommand is None:
        from .info import show_here  # imported here: --help needs none of it
        from .run import report_of

        show_here()
        report_of(("smoke",))
